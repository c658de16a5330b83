import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from examples.application import TINY_MOE
from examples.tiny_moe.data import MODEL
from sere_dist.evaluation import protocol
from sere_dist.evaluation.lockstep import LockstepResult
from studies import quality as study


def texts(**counts: int) -> list[protocol.Text]:
    return [protocol.Text(kind, "", [i]) for kind, count in counts.items() for i in range(count)]


def test_halves_share_no_text_and_do_not_move():
    of_all = texts(manual=5, scripture=4)
    halves = {half: protocol.half_of(of_all, half) for half in ("choice", "final")}
    assert sorted(halves["choice"] + halves["final"]) == sorted(of_all)
    assert halves["choice"] == texts(manual=2, scripture=2)


def test_any_run_of_mixed_texts_holds_all_kinds():
    in_turn = protocol.mixed(texts(dictionary=6, manual=6, scripture=4))
    assert sorted(in_turn) == sorted(texts(dictionary=6, manual=6, scripture=4))
    for half in (in_turn[:8], in_turn[8:]):
        assert Counter(text.kind for text in half) == {"dictionary": 3, "manual": 3, "scripture": 2}


def test_texts_that_are_too_short_are_left_out():
    short, long = protocol.Text("manual", "", [1, 2]), protocol.Text("manual", "", [1, 2, 3, 4])
    assert protocol.cut([short, long], 3) == [protocol.Text("manual", "", [1, 2, 3])]


def result(active: int, *kl: float) -> LockstepResult:
    """Texts of one token each, in one step of one layer."""
    zeros = (0.0,) * len(kl)
    return LockstepResult(zeros, kl, (0,) * len(kl), tokens=len(kl), active_sum=active, steps=1)


def test_between_two_settings():
    curve = [result(40, 0.01, 0.04), result(10, 1.0, 4.0), result(20, 0.1, 1.0)]
    assert study.at_active_experts(curve, 20) == pytest.approx([0.1, 1.0])
    assert study.at_active_experts(curve, 30) == pytest.approx([0.1**1.5, 0.2])
    assert study.at_active_experts(curve, 15) == pytest.approx([0.1**0.5, 2.0])
    assert study.at_active_experts(curve, 9.8) > [1.0, 4.0]
    assert study.at_active_experts(curve, 9) is study.at_active_experts(curve, 43) is None
    assert study.at_active_experts([result(8, 0.1, 0.2), result(8, 0.2, 0.3)], 8) is None


def test_compared():
    found = study.compared([0.2, 0.4], [0.1, 0.2])
    assert (found["ratio"], found["ratio_error"]) == (2, 0)
    assert found["difference"] == pytest.approx(0.15)


@pytest.fixture
def first_layer(tmp_path) -> Path:
    """The example model with its first layer alone: trained experts, in a sixth of the time."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in MODEL.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    config = json.loads((MODEL / "config.json").read_text())
    layer_types = config.get("layer_types") and config["layer_types"][:1]
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": layer_types}))
    return folder


@pytest.mark.slow
def test_study(first_layer, tmp_path, capsys, monkeypatch):
    small = {"BATCHES": (1, 6), "BATCH": 6, "KEEPS": (1, 4, 8), "KEEPS_OF_PARTS": (2,), "RANDOM_DRAWS": 2}
    small |= {
        "PRICES": (0.01, 0.1),
        "KEPT": (0.1, 0.75),
        "SAMPLES": (2, 4, 999),
        "SAMPLES_OF_CKA": 2,
        "SAMPLES_OF_KIND": 2,
    }
    for name, value in small.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "EXAMPLES", {"first-layer": replace(TINY_MOE, model=first_layer)})
    results = tmp_path / "results"
    sizes = {"texts": 6, "texts_of_kind": 6, "length": 30, "prompt": 24, "samples": 8, "calibration_length": 16}
    study.main("first-layer", half="choice", **sizes, results=results, pictures=tmp_path)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((results / "quality-first-layer.json").read_text()) == report
    pictures = [tmp_path / f"quality-first-layer-{name}.png" for name in ("by-batch", "batch-6")]
    drawn = [picture.read_bytes() for picture in pictures]
    assert min(map(len, drawn)) > 10_000
    study.main("first-layer", results=results, pictures=tmp_path, only_draw=True)
    assert [picture.read_bytes() for picture in pictures] == drawn

    rows = {(row["batch"], row["policy"], row["knob"]): row for row in report["field"]}
    assert len(rows) == len(report["field"]) == 2 * (1 + 16 * 2 + 2 + 2)
    for batch in (1, 6):
        off, one, four = (rows[batch, *point] for point in [("off", None), ("OEA", 1), ("OEA", 4)])
        assert abs(off["kl"]) < 1e-6 < four["kl"] < one["kl"]
        assert one["active_experts"] < four["active_experts"] < off["active_experts"]
        assert off["top1"] == 1 > one["top1"]
        assert rows[batch, "paper, frobenius", 4]["beside"]["paper, frobenius"]["ratio"] == 1
        # Whose slots the batch does not run does not depend on the batch.
        assert rows[batch, "top-k", 1]["kl"] == pytest.approx(rows[1, "top-k", 1]["kl"], rel=1e-3)
        cheap, dear = (rows[batch, study.PRICED, price] for price in (0.01, 0.1))
        assert cheap["active_experts"] > dear["active_experts"] >= rows[batch, "projection", 1]["active_experts"]
        assert cheap["kl"] < dear["kl"] <= rows[batch, "projection", 1]["kl"] * (1 + 1e-3)
        # A token alone still runs about as many experts of a pruned model.
        assert set(cheap["beside"]) == set(study.RIVALS) - ({study.REAP} if batch == 1 else set())
        few, many = (rows[batch, study.REAP, share] for share in (0.1, 0.75))
        assert few["kl"] > many["kl"] > 0
        assert few["active_experts"] <= 6 <= many["active_experts"]
    # Alone, a token has nobody to share with.
    alone = [rows[1, name, 4]["kl"] for name in ("OEA", "XShare", "top-k, renormalised", "dropping, renormalised")]
    assert alone == pytest.approx([alone[0]] * 4, rel=1e-3)
    assert {(row["calibrated_on"], row["evaluated_on"]) for row in report["transfer"]} == {
        (one, other) for one in report["texts_of_kind"] for other in report["texts_of_kind"]
    }
    assert [row["samples"] for row in report["samples"]] == [2, 4, 8] * 2
    assert [row["ratio"] for row in report["samples"]][2::3] == [1, 1]

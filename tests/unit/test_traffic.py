import json

import pytest
import torch

from examples.tiny_moe.data import MODEL, example_texts
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.schema import SCHEMA_VERSION, ArtifactConfig
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import expert_inputs, score_layer, text_blocks
from sere_dist.evaluation.lockstep import LockstepResult, unchanged
from sere_dist.evaluation.traffic import Layout, Traffic, recorded, traffic, uniform_domains
from sere_dist.method.counters import COUNTERS, count_step
from sere_dist.method.placement import linear_ranks
from sere_dist.method.records import ExpertPlaces, Step
from sere_dist.moe import MoeShape
from studies import traffic as study
from tests.support.artifacts import change_layers, small_artifact


def uniform_ids(*shape: int, num_experts: int, top_k: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(*shape, num_experts).topk(top_k, dim=-1).indices


@pytest.mark.parametrize(("num_ranks", "known"), [(4, 3.63), (8, 5.34)])
def test_uniform_routing_matches_the_closed_form(num_ranks, known):
    assert uniform_domains(128, 8, num_ranks) == pytest.approx(known, abs=0.005)
    layout = Layout(num_ranks, {0: linear_ranks(128, num_ranks)})
    found = traffic({0: uniform_ids(200, 64, num_experts=128, top_k=8)}, layout)
    assert sum(found.domains) / 64 == pytest.approx(known, rel=0.005)
    # A home is one of the domains that a token visits, or not: by chance, as often as any other rank.
    assert sum(found.remote_domains) / 64 == pytest.approx(known * (1 - 1 / num_ranks), rel=0.01)
    assert sum(found.remote_slots) / 64 == pytest.approx(8 * (1 - 1 / num_ranks), rel=0.01)


def test_counts_are_those_of_the_engine():
    """The measures of an evaluation are what the counters of a serving engine would add up to."""
    torch.manual_seed(0)
    layout = Layout(3, {4: linear_ranks(10, 3), 5: torch.arange(10) % 3})
    ids = {layer: uniform_ids(6, 5, num_experts=10, top_k=4) for layer in (4, 5)}
    for dropped in ids.values():
        dropped[torch.rand(dropped.shape) < 0.3] = -1
    counts = torch.zeros(len(COUNTERS) + 3)
    for layer, ids_DBK in ids.items():
        for step in ids_DBK:
            routed = Step(torch.rand(5, 4), step, home_T=torch.tensor([0, 1, 2, 0, 1]))
            places = ExpertPlaces(layout.rank[layer], 3, layout.rank[layer])
            counts += count_step(routed, step, torch.zeros(10, dtype=torch.bool), places)
    counts = dict(zip(COUNTERS, counts.tolist(), strict=False))
    found = traffic(ids, layout)
    for name in ("domains", "remote_domains", "remote_slots"):
        assert sum(getattr(found, name)) / 5 == pytest.approx(counts[f"{name}_after"] / counts["rows"])
    for name in ("active_experts", "largest_rank"):
        assert getattr(found, name) == pytest.approx([counts[f"{name}_after"] / counts["steps"]])
    both = found + found
    assert (len(both.domains), len(both.active_experts)) == (10, 2)


def test_recording_changes_nothing():
    ids: dict[int, torch.Tensor] = {}
    weights, chosen = torch.rand(2, 3, 4), uniform_ids(2, 3, num_experts=8, top_k=4)
    routed = recorded(unchanged, ids)(7, weights, chosen, None)
    assert routed[0] is weights
    assert ids[7] is routed[1] is chosen


def test_where_experts_are():
    artifact = small_artifact(num_experts=16)
    change_layers(artifact, tokens_E=dict.fromkeys((0, 1), torch.ones(16, dtype=torch.int64)))
    names = {ranks: {place.placement for place in study.layouts(artifact, (ranks,))} for ranks in (4, 8)}
    assert names == {4: {"linear", "placed"}, 8: {"linear", "placed"}}
    change_layers(artifact, coactivation_EE={layer: torch.rand(16, 16) for layer in (0, 1)})
    found = study.layouts(artifact, (8,))
    assert {place.placement for place in found} == {"linear", "placed", "placed by similarity"}
    for layout in found.values():
        assert layout.rank[1].bincount().tolist() == [2] * 8


def point(kl: float, remote_domains: list[float]) -> study.Point:
    """Two texts of 10 tokens."""
    result = LockstepResult((30.0, 30.0), (10 * kl, 10 * kl), (10, 10), tokens=20, active_sum=8, steps=2)
    return study.Point(result, Traffic((4, 4), tuple(remote_domains), (7, 7), (4,), (2,)))


def test_the_price_is_the_highest_that_costs_no_more():
    place, paper = study.Place(8, "linear"), study.PAPER
    cost = {0.0: 0.01, 0.01: 0.03, 0.02: 0.02, 0.05: 0.04}
    points = {(16, place, study.Setting("projection", price)): point(kl, [1, 1]) for price, kl in cost.items()}
    points[16, place, paper] = point(0.03, [2, 4])
    chosen = study.choose(points, 16, place, paper)
    assert chosen.price == 0.02
    goal = study.compare(points, 16, place, chosen, paper)
    assert goal["fewer_remote_domains"] == pytest.approx(1 - 2 / 6, rel=1e-3)
    assert goal["kl_difference"] == pytest.approx(-0.01)
    points[16, place, paper] = point(0.005, [2, 4])
    assert study.choose(points, 16, place, paper).price == 0


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Both artifacts of the example model, from a few texts."""
    folder = tmp_path_factory.mktemp("artifacts")
    checkpoint = Checkpoint(str(MODEL))
    blocks = text_blocks(example_texts("calibration.parquet", 64, 8).tolist())
    inputs = dict(expert_inputs(checkpoint, blocks))
    for method in ("frobenius", "projection"):
        results = {layer: score_layer(checkpoint, layer, inputs[layer], method) for layer in inputs}
        config = ArtifactConfig(
            schema_version=SCHEMA_VERSION,
            base_model=str(MODEL),
            **vars(MoeShape.from_config(checkpoint.config)),
            layer_names={layer: result.statistics.name for layer, result in results.items()},
            method=method,
            dataset="calibration.parquet",
            num_tokens=8 * 64,
            versions={},
        )
        change_layers(Artifact(config, results), coactivation_EE=None).save(folder / method)
    return folder


@pytest.mark.slow
def test_study(artifacts, tmp_path, capsys):
    results, picture = tmp_path / "results" / "traffic.json", tmp_path / "traffic.png"
    study.main(artifacts, results=results, picture=picture, quick=True)
    output = capsys.readouterr().out
    report = json.loads(output.splitlines()[-1])
    assert json.loads(results.read_text()) == report
    assert picture.stat().st_size > 10_000

    rows = {(r["batch"], r["ranks"], r["placement"], r["policy"], r["price"]): r for r in report["points"]}
    assert len(rows) == len(report["points"]) == 2 * 2 * 2 * (4 + 2)
    for row in rows.values():
        assert row["texts"] == 8
        assert row["per_rank_bytes"] == pytest.approx(2 * row["remote_domains"] * 256 * 2, rel=1e-3)
        assert row["per_slot_bytes"] == pytest.approx(2 * row["remote_slots"] * 256 * 2, rel=1e-3)
        assert row["all_gather_bytes"] == 2 * (row["ranks"] - 1) * 256 * 2
    off, paper, dropping, free, priced = (
        rows[8, 8, "linear", *setting]
        for setting in [("off", None), ("paper", None), ("dropping", None), ("projection", 0), ("projection", 0.05)]
    )
    assert abs(off["kl"]) < 1e-6 < free["kl"] < min(dropping["kl"], priced["kl"])
    assert priced["remote_domains"] < paper["remote_domains"] < free["remote_domains"] < off["remote_domains"]
    assert paper["active_experts"] == pytest.approx(priced["active_experts"], rel=0.05)
    assert rows[8, 8, "placed", "off", None]["kl"] == off["kl"]

    assert [(goal["baseline"], goal["placement"]) for goal in report["goals"]] == [
        (baseline, placement) for baseline in ("paper", "dropping") for placement in ("linear", "placed")
    ]
    closed_forms = [row for row in report["synthetic"] if "closed_form_domains" in row]
    assert {(row["shape"], row["ranks"]) for row in closed_forms} == {
        (shape, ranks) for shape in study.SHAPES for ranks in (4, 8)
    }
    for row in closed_forms:
        assert row["domains"] == pytest.approx(row["closed_form_domains"], rel=0.01)

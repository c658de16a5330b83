"""Decoding by layers against decoding with the whole model, and the plan of a tuning against arithmetic by hand."""

from functools import cache
from pathlib import Path

import pytest

from calibration_jobs import tune
from calibration_jobs.search import most_trials
from calibration_jobs.tables import tuning_plan_table
from examples.tiny_moe.data import MODEL
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.recommendation import LayerSetting
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.plan import H200, Sizes
from sere_dist.evaluation.layered import LayeredHeldOut
from sere_dist.evaluation.lockstep import Decoding, HeldOut, unchanged
from sere_dist.evaluation.plan import STATES_BYTES, TuningPlan
from sere_dist.evaluation.rerouters import Estimating
from sere_dist.evaluation.tuning import losses_of_steps, most_candidates, rerouter_of
from tests.support.commands import invoke
from tests.support.tuning import options

ROOT = Path(__file__).resolve().parents[2]
ONE, TWO = LayerSetting(select_top_k=1), LayerSetting(select_top_k=2, expert_price=0.01)


@pytest.fixture(scope="module")
def artifact(projection_path) -> Artifact:
    return Artifact.load(projection_path)


@pytest.fixture
def whole(model, heldout_ids) -> HeldOut:
    """Seven texts, which fill no batch of more than one."""
    return HeldOut(model, heldout_ids[:7, :40], 20)


@pytest.fixture
def layered(heldout_ids) -> LayeredHeldOut:
    return LayeredHeldOut(Checkpoint(str(MODEL)), heldout_ids[:7, :40], 20)


def test_one_pass_measures_what_the_whole_model_does(artifact, whole, layered):
    """Of the model as it is, and of settings of the first, a middle, the last and several layers."""
    settings = [({}, 3), ({}, 1), ({0: ONE}, 3), ({3: TWO}, 2), ({5: ONE}, 2), ({2: TWO, 4: ONE}, 6)]

    def decodings() -> list[Decoding]:
        rerouters = (rerouter_of(artifact.tables, "projection", layers) for layers, _ in settings)
        estimating = [Estimating(rerouter, artifact.tables) for rerouter in rerouters]
        pairs = zip(estimating, settings, strict=True)
        return [Decoding(each, batch, min(layers, default=6)) for each, (layers, batch) in pairs]

    theirs, ours = decodings(), decodings()
    for expected, found in zip(whole.run_all(theirs), layered.run_all(ours), strict=True):
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        assert found.divergences == pytest.approx(expected.divergences, rel=1e-3, abs=1e-5)
        # A near tie between two experts, or two tokens, may fall either way.
        assert found.agreements == pytest.approx(expected.agreements, abs=1)
        assert found.active_experts == pytest.approx(expected.active_experts, rel=1e-3)
        assert (found.tokens, found.steps) == (expected.tokens, expected.steps)
    for expected, found in zip(theirs, ours, strict=True):
        assert found.rerouter.error == pytest.approx(expected.rerouter.error, rel=1e-3)
    assert [each.rerouter.error > 0 for each in ours] == [bool(layers) for layers, _ in settings]


def test_what_steps_lose_is_the_same(artifact, whole, layered):
    expected, found = (losses_of_steps(each, 3, artifact.tables) for each in (whole, layered))
    assert expected.keys() == found.keys()
    for layer, losses in expected.items():
        assert found[layer].sort().values == pytest.approx(losses.sort().values, rel=1e-3, abs=1e-6)


def test_too_few_texts(layered):
    with pytest.raises(ValueError, match="7 texts do not fill a batch of 8"):
        layered.run(unchanged, 8)


@cache
def sizes(model: str) -> Sizes:
    return Sizes.of_checkpoint(Checkpoint(str(ROOT / "benchmarks" / "shapes" / model)))


def plan(model: str = "qwen3-30b-a3b", **given) -> TuningPlan:
    """The tuning of an artifact of method projection by layers, with the defaults but for what is given."""
    trials = most_trials(len(sizes(model).layer_names), most_candidates("projection", 8), len(tune.BATCHES), 8)
    defaults = {"num_texts": 64, "length": 128, "trials": trials, "by_layers": True, "dtype": "auto", "memory": None}
    return TuningPlan(**vars(sizes(model)), **(defaults | given))


def test_a_plan_for_qwen3_30b():
    found = plan()
    layer, embedding = (
        128 * 3 * 2048 * 768 + 2048 * 40 * 128 + 32 * 128 * 2048 + 128 * 2048 + 2 * 2048 + 256,
        151936 * 2048,
    )
    assert found.whole_bytes == found.pass_read == 2 * (48 * layer + 2 * embedding + 2048)
    assert found.part_bytes == 4 * (layer + embedding)
    assert found.states_bytes == 64 * 128 * 2048 * 4
    assert found.trials_a_pass == STATES_BYTES // found.states_bytes - 1 == 127
    assert found.passes == 4 + 6
    reading, computing = found.pass_read / 2e9, 470 * found.trial_flops / 67e12
    assert found.seconds(H200, 1) == pytest.approx(10 * reading + computing)
    assert found.seconds(H200, 8) == pytest.approx(7 * reading + computing / 8)
    assert plan(dtype="float32").whole_bytes == 2 * found.whole_bytes
    assert plan(by_layers=False).trials_a_pass == 1


def test_a_plan_keeps_to_the_memory_of_a_worker():
    states = plan().states_bytes
    found = plan(memory=plan().part_bytes + 20 * states)
    assert (found.trials_a_pass, found.passes) == (9, 53 + 6)
    found.check()
    plan(memory=plan().part_bytes + 4 * states).check()
    with pytest.raises(ValueError, match=r"takes 4.01 GB: .* is 3.74 GB, and 64 texts have 0.0671 GB .*--num-samples"):
        plan(memory=plan().part_bytes + 4 * states - 1).check()
    with pytest.raises(ValueError, match=r"30 GB, and the model takes 61.1 GB: .* or tune --by-layers"):
        plan(memory=30 * 10**9, by_layers=False).check()
    plan(memory=62 * 10**9, by_layers=False).check()


@pytest.mark.parametrize(
    ("by_layers", "told"),
    [
        (True, ["127 trials and of the model as it is, 67.1 MB each", "61.1 GB a pass", "about 10 passes"]),
        (False, ["the model, 61.1 GB as it is stored; with --by-layers one part of it at a time, at most 3.7 GB"]),
    ],
)
def test_what_the_table_tells(by_layers, told):
    rows = " | ".join(tuning_plan_table(plan(by_layers=by_layers), "2 at a time").columns[1].cells)
    for each in ["up to 470, of 64 texts of 128 tokens", *told]:
        assert each in rows


def test_by_layers_has_one_dtype(projection_path):
    done = invoke(tune.main, *options(projection_path, max_kl="1", dtype="bfloat16"), "--by-layers")
    assert done.exit_code == 1 and "--by-layers runs in float32" in done.output


def test_the_guide_says_what_the_plan_says():
    """Column by column of its table."""
    guide = (ROOT / "docs" / "guides.md").read_text()
    plans = plan(), plan("qwen3-235b-a22b")
    for text in (
        lambda p: f"{p.whole_bytes / 1e9:.1f} GB",
        lambda p: f"{p.part_bytes / 1e9:.1f} GB",
        lambda p: f"{p.states_bytes / 1e6:.1f} MB",
        lambda p: f"{p.trials}",
        lambda p: f"{p.trials_a_pass}",
        lambda p: f"{p.passes}",
        lambda p: f"{p.seconds(H200, 1):,.0f} s / {p.seconds(H200, 8):,.0f} s",
    ):
        assert f"| {' | '.join(map(text, plans))} |" in guide

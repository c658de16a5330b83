"""Tuning as far as it needs no cluster: the arithmetic that combines layers, and what its command refuses."""

import os
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch

from calibration_jobs import tune
from calibration_jobs.measurements import Measurements
from examples.tiny_moe.data import MODEL
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.recommendation import LayerSetting, Outcome
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.evaluation.lockstep import HeldOut
from sere_dist.evaluation.rerouters import projection_rerouter
from sere_dist.evaluation.tuning import (
    Budget,
    Cost,
    bracket,
    candidates,
    combinations,
    evenly_spaced,
    hull,
    losses_of_steps,
)
from sere_dist.method.fixed_point import ALWAYS_PRIMARY, FIXED_POINT_ONE
from sere_dist.method.projection import primary_losses
from sere_dist.method.records import Settings, Step
from tests.support.artifacts import recommend, small_artifact
from tests.support.commands import invoke
from tests.support.tuning import options

OFF = Cost(10, 0.0)


def setting(price: float) -> LayerSetting:
    return LayerSetting(select_top_k=1, expert_price=price)


def test_a_hull_leaves_out_what_a_mixture_beats():
    costs = {setting(1): Cost(8, 0.1), setting(2): Cost(6, 0.5), setting(3): Cost(4, 0.6), setting(4): Cost(11, 0.0)}
    assert [kept for kept, _ in hull(costs, OFF)] == [None, setting(1), setting(3)]


@pytest.mark.parametrize("seed", range(5))
def test_combinations_are_the_best_of_all(seed):
    """Those that arithmetic finds, against all there are of three layers with five settings."""
    torch.manual_seed(seed)
    alone = {
        layer: {
            setting(price): Cost(float(active), float(kl))
            for price, active, kl in zip(range(1, 6), 1 + 9 * torch.rand(5), torch.rand(5) ** 2, strict=True)
        }
        for layer in range(3)
    }

    def total(combination: dict[int, LayerSetting]) -> tuple[float, float]:
        costs = [alone[layer][combination[layer]] if layer in combination else OFF for layer in alone]
        return sum(cost.active_experts for cost in costs), sum(cost.kl for cost in costs)

    found = [total(combination) for combination in combinations(alone, OFF)]
    assert found == sorted(found, key=lambda cost: (-cost[0], cost[1])) and len(found) >= 3
    every = [
        total({layer: own for layer, own in enumerate(each) if own is not None})
        for each in product(*([None, *alone[layer]] for layer in alone))
    ]
    for active, kl in found:
        assert kl == pytest.approx(min(cost for fewer, cost in every if fewer <= active + 1e-9))


def outcome(active: float, kl: float, error: float = 0.0) -> Outcome:
    numbers = {"loss_rise": 2 * kl, "loss_rise_error": error, "perplexity": 20, "top1": 0.9, "top1_error": 0.01}
    return Outcome(batch=16, active_experts=active, kl=kl, kl_error=error, **numbers)


def test_what_a_budget_lies_between():
    measured = {0: outcome(40, 0.01), 5: outcome(30, 0.02, 0.001), 9: outcome(20, 0.05)}
    assert bracket(measured, Budget("kl", 0.022)) == (5, 9)
    assert bracket(measured, Budget("kl", 0.0219)) == (0, 5)  # two standard errors are spent
    assert bracket(measured, Budget("kl", 0.005)) == (None, 0)
    assert bracket(measured, Budget("kl", 1)) == (9, None)
    assert bracket(measured, Budget("loss_rise", 0.03)) == (0, 5)
    assert bracket(measured, Budget("active_experts", 35)) == (5, 0)
    assert bracket(measured, Budget("active_experts", 10)) == (None, 9)
    # By the luck of few texts a harder setting may cost less: nothing beyond the first that is outside is trusted.
    assert bracket({**measured, 7: outcome(25, 0.011)}, Budget("kl", 0.015)) == (0, 5)


def test_what_estimated_errors_come_to():
    """Of the three that count the KL divergence is 0.4, 0.5 and 0.625 times the error; the others are too uncertain."""
    measured = [(0.004, 0.01), (0.05, 0.1), (0.0625, 0.1), (0.0001, 0.5), (0.1, None), (0.0, 0.0)]
    curve = [outcome(10, kl, 0.0001).model_copy(update={"estimated_error": error}) for kl, error in measured]
    recommended = recommend(small_artifact(), "projection", {0: LayerSetting(select_top_k=1)})
    found = recommended.model_copy(update={"curve": curve}).kl_estimate
    assert found is not None and found.layers == 1
    assert found.nats == pytest.approx(0.5)
    assert found.spread == pytest.approx(1.25)
    assert found.of(error=6.0, rows=3) == pytest.approx(1.0)
    assert recommended.kl_estimate is None  # its evidence has no estimate


def test_evenly():
    assert evenly_spaced(3, 5, 10) == [3, 4, 5]
    assert (
        evenly_spaced(0, 53, 10)[0] == 0 and evenly_spaced(0, 53, 10)[-1] == 53 and len(evenly_spaced(0, 53, 10)) == 10
    )


def test_what_a_step_loses_is_what_the_policy_weighs(model, heldout_ids, projection_path):
    """Against `projection.primary_losses`; and prices let through little less than the experts they were chosen for."""
    artifact = Artifact.load(projection_path)
    held_out = HeldOut(model, heldout_ids[:4, :40], 20)
    losses = losses_of_steps(held_out, 4, artifact.tables)
    expected = {layer: [] for layer in losses}

    def look(layer, weights_DBK, ids_DBK, _scores):
        for weights_BK, ids_BK in zip(weights_DBK, ids_DBK, strict=True):
            tables = artifact.tables[layer]
            all_E = primary_losses(Step(weights_BK, ids_BK), tables, Settings(1, expert_price=1e-6))
            best_E = tables.similarity_EE[:, all_E == ALWAYS_PRIMARY].amax(dim=1)
            few = (all_E > 0) & (all_E < ALWAYS_PRIMARY)
            expected[layer].append((all_E / FIXED_POINT_ONE * (1 - best_E))[few].double())
        return weights_DBK, ids_DBK

    held_out.run(look, 4)
    for layer, of_steps in expected.items():
        assert losses[layer].double().sort().values == pytest.approx(torch.cat(of_steps).sort().values, abs=1e-6)

    tried = candidates("projection", 8, artifact.layers[2].similarity_EE, losses[2])
    active = {}
    for each in tried:
        ran = []

        def run(layer, *routing, own=each, ran=ran):
            routed = projection_rerouter(artifact.tables, own.numbers)(layer, *routing)
            if layer == 2:
                ran.append([len(set(ids.flatten().tolist()) - {-1}) for ids in routed[1]])
            return routing[:2]

        held_out.run(run, 4)
        active[each.expert_price] = sum(map(sum, ran))
    steps = 19
    most, none = active[0.0] + len(losses[2]), active.pop(0.0)
    shares = [(count - none) / (most - none) for _price, count in sorted(active.items())]
    assert len(losses[2]) > 3 * steps
    assert shares == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02], abs=0.02)


def test_candidates_of_the_papers_policy():
    similarity = small_artifact(num_experts=8).layers[0].similarity_EE
    found = candidates("sere", 3, similarity)
    assert [each.select_top_k for each in found] == [1, 1, 1, 2, 2, 2]
    assert len(set(found)) == 6 and all(each.expert_price == 0 for each in found)


def test_measurements_that_are_damaged(tmp_path):
    def opened() -> dict:
        return Measurements(tmp_path / "artifact", {"model": "m"}, restart=False).values

    measurements = Measurements(tmp_path / "artifact", {"model": "m"}, restart=False)
    for key, value in (("a", {"losses": (1.0,)}), ("b", 2)):
        measurements.add(key, value)
    whole = measurements.path.read_text()
    assert opened() == measurements.values == {"a": {"losses": [1.0]}, "b": 2}
    measurements.path.write_text(whole + '["c", [3]')
    assert opened() == measurements.values and measurements.path.read_text() == whole
    measurements.path.write_text(whole.replace("[1.0]}]", "[1.0]"))
    with pytest.raises(ValueError, match=r"tuning.jsonl, line 2: .*delete the line, or the file"):
        opened()
    measurements.path.write_text(whole)
    with pytest.raises(ValueError, match=r"another tuning \(other: model, seed\).*--restart"):
        Measurements(tmp_path / "artifact", {"model": "n", "seed": 1}, restart=False)
    assert Measurements(tmp_path / "artifact", {"model": "n"}, restart=True).values == {}
    Measurements(tmp_path / "artifact", {"model": "o"}, restart=False).add("a", 1)  # there was nothing to lose
    with pytest.raises(ValueError, match="other: model"):
        Measurements(tmp_path / "artifact", {"model": "n"}, restart=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "give one budget: --max-kl, --max-perplexity-rise or --active-experts"),
        ({"max_kl": "1", "active_experts": "9"}, "give one budget"),
        ({"max_kl": "0"}, "--max-kl: Input should be greater than 0"),
        ({"max_kl": "1", "prompt_length": "23"}, "--prompt-length 23 leaves no decode step of --length 24"),
        ({"max_kl": "1", "num_samples": "4000"}, "8000 different texts of 24 tokens are needed"),
        ({"max_kl": "1", "batch": "7"}, "--num-samples 6 do not fill a --batch of 7"),
        ({"max_kl": "1", "model": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_options(projection_path, tmp_path, wrong, message):
    path = Path(shutil.copytree(projection_path, tmp_path / "artifact"))
    done = invoke(tune.main, *options(path, **wrong))
    assert done.exit_code == 1 and message in done.output
    assert sorted(os.listdir(tmp_path)) == ["artifact"]


def test_measurements_are_of_the_artifacts_sensitivities():
    """The same tensors with other sensitivities: a price means something else, so nothing that was measured holds."""
    config = tune.TuningConfig(model=str(MODEL), artifact="artifact", batch=2, max_kl=0.1)
    found = []
    for sensitivity in (None, 0.5):
        artifact = small_artifact()
        for layer in artifact.layers.values():
            layer.statistics.sensitivity = sensitivity
        found.append(tune.fingerprint(config, Checkpoint(config.model), artifact, {}, "cpu", "float32"))
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"sensitivities"}


def test_an_artifact_of_another_model(tmp_path):
    small_artifact().save(tmp_path / "artifact")
    done = invoke(tune.main, *options(tmp_path / "artifact", max_kl="1"))
    assert done.exit_code == 1 and "calibrated for nobody/small-moe, another model" in done.output

"""Tuning: the arithmetic that combines layers, and the job, from its command to what a server may load."""

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoTokenizer

from calibration_jobs.measurements import Measurements
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.recommendation import LayerSetting, Outcome
from sere_dist.calibration.texts import read_texts, tokenise
from sere_dist.evaluation.lockstep import HeldOut, unchanged
from sere_dist.evaluation.outcome import outcome_of
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
    rerouter_of,
)
from sere_dist.method.projection import FIXED_POINT_ONE, primary_losses
from sere_dist.method.records import Settings, Step
from tests.conftest import MODEL, TEXTS, small_artifact

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


def test_evenly():
    assert evenly_spaced(3, 5, 10) == [3, 4, 5]
    assert (
        evenly_spaced(0, 53, 10)[0] == 0 and evenly_spaced(0, 53, 10)[-1] == 53 and len(evenly_spaced(0, 53, 10)) == 10
    )


def test_what_a_step_loses_is_what_the_policy_weighs(model, heldout_ids, projection_path):
    """Against `projection.primary_losses`, and prices let through as many experts as they were chosen for."""
    artifact = Artifact.load(projection_path)
    held_out = HeldOut(model, heldout_ids[:4, :40], 20)
    losses = losses_of_steps(held_out, 4, artifact.tables)
    expected = {layer: [] for layer in losses}

    def look(layer, weights_DBK, ids_DBK, _scores):
        for weights_BK, ids_BK in zip(weights_DBK, ids_DBK, strict=True):
            all_E = primary_losses(Step(weights_BK, ids_BK), artifact.tables[layer], Settings(1, expert_price=1e-6))
            few = all_E[(all_E > 0) & (all_E < FIXED_POINT_ONE * 1000)]
            expected[layer].append(few.double() / FIXED_POINT_ONE)
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


SIZES = {"--num-samples": "6", "--length": "24", "--prompt-length": "12", "--batch": "3"}


def command(artifact: Path, *options: str, **sizes: str) -> list[str]:
    given = {"--model": str(MODEL), "--artifact": str(artifact), "--dataset": str(TEXTS / "heldout.parquet")}
    given |= SIZES | {f"--{name.replace('_', '-')}": value for name, value in sizes.items()}
    return [
        sys.executable,
        "-m",
        "calibration_jobs.tune",
        *(word for option in given.items() for word in option),
        *options,
    ]


def copied(artifact: Path, folder: Path) -> Path:
    return Path(shutil.copytree(artifact, folder / "artifact"))


@pytest.fixture(scope="module")
def tuned(cluster, projection_path, tmp_path_factory) -> tuple[Path, str]:
    """A tuned artifact, and what the command printed. One of its workers was killed on the way."""
    path = copied(projection_path, tmp_path_factory.mktemp("tuned"))
    environment = {**os.environ, **cluster.environment}
    process = subprocess.Popen(
        command(path, max_kl="0.05"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    measured, deadline = path.with_name("artifact.tuning.jsonl"), time.monotonic() + 120
    while not measured.exists() or len(measured.read_text().splitlines()) < 6:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    workers = [each for each in psutil.process_iter(["cmdline"]) if "ray::Evaluator" in " ".join(each.info["cmdline"])]
    workers[0].kill()
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    return path, printed


def texts() -> list[list[int]]:
    """The texts of the job, in the order in which it reads them."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return tokenise(read_texts(str(TEXTS / "heldout.parquet"), seed=0), tokenizer, 12, 24, distinct=True)


def test_what_is_recommended_costs_what_it_says_on_texts_that_had_no_say(model, tuned):
    path, printed = tuned
    artifact = Artifact.load(path)
    found, report = artifact.recommended, HeldOut(model, torch.tensor(texts()[1::2]), 12)
    assert (found.policy, found.batch, found.budget) == ("projection", 3, "a KL of at most 0.05 nats a token")
    rerouter = rerouter_of(artifact.tables, "projection", found.layers)
    for off, ours in zip(found.off, found.recommended, strict=True):
        as_it_is = report.run(unchanged, off.batch)
        assert off.active_experts == pytest.approx(as_it_is.active_experts, rel=1e-3)
        again = outcome_of(report.run(rerouter, ours.batch), as_it_is, ours.batch)
        assert ours.model_dump() == pytest.approx(again.model_dump(), rel=1e-2, abs=1e-6)
    assert [outcome.batch for outcome in found.off] == [1, 3, 4]
    assert found.at(found.off).batch == 3
    again = report.run(projection_rerouter(artifact.tables, Settings(2)), 3)
    assert found.uniform[2].kl == pytest.approx(again.divergence, rel=1e-2)
    assert found.uniform.keys() == set(range(1, 8))

    tuning = HeldOut(model, torch.tensor(texts()[0::2]), 12)
    assert found.tuned.kl == pytest.approx(tuning.run(rerouter, 3).divergence, rel=1e-2)
    assert found.tuned.kl + 2 * found.tuned.kl_error <= 0.05
    harder = [outcome for outcome in found.curve if outcome.active_experts < found.tuned.active_experts]
    assert harder and harder[0].kl + 2 * harder[0].kl_error > 0.05
    assert "lost a worker" in printed and "Serve it with policy: recommended" in printed
    assert len([line for line in printed.splitlines() if " -> " in line]) == 1


def test_another_budget_measures_little_again(cluster, tuned, tmp_path):
    path = copied(tuned[0], tmp_path)
    measured = path.with_name("artifact.tuning.jsonl")
    before = tuned[0].with_name("artifact.tuning.jsonl").read_text()
    measured.write_text(before + '["half a line", {"losses": [1.0]')
    (path / "notes.md").write_text("mine")
    sha256 = Artifact.load(path).config.tensors_sha256
    done = cluster.run(command(path, active_experts="9"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    after = measured.read_text()
    assert after.startswith(before) and "half a line" not in after and (path / "notes.md").read_text() == "mine"
    assert "single layers" not in done.stdout
    runs = [json.loads(json.loads(line)[0]) for line in after.removeprefix(before).splitlines()]
    assert all(len(run["layers"]) > 1 or run["texts"] == "report" for run in runs)
    artifact = Artifact.load(path)
    assert artifact.recommended.tuned.active_experts <= 9 and artifact.config.tensors_sha256 == sha256
    least = max(o.active_experts for o in artifact.recommended.curve if o.active_experts <= 9)
    assert artifact.recommended.tuned.active_experts == least

    done = cluster.run(command(path, active_experts="9", length="25"), capture_output=True, text=True)
    assert done.returncode == 1 and "holds measurements of another tuning (other: texts)" in done.stderr
    done = cluster.run(command(path, max_perplexity_rise="0.00001"), capture_output=True, text=True)
    assert done.returncode == 1 and "nothing fits the budget, a loss rise of at most 1e-05" in done.stderr
    assert Artifact.load(path).recommended == artifact.recommended


@pytest.mark.parametrize(
    ("options", "message"),
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
def test_wrong_options(projection_path, tmp_path, options, message):
    path = copied(projection_path, tmp_path)
    done = subprocess.run(command(path, **options), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["artifact"]


def test_an_artifact_of_another_model(tmp_path):
    small_artifact().save(tmp_path / "artifact")
    done = subprocess.run(command(tmp_path / "artifact", max_kl="1"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "calibrated for nobody/small-moe, another model" in done.stderr

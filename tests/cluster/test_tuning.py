"""Tuning on the cluster, from its command to what a server may load."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer

from calibration_jobs.trials import Trial
from examples.tiny_moe.data import HELDOUT, MODEL
from examples.tiny_moe.widen import widen
from sere_dist.artifact.folder import Artifact
from sere_dist.calibration.texts import read_texts, tokenise
from sere_dist.evaluation.lockstep import HeldOut, unchanged
from sere_dist.evaluation.outcome import outcome_of
from sere_dist.evaluation.rerouters import Estimating, projection_rerouter
from sere_dist.evaluation.tuning import rerouter_of
from sere_dist.method.records import Settings
from tests.soak.load import processes
from tests.support.polling import eventually
from tests.support.tuning import options

pytestmark = pytest.mark.slow


def command(artifact: Path, **sizes: str) -> list[str]:
    return [sys.executable, "-m", "calibration_jobs.tune", *options(artifact, **sizes)]


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
    measured = path.with_name("artifact.tuning.jsonl")
    eventually(lambda: process.poll() is not None or len(measured.read_text().splitlines()) >= 6)
    processes(cluster, "ray::Evaluator")[0].kill()
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return path, printed


def texts() -> list[list[int]]:
    """The texts of the job, in the order in which it reads them."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return tokenise(read_texts(str(HELDOUT), seed=0), tokenizer, 12, 24, distinct=True)


def test_what_is_recommended_costs_what_it_says_on_texts_that_had_no_say(model, tuned):
    path, printed = tuned
    artifact = Artifact.load(path)
    found, report = artifact.recommended, HeldOut(model, torch.tensor(texts()[1::2]), 12)
    assert (found.policy, found.batch, found.budget) == ("projection", 3, "a KL of at most 0.05 nats a token")
    rerouter = rerouter_of(artifact.tables, "projection", found.layers)
    for off, ours in zip(found.off, found.recommended, strict=True):
        as_it_is = report.run(unchanged, off.batch)
        assert off.active_experts == pytest.approx(as_it_is.active_experts, rel=1e-3)
        estimating = Estimating(rerouter, artifact.tables)
        result = report.run(estimating, ours.batch)
        again = outcome_of(replace(result, estimated_error=estimating.error), as_it_is, ours.batch)
        assert ours.model_dump() == pytest.approx(again.model_dump(), rel=1e-2, abs=1e-6)
    assert [outcome.batch for outcome in found.off] == [1, 3, 4]
    estimate = found.kl_estimate
    assert estimate is not None and estimate.layers == len(artifact.layers)
    inside = found.tuned.kl / estimate.of(found.tuned.estimated_error, rows=estimate.layers)
    assert 1 / estimate.spread**3 < inside < estimate.spread**3
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


def test_a_dry_run_writes_nothing(cluster, projection_path):
    before = sorted(projection_path.parent.iterdir())
    done = cluster.run([*command(projection_path, max_kl="1"), "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0 and "up to 90, of 6 texts of 24 tokens" in done.stdout
    assert sorted(projection_path.parent.iterdir()) == before


def test_a_model_that_no_worker_holds(cluster, model, projection_path, tmp_path):
    """Each worker may take 160 MB; the model, which computes what the example model does, has 235 MB of weights."""
    path, wide = copied(projection_path, tmp_path), sharded(widen(MODEL, tmp_path / "wide", 192))
    hook = '{"worker_process_setup_hook": "tests.support.memory_limit.limit", "excludes": [".git"]}'
    submit = ["ray", "job", "submit", "--log-style=record", "--log-color=false", "--working-dir", "."]
    submit += ["--runtime-env-json", hook, "--", "python", "-m", "calibration_jobs.tune"]

    def run(*more: str, **sizes: str) -> subprocess.CompletedProcess:
        given = options(path, model=str(wide), max_kl="0.05", **sizes)
        return cluster.run([*submit, *given, *more], capture_output=True, text=True)

    done = run()
    assert done.returncode == 1 and re.search("allocate memory|MemoryError", done.stdout), done.stdout + done.stderr
    done = run(memory_per_task="0.2")
    assert done.returncode == 1 and "the model takes 0.236 GB: give each worker more, or tune --by" in done.stdout
    done = run("--by-layers", memory_per_task="0.2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "single layers: 18 of 54, about" in done.stdout

    artifact, ids = Artifact.load(path), torch.tensor(texts())
    whole = {name: HeldOut(model, ids[start::2], 12) for start, name in enumerate(("tuning", "report"))}
    _fingerprint, *lines = path.with_name("artifact.tuning.jsonl").read_text().splitlines()
    measured = dict(map(json.loads, lines))
    del measured['{"candidates": 3}']
    assert len(measured) > 70
    for key, value in measured.items():
        trial = Trial.model_validate_json(key)
        estimating = Estimating(rerouter_of(artifact.tables, "projection", trial.layers), artifact.tables)
        expected = whole[trial.texts].run(estimating, trial.batch)
        assert (value["tokens"], value["steps"]) == (expected.tokens, expected.steps)
        assert value["losses"] == pytest.approx(expected.losses, rel=1e-3)
        assert value["divergences"] == pytest.approx(expected.divergences, rel=1e-2, abs=1e-4)
        assert value["active_sum"] == pytest.approx(expected.active_sum, rel=1e-3)
        assert value["estimated_error"] == pytest.approx(estimating.error, rel=1e-2)
    assert artifact.recommended.tuned.kl + 2 * artifact.recommended.tuned.kl_error <= 0.05


def sharded(model: Path) -> Path:
    """The model in files of 8 MB, as large models come in many: a file is mapped whole, which counts."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_torch_state_dict(weights, model, max_shard_size=8 * 10**6)
    return model

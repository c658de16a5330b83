"""The calibration as a job on the cluster, from its command to its artifact."""

import re
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DeepseekV2Config

from examples.tiny_moe.data import CALIBRATION, MODEL
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.sources import services
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.sensitivity import layer_sensitivities
from sere_dist.method.similarity import expert_projection, expert_similarity
from sere_dist.moe import MoeShape
from sere_dist.testing.local_cluster import LocalCluster
from tests.support.direct import calibration_texts, direct


def job(cluster: LocalCluster, *options: str) -> str:
    """Runs the calibration's command on the cluster, with few workers that start; returns what it printed."""
    command = [sys.executable, "-m", "calibration_jobs.calibrate", *options, "--cpus-per-task", "4"]
    done = cluster.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def projection_job(cluster, tmp_path_factory) -> tuple[Path, str]:
    """An artifact of method projection, from few texts, and what the job that wrote it printed."""
    folder = tmp_path_factory.mktemp("projection")
    settings = folder / "calibration.yaml"
    settings.write_text(f"model: {MODEL}\ndataset: {CALIBRATION}\nnum_samples: 999\nmax_length: 32\n")
    printed = job(
        cluster,
        *("--config", str(settings), "--num-samples", "12", "--min-length", "8", "--max-tokens", "300"),
        *("--method", "projection", "--output", str(folder / "artifact"), "--min-tokens-per-expert", "20"),
    )
    return folder / "artifact", printed


def test_the_job_gives_the_similarity_of_the_experts_outputs(job_artifact, model):
    artifact = Artifact.load(job_artifact)
    settings = artifact.settings
    texts = calibration_texts(settings["num_samples"], settings["max_length"])
    expected = direct(model, texts)
    assert artifact.layers.keys() == expected.keys() == set(range(model.config.num_hidden_layers))
    for layer, (outputs_ENH, weights_NE) in expected.items():
        found = artifact.layers[layer]
        assert (found.similarity_EE - expert_similarity(outputs_ENH)).abs().max() < 1e-5
        torch.testing.assert_close(found.coactivation_EE, weights_NE.T @ weights_NE, rtol=1e-4, atol=1e-3)
        assert found.tokens_E.equal((weights_NE > 0).sum(dim=0))


def test_the_job_says_what_it_did(job_artifact):
    artifact = Artifact.load(job_artifact)
    config = artifact.config
    assert config.shape == MoeShape.from_config(AutoConfig.from_pretrained(MODEL))
    assert config.num_tokens == 64 * 128 and config.method == "frobenius"
    rows = [layer.statistics for layer in artifact.layers.values()]
    assert [row.layer for row in rows] == list(range(config.num_layers))
    assert all(row.seconds > 0 and 0 <= row.similarity_min <= row.similarity_max <= 1 for row in rows)
    assert all(0 < row.similarity_error < 0.1 and 0 < row.same_substitute < row.substitute_kept <= 1 for row in rows)
    card = (job_artifact / "README.md").read_text()
    assert f"# Expert similarities of {MODEL.name}" in card and config.base_model not in card, "a machine's path"
    assert not job_artifact.with_name("tiny-moe-sere.partial").exists()


@pytest.mark.slow
def test_projection_from_a_file_and_flags(projection_job, model):
    path, printed = projection_job
    artifact = Artifact.load(path)
    texts = calibration_texts(12, 32, min_length=8, max_tokens=300)
    assert artifact.config.num_tokens == sum(map(len, texts)) <= 300, "a flag did not win over the file"
    for layer, (outputs_ENH, weights_NE) in direct(model, texts).items():
        expected, found = expert_projection(outputs_ENH, weights_NE), artifact.layers[layer]
        tables = (found.similarity_EE, found.coefficient_EE, found.size_E, torch.tensor(found.statistics.mean_square))
        for ours, theirs in zip(tables, expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    statistics = [layer.statistics for layer in artifact.layers.values()]
    assert sum(row.sensitivity for row in statistics) / len(statistics) == pytest.approx(1)
    assert all(0 < row.sensitivity_error < row.sensitivity for row in statistics)
    in_process = layer_sensitivities(Checkpoint(str(MODEL)), texts[: artifact.settings["sensitivity_samples"]])
    costs = [in_process[row.layer].nats * row.mean_square for row in statistics]
    assert artifact.config.nats_per_error == pytest.approx(sum(costs) / len(costs), rel=1e-3)
    assert [row.sensitivity for row in statistics] == pytest.approx(
        [cost / artifact.config.nats_per_error for cost in costs], rel=1e-3
    )
    few = {layer: int((found.tokens_E < 20).sum()) for layer, found in artifact.layers.items()}
    warned = {int(layer): int(count) for layer, count in re.findall(r"layer (\d): (\d+) experts? got fewer", printed)}
    assert warned == {layer: count for layer, count in few.items() if count}


@pytest.mark.slow
def test_a_mixture_says_how_well_each_source_is_served(cluster, tmp_path):
    """Two kinds of the example texts, of which one has most of the weight."""
    table, sources = pq.read_table(CALIBRATION), {"manual": 3, "scripture": 1}
    for kind in sources:
        pq.write_table(table.filter(pc.equal(table["kind"], kind)), tmp_path / f"{kind}.parquet")
    mixture = [{"dataset": f"{tmp_path}/{kind}.parquet", "weight": weight} for kind, weight in sources.items()]
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    options = "--model", str(MODEL), "--mixture", str(tmp_path / "mixture.yaml"), "--output", str(tmp_path / "out")
    printed = job(cluster, *options, "--num-samples", "32", "--max-length", "16")
    layers = Artifact.load(tmp_path / "out").layers
    assert len(layers) == 6
    served = services(row for layer in layers.values() for row in layer.sources)
    assert [(each.source, each.tokens) for each in served] == [
        (f"{tmp_path}/manual.parquet", 24 * 16),
        (f"{tmp_path}/scripture.parquet", 8 * 16),
    ]
    assert all(0 < each.substitute_kept < 1 and 0 < each.own_kept < 1 for each in served)
    heavy, light = served
    assert heavy.substitute_kept - heavy.own_kept > light.substitute_kept - light.own_kept
    for each in served:
        assert " ".join(each.cells()[1:]) in " ".join(printed.split())


@pytest.mark.slow
def test_low_coverage_stops_the_job_and_keeps_what_it_finished(cluster, tmp_path):
    """The same command stops again, at once; with `warn` it goes on from the layers that are finished."""
    command = [sys.executable, "-m", "calibration_jobs.calibrate", "--model", str(MODEL), "--cpus-per-task", "4"]
    command += ["--dataset", str(CALIBRATION), "--output", str(tmp_path / "out")]
    command += ["--num-samples", "4", "--max-length", "16", "--on-low-coverage"]
    for _ in range(2):
        done = cluster.run([*command, "stop"], capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert re.search(r"error: layer \d: \d+ experts? got fewer than 32 tokens: .*texts of other kinds", done.stderr)
        assert "from the layers that are finished" in done.stderr and not (tmp_path / "out").exists()
        kept = list((tmp_path / "out.partial").glob("layer-*.safetensors"))
        assert len(kept) == 1
    assert "1 of 6 layers are finished already" in done.stdout and "scored" not in done.stdout
    printed = job(cluster, *command[3:], "warn")
    assert "1 of 6 layers are finished already" in printed
    assert len(re.findall(r"layer \d: \d+ experts? got fewer", printed)) == 6
    assert "substitutes chosen on half of the texts" in printed
    assert len(Artifact.load(tmp_path / "out").layers) == 6


@pytest.mark.slow
def test_a_model_whose_first_layer_is_dense(cluster, tmp_path):
    sizes = dict(hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_attention_heads=2)
    attention = dict(kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16)
    experts = dict(n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1)
    config = DeepseekV2Config(
        vocab_size=4096, num_hidden_layers=3, num_key_value_heads=2, **sizes, **attention, **experts
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "model")
    options = (
        "--model",
        str(tmp_path / "model"),
        "--dataset",
        str(CALIBRATION),
        "--output",
        str(tmp_path / "out"),
    )
    printed = job(cluster, *options, "--num-samples", "4", "--max-length", "16")
    assert "3, of which 2 MoE: 8 experts, 2 per token" in printed
    assert list(Artifact.load(tmp_path / "out").layers) == [1, 2]


@pytest.mark.slow
def test_a_method_without_data_reads_none(cluster, tmp_path):
    """Not even the default dataset, which is on the Hub."""
    command = "--model", str(MODEL), "--method", "weights", "--output", str(tmp_path / "out")
    job(cluster, *command)
    artifact = Artifact.load(tmp_path / "out")
    assert artifact.config.dataset is None and all(layer.tokens_E is None for layer in artifact.layers.values())
    # An attempt that was killed after its last step is tried again, and finds what it wrote.
    assert "this calibration has finished before" in job(cluster, *command)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_dry_run_asks_the_cluster_that_is_up(cluster, tmp_path):
    printed = job(cluster, "--model", str(MODEL), "--output", str(tmp_path / "out"), "--dry-run")
    assert "(1 node)" in printed and not (tmp_path / "out").exists()


def test_an_error_in_a_task_is_told_plainly(cluster, tmp_path):
    """The configuration calls for more layers than the checkpoint has: a forward task finds out."""
    config = AutoConfig.from_pretrained(MODEL)
    config.num_hidden_layers = 7
    config.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").symlink_to(MODEL / "model.safetensors")
    command = [sys.executable, "-m", "calibration_jobs.calibrate", "--model", str(tmp_path / "model")]
    command += ["--dataset", str(CALIBRATION), "--num-samples", "2", "--output", str(tmp_path / "out")]
    command += ["--cpus-per-task", "4"]
    done = cluster.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: --model" in done.stderr and "has nothing for model.layers.6." in done.stderr
    assert "Traceback" not in done.stderr

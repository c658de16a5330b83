import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DeepseekV2Config, LlamaConfig

from calibration_jobs.calibrate import CalibrationConfig, calibrate
from calibration_jobs.job import RAY_WORKING_DIR, refuse_lost_output
from sere_dist.artifact.folder import Artifact
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import expert_inputs, run_layer, score_layer, text_blocks
from sere_dist.calibration.memory import with_halving
from sere_dist.calibration.texts import read_texts, tokenise
from sere_dist.method.similarity import expert_projection, expert_similarity, random_similarity, weight_similarity
from sere_dist.moe import MoeShape, hooked_experts
from tests.conftest import MODEL, TEXTS, job

CALIBRATION_TEXTS = TEXTS / "calibration.parquet"


def run(*options: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs the job's command as a user would, outside Ray; everything tested this way stops before Ray starts."""
    command = [sys.executable, "-m", "calibration_jobs.calibrate", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def ragged(count: int, lengths: tuple[int, ...]) -> list[list[int]]:
    """Calibration texts of differing lengths, as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenise(read_texts(str(CALIBRATION_TEXTS)), tokenizer, count, max(lengths))
    return [text[: lengths[i % len(lengths)]] for i, text in enumerate(ids)]


def direct(model, texts: list[list[int]]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Returns, by layer, the outputs [E, N, H] of every expert and the routing weights [N, E], from the weights alone.

    One text at a time through the whole model, without our streaming, padding or scoring.
    """
    captured: dict[int, list] = {}
    with torch.no_grad(), hooked_experts(model, lambda layer, routing: captured.setdefault(layer, []).append(routing)):
        for text in texts:
            model(torch.tensor([text]))
    results = {}
    for layer, routings in captured.items():
        hidden_NH, index_NK, weights_NK = (torch.cat(parts) for parts in zip(*routings, strict=True))
        experts = model.model.layers[layer].mlp.experts
        with torch.no_grad():
            gate, up = torch.einsum("nh,eih->eni", hidden_NH, experts.gate_up_proj).chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
            outputs_ENH = torch.einsum("eni,ehi->enh", inner, experts.down_proj)
        weights_NE = torch.zeros(len(hidden_NH), experts.num_experts).scatter(1, index_NK, weights_NK.float())
        results[layer] = outputs_ENH, weights_NE
    return results


def test_the_job_gives_the_similarity_of_the_experts_outputs(artifact_path, model):
    artifact = Artifact.load(artifact_path)
    settings = artifact.settings
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = tokenise(read_texts(str(CALIBRATION_TEXTS)), tokenizer, settings["num_samples"], settings["max_length"])
    expected = direct(model, texts)
    assert artifact.layers.keys() == expected.keys() == set(range(model.config.num_hidden_layers))
    for layer, (outputs_ENH, weights_NE) in expected.items():
        found = artifact.layers[layer]
        assert (found.similarity_EE - expert_similarity(outputs_ENH)).abs().max() < 1e-5
        torch.testing.assert_close(found.coactivation_EE, weights_NE.T @ weights_NE, rtol=1e-4, atol=1e-3)
        assert found.tokens_E.equal((weights_NE > 0).sum(dim=0))


@pytest.mark.parametrize("method", ["frobenius", "cosine", "cka", "projection"])
def test_streamed_layers_and_padded_blocks_are_exact(model, method):
    """Texts of five lengths, in blocks that pad them; the other side never pads."""
    texts = ragged(20, (32, 9, 25, 32, 2))
    blocks = text_blocks(texts, tokens_a_block=100)
    assert len(blocks) > 3 and any(len(set(block.lengths_B)) > 1 for block in blocks)
    expected = direct(model, sorted(texts, key=len, reverse=True))
    checkpoint = Checkpoint(str(MODEL))
    for layer, inputs in expert_inputs(checkpoint, blocks):
        outputs_ENH, weights_NE = expected[layer]
        assert sum(len(block.hidden_states_NH) for block in inputs) == sum(map(len, texts))
        if layer not in (0, 5):
            continue
        result = score_layer(checkpoint, layer, inputs, method, "polynomial", block_tokens=64)
        assert result.tokens_E.tolist() == (weights_NE > 0).sum(dim=0).tolist()
        if method == "projection":
            found = (result.similarity_EE, result.coefficient_EE, result.size_E)
            for ours, theirs in zip(found, expert_projection(outputs_ENH, weights_NE), strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        else:
            assert result.coefficient_EE is None and result.size_E is None
            theirs = expert_similarity(outputs_ENH, method, "polynomial")
            assert (result.similarity_EE - theirs).abs().max() < 1e-4


def test_blocks_hold_each_text_once():
    texts = ragged(7, (12, 3, 30))
    blocks = text_blocks(texts, tokens_a_block=64)
    unpadded = [ids[:n].tolist() for block in blocks for ids, n in zip(block.ids_BL, block.lengths_B, strict=True)]
    assert sorted(unpadded) == sorted(texts)
    assert all(block.ids_BL.size <= 64 for block in blocks)
    assert text_blocks([]) == []


def test_methods_without_data(model):
    checkpoint, experts = Checkpoint(str(MODEL)), model.model.layers[2].mlp.experts
    weights = score_layer(checkpoint, 2, [], "weights")
    assert torch.allclose(weights.similarity_EE, weight_similarity(experts.parameters()), atol=1e-6)
    assert weights.tokens_E is None and weights.statistics.tokens_per_expert_min is None
    random = [score_layer(checkpoint, layer, [], "random", seed=3).similarity_EE for layer in (1, 2)]
    assert torch.equal(random[1], random_similarity(64, 3 + 2)) and not torch.equal(*random)


def test_memory_that_runs_out_halves_the_block():
    tried = []

    def compute(size: int) -> str:
        tried.append(size)
        if size > 3:
            torch.empty(2**60)  # the allocator itself refuses
        return "done"

    assert with_halving(100, compute, "a test") == ("done", 3)
    assert tried == [100, 50, 25, 12, 6, 3]
    with pytest.raises(MemoryError, match=r"a test does not fit .* --memory-per-task .*--device cpu"):
        with_halving(4, lambda _size: torch.empty(2**60), "a test")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # another error is not taken for it
        with_halving(4, lambda _size: torch.ones(2, 3) @ torch.ones(2, 3), "a test")


def test_a_forward_pass_takes_fewer_texts_when_memory_runs_out(model):
    """The first two times that a layer is called, its memory runs out: the states are the same."""
    checkpoint, blocks = Checkpoint(str(MODEL)), text_blocks(ragged(6, (16,)))
    ((whole, inputs),) = run_layer(checkpoint, 0, blocks, None)
    failures = iter([True, True])

    def fail(*_arguments) -> None:
        if next(failures, False):
            torch.empty(2**60)  # the allocator itself refuses

    class Cramped(Checkpoint):
        def empty_model(self):
            model = super().empty_model()
            model.model.layers[0].register_forward_pre_hook(fail)
            return model

    ((pieces, pieces_inputs),) = run_layer(Cramped(str(MODEL)), 0, blocks, None)
    assert next(failures, None) is None
    assert np.allclose(whole, pieces, atol=1e-5)
    assert np.array_equal(inputs.top_k_index_NK, pieces_inputs.top_k_index_NK)


def test_the_job_says_what_it_did(artifact_path):
    artifact = Artifact.load(artifact_path)
    config = artifact.config
    assert config.shape == MoeShape.from_config(AutoConfig.from_pretrained(MODEL))
    assert config.num_tokens == 64 * 128 and config.method == "frobenius"
    rows = [layer.statistics for layer in artifact.layers.values()]
    assert [row.layer for row in rows] == list(range(config.num_layers))
    assert all(row.seconds > 0 and 0 <= row.similarity_min <= row.similarity_max <= 1 for row in rows)
    assert config.base_model in (artifact_path / "README.md").read_text()
    assert not artifact_path.with_name("tiny-moe-sere.partial").exists()


def test_projection_from_a_file_and_flags(projection_job, model):
    path, printed = projection_job
    artifact = Artifact.load(path)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = tokenise(read_texts(str(CALIBRATION_TEXTS)), tokenizer, 12, 32, min_length=8, max_tokens=300)
    assert artifact.config.num_tokens == sum(map(len, texts)) <= 300, "a flag did not win over the file"
    for layer, (outputs_ENH, weights_NE) in direct(model, texts).items():
        expected = expert_projection(outputs_ENH, weights_NE)
        for ours, theirs in zip(artifact.layers[layer].tables, expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    few = {layer: int((found.tokens_E < 20).sum()) for layer, found in artifact.layers.items()}
    warned = {int(layer): int(count) for layer, count in re.findall(r"layer (\d): (\d+) experts got fewer", printed)}
    assert warned == {layer: count for layer, count in few.items() if count}


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
        str(CALIBRATION_TEXTS),
        "--output",
        str(tmp_path / "out"),
    )
    printed = job(cluster, *options, "--num-samples", "4", "--max-length", "16")
    assert "3, of which 2 MoE: 8 experts, 2 a token" in printed
    assert list(Artifact.load(tmp_path / "out").layers) == [1, 2]


def test_a_method_without_data_reads_none(cluster, tmp_path):
    """Not even the default dataset, which is on the Hub."""
    job(cluster, "--model", str(MODEL), "--method", "weights", "--output", str(tmp_path / "out"))
    artifact = Artifact.load(tmp_path / "out")
    assert artifact.config.dataset is None and all(layer.tokens_E is None for layer in artifact.layers.values())


def test_an_error_in_a_task_is_told_plainly(cluster, tmp_path):
    """The configuration calls for more layers than the checkpoint has: a forward task finds out."""
    config = AutoConfig.from_pretrained(MODEL)
    config.num_hidden_layers = 7
    config.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").symlink_to(MODEL / "model.safetensors")
    command = [sys.executable, "-m", "calibration_jobs.calibrate", "--model", str(tmp_path / "model")]
    command += ["--dataset", str(CALIBRATION_TEXTS), "--num-samples", "2", "--output", str(tmp_path / "out")]
    done = cluster.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: --model" in done.stderr and "has nothing for model.layers.6." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_prints_the_plan_and_starts_nothing(tmp_path):
    done = run("--model", str(MODEL), "--output", str(tmp_path / "out"), "--dry-run", "--num-samples", "100")
    assert done.returncode == 0, done.stderr
    assert "6, of which 6 MoE: 64 experts, 8 a token" in done.stdout and "12,800" in done.stdout
    assert "(no cluster)" in done.stdout
    assert os.listdir(tmp_path) == []


def write_parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_a_model_without_experts(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    done = run("--model", str(tmp_path), "--dataset", str(CALIBRATION_TEXTS), "--output", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "error: llama has no routed experts" in done.stderr and "Traceback" not in done.stderr


def test_a_model_that_is_not_there(tmp_path):
    nowhere = tmp_path / "nowhere"
    done = run("--model", str(nowhere), "--dataset", str(CALIBRATION_TEXTS), "--output", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "error: " in done.stderr and str(nowhere) in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "o", "--dataset", "d"], "--model: Field required"),
        (["--model", "m", "--output", "o", "--dataset", "d", "--method", "frob"], "--method: Input should be"),
        (["--model", "m", "--output", "o", "--dataset", "d", "--num-samples", "0"], "--num-samples: Input should be"),
    ],
)
def test_bad_options_are_named(options, message):
    done = run(*options)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_an_output_that_is_there_stops_the_job_before_any_work(artifact_path, tmp_path):
    done = run("--model", str(MODEL), "--dataset", str(CALIBRATION_TEXTS), "--output", str(artifact_path))
    assert done.returncode == 1 and "--overwrite" in done.stderr and "Traceback" not in done.stderr
    Artifact.load(artifact_path)


def test_an_unknown_key_in_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("modle: typo\n")
    done = run("--config", str(tmp_path / "c.yaml"), "--model", "m", "--output", "o", "--dataset", "d")
    assert done.returncode == 1 and "--modle: Extra inputs are not permitted" in done.stderr


def test_a_failing_calibration_writes_nothing(tmp_path):
    short = write_parquet(tmp_path / "short.parquet", text=["a few words"])
    with pytest.raises(ValueError, match="no usable text"):
        calibrate(CalibrationConfig(model=str(MODEL), output=tmp_path / "out", dataset=str(short)))
    assert os.listdir(tmp_path) == ["short.parquet"]


def test_a_relative_output_inside_a_jobs_working_directory(tmp_path, monkeypatch):
    working = tmp_path / RAY_WORKING_DIR / "package"
    working.mkdir(parents=True)
    monkeypatch.chdir(working)
    with pytest.raises(ValueError, match="absolute path"):
        refuse_lost_output(Path("out"))
    refuse_lost_output(tmp_path / "out")

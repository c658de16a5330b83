import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from calibration_jobs.calibrate import RAY_WORKING_DIR, CalibrationConfig, calibrate, refuse_lost_output
from sere_dist.artifact import Artifact
from sere_dist.calibration import read_texts, tokenise
from sere_dist.moe import MoeShape
from sere_dist.similarity import expert_similarity
from tests.conftest import MODEL, TEXTS

CALIBRATION_TEXTS = TEXTS / "calibration.parquet"


def run(*options: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs the job's command as a user would, outside Ray; everything tested this way stops before Ray starts."""
    command = [sys.executable, "-m", "calibration_jobs.calibrate", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def direct_expert_outputs(model, ids_BL: torch.Tensor) -> dict[int, torch.Tensor]:
    """Returns the outputs [E, N, H] of every expert of every layer, from the weights alone, without our code."""
    captured = {}
    handles = [
        block.mlp.register_forward_pre_hook(
            lambda _module, arguments, layer=layer: captured.update({layer: arguments[0].flatten(0, 1)})
        )
        for layer, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(ids_BL)
    for handle in handles:
        handle.remove()
    outputs = {}
    for layer, hidden_NH in captured.items():
        experts = model.model.layers[layer].mlp.experts
        with torch.no_grad():
            gate, up = torch.einsum("nh,eih->eni", hidden_NH, experts.gate_up_proj).chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
            outputs[layer] = torch.einsum("eni,ehi->enh", inner, experts.down_proj)
    return outputs


def test_the_job_gives_the_similarity_of_the_experts_outputs(artifact_path, model):
    artifact = Artifact.load(artifact_path)
    settings = artifact.settings
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenise(read_texts(CALIBRATION_TEXTS), tokenizer, settings["num_samples"], settings["max_length"])
    outputs = direct_expert_outputs(model, ids)
    assert artifact.similarity.keys() == outputs.keys() == set(range(model.config.num_hidden_layers))
    for layer, outputs_ENH in outputs.items():
        assert (artifact.similarity[layer] - expert_similarity(outputs_ENH)).abs().max() < 1e-4


def test_the_job_says_what_it_did(artifact_path):
    artifact = Artifact.load(artifact_path)
    config = artifact.config
    assert config.shape == MoeShape.from_config(AutoConfig.from_pretrained(MODEL))
    assert config.num_tokens == 64 * 128 and config.method == "frobenius"
    assert [row.layer for row in artifact.layers] == list(range(config.num_layers))
    assert all(row.seconds > 0 and 0 <= row.similarity_min <= row.similarity_max <= 1 for row in artifact.layers)
    assert config.base_model in (artifact_path / "README.md").read_text()


@pytest.mark.parametrize(("method", "kernel"), [("cosine", "linear"), ("cka", "rbf")])
def test_other_methods_from_a_file_and_flags(cluster, model, tmp_path, method, kernel):
    settings = tmp_path / "calibration.yaml"
    settings.write_text(f"model: {MODEL}\ndataset: {CALIBRATION_TEXTS}\nnum_samples: 999\nmax_length: 32\n")
    command = [sys.executable, "-m", "calibration_jobs.calibrate", "--config", str(settings), "--num-samples", "4"]
    command += ["--method", method, "--kernel", kernel, "--output", str(tmp_path / "out")]
    done = cluster.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    artifact = Artifact.load(tmp_path / "out")
    assert artifact.config.num_tokens == 4 * 32, "a flag did not win over the file"
    ids = tokenise(read_texts(CALIBRATION_TEXTS), AutoTokenizer.from_pretrained(MODEL), 4, 32)
    for layer, outputs_ENH in direct_expert_outputs(model, ids).items():
        assert (artifact.similarity[layer] - expert_similarity(outputs_ENH, method, kernel)).abs().max() < 1e-4


def test_a_killed_job_leaves_nothing(cluster, tmp_path):
    """Killed between layers; test_artifact kills one that is writing."""
    command = [sys.executable, "-m", "calibration_jobs.calibrate", "--model", str(MODEL), "--num-samples", "32"]
    command += ["--dataset", str(CALIBRATION_TEXTS), "--output", str(tmp_path / "out")]
    job = subprocess.Popen(command, env=cluster.environment, stdout=subprocess.PIPE, text=True)
    for line in job.stdout:
        if "scored (1/" in line:
            break
    job.send_signal(signal.SIGKILL)
    job.wait()
    time.sleep(1)
    assert os.listdir(tmp_path) == []


def test_texts_are_cut_and_short_ones_left_out():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [
        "too short",
        "In the beginning God created the heaven and the earth.",
        "",
        "And the earth was without form",
    ]
    ids = tokenise(iter(texts), tokenizer, num_samples=5, max_length=6)
    assert ids.tolist() == [tokenizer(texts[1])["input_ids"][:6], tokenizer(texts[3])["input_ids"][:6]]


def write_parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_bad_datasets(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_texts(tmp_path / "nowhere.parquet")
    with pytest.raises(ValueError, match=r"no column 'text'.*body"):
        read_texts(write_parquet(tmp_path / "other.parquet", body=["a"]))
    (tmp_path / "not.parquet").write_text("text\nhello\n")
    with pytest.raises(ValueError, match="not readable as Parquet"):
        read_texts(tmp_path / "not.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.parquet file"):
        read_texts(tmp_path / "empty")
    short = write_parquet(tmp_path / "short.parquet", text=["a few words", None, ""])
    with pytest.raises(ValueError, match=r"no usable text.*--max-length is 128"):
        tokenise(read_texts(short), AutoTokenizer.from_pretrained(MODEL), 4, 128)


def test_a_folder_of_parquet_files(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=["one"], kind=["x"])
    write_parquet(tmp_path / "b.parquet", text=["two"], kind=["y"])
    assert list(read_texts(tmp_path)) == ["one", "two"]
    write_parquet(tmp_path / "c.parquet", body=["three"])
    with pytest.raises(ValueError, match=r"c\.parquet: no column 'text'"):
        read_texts(tmp_path)


@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [b"a"]])
def test_a_text_column_of_something_else(tmp_path, values):
    with pytest.raises(ValueError, match=r"the column 'text' holds .*, not strings"):
        read_texts(write_parquet(tmp_path / "other.parquet", text=values))


def test_a_file_without_rows(tmp_path):
    empty = write_parquet(tmp_path / "none.parquet", text=pa.array([], pa.string()))
    with pytest.raises(ValueError, match="no usable text: the longest of 0"):
        tokenise(read_texts(empty), AutoTokenizer.from_pretrained(MODEL), 4, 128)


def test_cka_of_too_many_tokens_is_refused_before_any_work(tmp_path):
    done = run(
        *("--model", str(MODEL), "--dataset", str(CALIBRATION_TEXTS), "--output", str(tmp_path / "out")),
        *("--method", "cka", "--num-samples", "400"),
    )
    assert done.returncode == 1 and "lower --num-samples or --max-length" in done.stderr
    assert "Traceback" not in done.stderr


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
        calibrate(CalibrationConfig(model=str(MODEL), output=tmp_path / "out", dataset=short))
    assert os.listdir(tmp_path) == ["short.parquet"]


def test_a_relative_output_inside_a_jobs_working_directory(tmp_path, monkeypatch):
    working = tmp_path / RAY_WORKING_DIR / "package"
    working.mkdir(parents=True)
    monkeypatch.chdir(working)
    with pytest.raises(ValueError, match="absolute path"):
        refuse_lost_output(Path("out"))
    refuse_lost_output(tmp_path / "out")

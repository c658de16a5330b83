"""The settings of the Ray jobs, their help, which is made from them, and the texts that they name."""

import json
import re
from pathlib import Path

import pytest
import typer
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from calibration_jobs import calibrate, tune
from calibration_jobs.calibrate import CalibrationConfig
from calibration_jobs.job import in_shares
from examples.tiny_moe.data import MODEL
from sere_dist.calibration.checkpoint import Checkpoint


@pytest.mark.parametrize("job", [calibrate, tune])
def test_help_names_types_defaults_and_what_is_required(job):
    app = typer.Typer(add_completion=False)
    app.command()(job.main)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "240"}).output
    lines = {found[1]: found[0] for found in re.finditer(r"│ --([a-z-]+) .*", shown)}
    required = {"model", "artifact", "batch"} if job is tune else {"model", "output"}
    assert {name for name, line in lines.items() if "[required]" in line} == required
    for name, kind, default in (
        ("num-samples", "<int>", "64" if job is tune else "400"),
        ("gpus-per-task", "<float>", None),
        ("device", "<auto|cpu|cuda>", "auto"),
        ("artifact" if job is tune else "output", "<path>", None),
        ("seed", "<int>", "0" if job is tune else None),
    ):
        assert f" {kind} " in lines[name]
        assert (f"[default: {default}]" in lines[name]) if default else ("[default" not in lines[name])


def texts_file(folder: Path, name: str, count: int) -> str:
    """Writes texts that begin with `name`; returns the file's path."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"body": f"{name} {number} and more words"}) + "\n" for number in range(count)))
    return str(path)


def config_of(folder: Path, **options) -> CalibrationConfig:
    return CalibrationConfig.model_validate({"model": str(MODEL), "output": folder / "artifact"} | options)


def test_a_mixture_takes_each_datasets_share(tmp_path):
    """In any order that batches or halves are cut by, both datasets are there."""
    mixture = [
        {"dataset": texts_file(tmp_path, "chat", 40), "column": "body", "weight": 3},
        {"dataset": texts_file(tmp_path, "code", 40), "column": "body"},
    ]
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump(mixture))
    config = config_of(tmp_path, mixture=str(file))
    assert config.dataset_name == f"{tmp_path}/chat.jsonl (75%), {tmp_path}/code.jsonl (25%)"
    checkpoint, tokenizer = Checkpoint(str(MODEL)), AutoTokenizer.from_pretrained(MODEL)
    ids, sources = config.read_token_ids(checkpoint, None, 32, 4)
    assert config.source_names == [f"{tmp_path}/chat.jsonl", f"{tmp_path}/code.jsonl"]
    names = [tokenizer.decode(of_text).split()[0] for of_text in ids]
    for part in (names, names[:16], names[16:], names[0::2], names[1::2]):
        assert part.count("chat") == 3 * part.count("code") > 0
    assert config_of(tmp_path, mixture=mixture).read_token_ids(checkpoint, None, 32, 4) == (ids, sources)
    assert len(config.read_token_ids(checkpoint, None, 32, 4, max_tokens=64)[0]) == 16
    assert sources == [f"{tmp_path}/{name}.jsonl" for name in names]


def test_sources_of_the_same_dataset_have_names_of_their_own(tmp_path):
    mixture = [{"dataset": "chats", "column": "body"}, {"dataset": "chats", "subset": "new"}, {"dataset": "code"}]
    assert config_of(tmp_path, mixture=mixture).source_names == ["chats train body", "chats new train text", "code"]


def test_one_dataset_keeps_its_order(tmp_path):
    config = config_of(tmp_path, dataset=texts_file(tmp_path, "chat", 9), column="body")
    ids, sources = config.read_token_ids(Checkpoint(str(MODEL)), None, 9, 4)
    assert set(sources) == {config.dataset}
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert ids == [tokenizer(f"chat {number} and more words")["input_ids"][:4] for number in range(9)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": "nowhere.yaml"}, "nowhere.yaml can't be read as YAML"),
        ({"mixture": []}, "at least 1 item"),
        ({"mixture": [{"dataset": "a", "weight": 0}]}, "greater than 0"),
        ({"mixture": [{"dataset": "a", "wieght": 1}]}, "wieght"),
        ({"mixture": [{"dataset": "a"}], "dataset": "b", "column": "c"}, "leave out --column and --dataset"),
    ],
)
def test_mixtures_that_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **options)


def test_a_share_without_a_text(tmp_path):
    mixture = [{"dataset": texts_file(tmp_path, "chat", 9), "column": "body", "weight": 99}, {"dataset": "code"}]
    with pytest.raises(ValueError, match="--num-samples 8 leaves no text for code; take more"):
        config_of(tmp_path, mixture=mixture).read_token_ids(Checkpoint(str(MODEL)), None, 8, 4)


@pytest.mark.parametrize(
    ("number", "weights", "parts"), [(10, [1], [10]), (10, [1, 1, 1], [4, 3, 3]), (7, [0.5, 0.25, 0.25], [3, 2, 2])]
)
def test_shares_add_up(number, weights, parts):
    assert in_shares(number, weights) == parts


@pytest.mark.parametrize(("method", "matters"), [("random", True), ("projection", True), ("frobenius", False)])
def test_what_another_seed_makes_anew(method, matters):
    """Sensitivities draw tokens by the seed. It decides the order of texts, too, but texts are compared themselves."""
    made = [
        calibrate.fingerprint(
            CalibrationConfig(model=str(MODEL), output="artifact", method=method, seed=seed),
            Checkpoint(str(MODEL)),
            [[1, 2]],
            [],
        )
        for seed in (1, 2)
    ]
    assert (made[0] != made[1]) == matters

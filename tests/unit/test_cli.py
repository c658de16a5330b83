"""The command `sere-dist`: what it imports, and what it says when something that it needs is missing."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sere_dist.cli import commands
from sere_dist.evaluation import accuracy
from sere_dist.method.placement import MAX_LOAD

HELDOUT = Path(__file__).parents[2] / "examples" / "tiny_moe" / "tasks" / "heldout.yaml"
SLOW = ("torch", "ray", "vllm", "transformers", "matplotlib", "numpy", "lm_eval")


def refusal(*arguments: str) -> str:
    """Runs a command that must end with one line, and returns the line."""
    done = CliRunner().invoke(commands.app, arguments)
    assert isinstance(done.exception, SystemExit) and "\n" not in str(done.exception)
    return str(done.exception)


def test_help_imports_nothing_slow():
    program = (
        "import sys; from typer.testing import CliRunner; from sere_dist.cli.commands import app; "
        "done = CliRunner().invoke(app, ['--help']); assert done.exit_code == 0 and 'accuracy' in done.output; "
        f"loaded = sys.modules.keys() & {set(SLOW)}; assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_default_load_of_a_placement():
    """The command does not import `placement`, which imports torch, for the sake of one number."""
    assert inspect.signature(commands.place).parameters["max_load"].default == MAX_LOAD


def test_accuracy_without_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sere_dist.evaluation.accuracy", None)
    assert "The harness is the extra `eval`: install it with pip install" in refusal(
        "accuracy", "http://127.0.0.1:9/v1", "--suite", "paper"
    )


def test_suites_by_name_and_by_file(tmp_path):
    assert all(accuracy.find_suite(suite).is_file() for suite in accuracy.SUITES)
    with pytest.raises(ValueError, match="there is no suite 'papers': choose paper or paper_chat, or name a YAML file"):
        accuracy.find_suite("papers")
    (tmp_path / "suite.yaml").write_text("a: 1")
    with pytest.raises(ValueError, match=r"suite.yaml names no group and no task of lm-eval"):
        accuracy.open_suite(accuracy.find_suite(str(tmp_path / "suite.yaml")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "nowhere.yaml"), "there is no suite 'nowhere.yaml'"),
        (("--suite", "paper", "--gen-kwargs", "{"), "--gen-kwargs is not JSON"),
        (("--suite", "paper", "--gen-kwargs", "[]"), "--gen-kwargs must be a JSON object"),
        (("--suite", str(HELDOUT)), "http://127.0.0.1:9/v1 does not say what it serves"),
    ],
)
def test_what_accuracy_refuses(options, message):
    assert message in refusal("accuracy", "http://127.0.0.1:9/v1", *options)

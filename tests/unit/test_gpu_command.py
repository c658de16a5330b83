"""`python -m benchmarks.gpu`: what it would run, and that one step costs the others nothing."""

import fcntl
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import typer

from benchmarks import gpu
from benchmarks.common import ROOT
from benchmarks.steps import VLLM, Step, missing
from tests.support.commands import invoke

NAMES = ["first", "random", "memcheck", "racecheck", "synccheck", "initcheck", "check", "many_blocks", "time", "sweep"]
NAMES += ["profile", "plugin", "decode", "decode_priced", "time_all"]


def says(name: str, script: str, seconds: float = 60, needs: str = "") -> Step:
    return Step(name, f"What does {name} say?", ["sh", "-c", script], seconds, needs)


def read(folder):
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def test_the_dry_run_lists_every_step_and_asks_every_benchmark():
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    would = json.loads(run.stdout.splitlines()[-1])["dry_run"]
    assert list(would["steps"]) == NAMES and all(f"│ {name} " in run.stdout for name in NAMES)
    assert would["time"]["dry_run"]["shapes"] == 7
    assert would["plugin"]["dry_run"]["prompts"] == 8
    assert would["decode"]["dry_run"]["engines"] == 2


def test_every_command_is_one_that_its_benchmark_takes(tmp_path):
    for step in (step for group in gpu.plan(tmp_path) for step in group):
        python, flag, module, *options = step.command[step.command.index(sys.executable) :]
        assert (python, flag) == (sys.executable, "-m")
        app = typer.Typer()
        app.command()(importlib.import_module(module).main)
        typer.main.get_command(app).make_context(step.name, options)


def test_a_step_that_goes_wrong_costs_the_others_nothing(tmp_path):
    lock, measured = tmp_path / "lock", {"time": {"command": "a command", "rounds": 3, "rows": [{"rows": 4}]}}
    measured["time"]["rows"][0]["one | two"] = {"median": 1.5, "min": 1, "max": 2}
    groups = [
        [says("fails", "echo some words; echo others >&2; exit 3")],
        # Its child holds the lock for as long as one of the two lives.
        [says("hangs", f"exec 9>{lock}; flock 9; echo locked; sleep 1000 & wait", seconds=1)],
        [says("lacks", "echo never", needs="no-such-tool"), says("beside", "echo '[1]'; echo '{\"none\": 1}'")],
        [says("measures", f"echo '{json.dumps(measured)}'; echo '=== a tool says more'")],
    ]
    assert not gpu.run_plan(groups, tmp_path / "new")
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    entries, page = read(tmp_path / "new")
    assert {name: (entry["status"], entry.get("reason")) for name, entry in entries.items()} == {
        "fails": ("failed", "exit status 3"),
        "hangs": ("timed out", "it took more than 1 s"),
        "lacks": ("not here", "no-such-tool is not on the PATH"),
        "beside": ("passed", None),
        "measures": ("passed", None),
    }
    assert entries["fails"]["last_lines"] == {"out": ["some words"], "err": ["others"]}
    assert entries["hangs"]["last_lines"]["out"] == ["locked"] and 1 <= entries["hangs"]["seconds"] < 60
    assert entries["beside"]["result"] == {"none": 1} and entries["measures"]["result"] == measured
    for entry in entries.values():
        assert entry["machine"]["cores"] and entry["versions"]["torch"] == torch.__version__
    assert "| hangs | What does hangs say? | timed out |" in page
    assert "- lacks: not here, no-such-tool is not on the PATH\n" in page
    assert "```\nsome words\nothers\n```" in page and "```\nlocked\n```" in page
    assert "- rounds: 3\n\n| rows | one \\| two |\n|---|---|\n| 4 | 1.5 (1-2) |\n" in page


# A GPU machine as far as the command asks, with one step, which says when it has begun and does not end.
HANGING = """
import sys, torch, typer
from benchmarks import gpu
from benchmarks.steps import Step
folder = sys.argv.pop()
script = f"exec 9>{folder}/lock; flock 9; echo > {folder}/begun; sleep 1000 & wait"
gpu.plan = lambda _results: [[Step("hangs", "", ["sh", "-c", script], 600)]]
torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda: "a GPU"
typer.run(gpu.main)
"""


def test_whoever_ends_the_command_ends_its_steps(tmp_path):
    os.mkfifo(tmp_path / "begun")
    command = [sys.executable, "-c", HANGING, "--results", str(tmp_path), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        (tmp_path / "begun").read_text()
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    with open(tmp_path / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def test_all_that_could_run_passed(tmp_path):
    assert gpu.run_plan([[says("lacks", "exit 1", needs="no-such-tool")], [says("runs", "exit 0")]], tmp_path)
    assert gpu.run_plan([[says("late", "exit 1", seconds=60)]], tmp_path, deadline=time.monotonic() + 10)
    entries, page = read(tmp_path)
    assert [entry["status"] for entry in entries.values()] == ["not here", "passed", "not started"]
    assert "- late: not started, its limit did not fit into the " in page


def test_a_page_of_a_full_success_says_so(tmp_path):
    gpu.run_plan([[says("runs", "exit 0")]], tmp_path)
    assert "All of it was done." in read(tmp_path)[1]


def test_steps_by_name():
    assert [step.name for (step,) in gpu.only_those(gpu.plan(ROOT), {"memcheck", "time"})] == ["memcheck", "time"]
    with pytest.raises(typer.BadParameter, match="no step tme: --dry-run lists them"):
        gpu.only_those(gpu.plan(ROOT), {"tme", "time"})


def test_vllm_may_be_missing(monkeypatch):
    step = says("plugin", "", needs=VLLM)
    assert missing(step) == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert missing(step) == "vLLM is not installed"


def test_without_a_gpu_nothing_is_overwritten(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "gpu.json").write_text("{}")
    refused = invoke(gpu.main, "--results", str(tmp_path))
    assert refused.exit_code == 2 and "there is no NVIDIA GPU here" in refused.stderr
    assert (tmp_path / "gpu.json").read_text() == "{}"

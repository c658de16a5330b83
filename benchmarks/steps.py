"""Commands that run one after the other or side by side, each under a time limit of its own."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import ROOT

VLLM = "vLLM"
PASSED, FAILED, TIMED_OUT, NOT_HERE, NOT_STARTED = "passed", "failed", "timed out", "not here", "not started"
LAST_LINES = 25


class Step(NamedTuple):
    """A command, and what it takes.

    Attributes:
        seconds: its time limit.
        needs: VLLM, or a command on the PATH; empty if it needs neither.
    """

    name: str
    answers: str
    command: Sequence[str]
    seconds: float
    needs: str = ""


def missing(step: Step) -> str:
    """Says that what a step needs is missing; empty if it is here."""
    if step.needs == VLLM:
        return "" if importlib.util.find_spec("vllm") else "vLLM is not installed"
    return "" if not step.needs or shutil.which(step.needs) else f"{step.needs} is not on the PATH"


class Run:
    """A step's command, in a process group of its own."""

    def __init__(self, step: Step, logs: Path):
        logs.mkdir(parents=True, exist_ok=True)
        self.step, self.logs = step, {stream: logs / f"{step.name}.{stream}.txt" for stream in ("out", "err")}
        self.started, self.seconds, self.is_late = time.monotonic(), None, False
        with open(self.logs["out"], "w") as out, open(self.logs["err"], "w") as err:
            self.process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    def has_ended(self) -> bool:
        """Returns whether the command has ended, and ends it if its time is up."""
        if self.seconds is None:
            seconds, is_on = time.monotonic() - self.started, self.process.poll() is None
            self.is_late = is_on and seconds > self.step.seconds
            if self.is_late or not is_on:
                self.seconds = round(seconds, 1)
                self.kill()
        return self.seconds is not None

    def kill(self) -> None:
        """Ends what is left of the group: an engine's workers would keep the GPU's memory from the next step."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def outcome(self) -> dict[str, Any]:
        printed = {stream: log.read_text(errors="replace") for stream, log in self.logs.items()}
        last_lines = {stream: text.splitlines()[-LAST_LINES:] for stream, text in printed.items()}
        found = {"seconds": self.seconds, "result": last_json(printed["out"]), "last_lines": last_lines}
        if self.is_late:
            return {"status": TIMED_OUT, "reason": f"it took more than {self.step.seconds:g} s", **found}
        if self.process.returncode:
            return {"status": FAILED, "reason": f"exit status {self.process.returncode}", **found}
        return {"status": PASSED, **found}


def last_json(text: str) -> dict[str, Any] | None:
    """Returns the line of JSON that benchmarks print last. What watched one may have printed more after it."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with suppress(json.JSONDecodeError):
                return json.loads(line)
    return None


def run_side_by_side(steps: Sequence[Step], logs: Path) -> dict[str, dict[str, Any]]:
    """Runs steps at once, and returns how each ended. Whatever ends this ends them."""
    runs: list[Run] = []
    try:
        for step in steps:
            runs.append(Run(step, logs))
        while not all([run.has_ended() for run in runs]):
            time.sleep(0.05)
    finally:
        for run in runs:
            if not run.has_ended():
                run.kill()
    return {run.step.name: run.outcome() for run in runs}


def run_group(group: Sequence[Step], logs: Path, deadline: float = float("inf")) -> dict[str, dict[str, Any]]:
    """Runs those steps of a group that can run here, at once, if their limits end before `deadline` (monotonic)."""
    found = {step.name: {"status": NOT_HERE, "reason": lack} for step in group if (lack := missing(step))}
    here = [step for step in group if step.name not in found]
    left = deadline - time.monotonic()
    if max((step.seconds for step in here), default=0) <= left:
        return found | run_side_by_side(here, logs)
    reason = f"its limit did not fit into the {max(left, 0):.0f} s that were left"
    return found | {step.name: {"status": NOT_STARTED, "reason": reason} for step in here}

"""Calls a function in a process of its own, for what imports vLLM or joins a Ray cluster.

Such a process starts as an engine's worker does, can be given up on, and keeps its log out of the answer.
"""

import contextlib
import json
import pkgutil
import signal
import subprocess
import sys
import textwrap
import threading
from types import FunctionType
from typing import Any

LONGEST_TEXT = 500  # characters of an error: a compiler's log is far longer


def describe(error: Exception) -> str:
    """Returns an exception's name and message on one line; a fresh process has put the name in its message."""
    if isinstance(error, ChildError):
        return one_line(str(error))
    return one_line(f"{type(error).__name__}: {error}")


def one_line(text: str) -> str:
    text = text.replace("\0", " ")  # NVRTC's logs end in one
    return textwrap.shorten(text, LONGEST_TEXT, placeholder=" ...")


class ChildError(RuntimeError):
    """A fresh process failed, or was given up on. `log` is all that it wrote to its standard error."""

    def __init__(self, message: str, log: str):
        super().__init__(message)
        self.log = log


def call_in_fresh_process(
    function: FunctionType, *arguments: str, seconds: float, hopeless: tuple[str, ...] = ()
) -> Any:
    """Returns what a function of some module returns, as JSON has it, when a new process calls it.

    The process does not have the current folder on its path: an engine's worker may start anywhere.

    Args:
        seconds: how long the process may take.
        hopeless: texts; the process is given up on as soon as a line of its log has one of them.

    Raises:
        ChildError: it failed, took longer, or was hopeless.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    answers = f"import sys; from {__name__} import answer; answer(*sys.argv[1:])"
    command = [sys.executable, "-P", "-c", answers, name, *arguments]
    pipe, log = subprocess.PIPE, ""
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, errors="replace") as child:
        limit = threading.Timer(seconds, child.kill)
        limit.start()
        assert child.stderr is not None and child.stdout is not None  # pipes
        try:
            for line in child.stderr:
                log += line
                if any(sign in line for sign in hopeless):
                    child.kill()
            printed = child.stdout.read()
        finally:
            limit.cancel()
    if child.returncode == 0:
        return json.loads(printed)
    last = (log.strip() or f"exit status {child.returncode}").splitlines()[-1]
    if child.returncode == -signal.SIGKILL:
        last = f"{function.__name__} was killed (its limit: {seconds:g} s; or was memory short?): {last}"
    raise ChildError(last, log)


def answer(name: str, *arguments: str) -> None:
    """What a fresh process runs: prints a function's result and nothing else, or ends with why there is none."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to standard output
            result = pkgutil.resolve_name(name)(*arguments)
    except Exception as error:
        raise SystemExit(describe(error)) from error
    print(json.dumps(result))

"""Data-parallel engines of a study, each in a process of its own, and what they say they measured."""

import json
from collections.abc import Sequence
from typing import Any

from sere_dist.testing.processes import run_together

# The engine runs in its rank's own process, and says no more than what goes wrong.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
MARK = "MEASURED"


def say(**measured: Any) -> None:
    """Of a rank: prints what it measured, for `measured_together` to read."""
    print(MARK, json.dumps(measured), flush=True)


def measured_together(
    commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], timeout: float
) -> list[list[dict[str, Any]]]:
    """Runs ranks side by side, as `run_together`; returns what each measured, in order."""
    return [
        [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith(f"{MARK} ")]
        for output in run_together(commands, environments, timeout)
    ]

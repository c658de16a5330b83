"""What the benchmarks share: the machine, versions, spreads, and where results are kept."""

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
TINY_MOE = ROOT / "examples" / "tiny_moe"


def rounded(number: float, digits: int = 4) -> float:
    return float(f"{number:.{digits}g}")


def spread(numbers: list[float]) -> dict[str, float]:
    values = {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}
    return {name: rounded(value) for name, value in values.items()}


def ranged(values: dict[str, float]) -> str:
    return f"{values['median']:.3g} ({values['min']:.3g}-{values['max']:.3g})"


def tables() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120)


def progress() -> Console:
    return Console(stderr=True)


def physical_cores() -> int:
    """Returns how many cores this process may use, those that two of its CPUs share counted once."""
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return len({Path(topology.format(cpu)).read_text() for cpu in os.sched_getaffinity(0)})


def machine() -> dict[str, Any]:
    name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    found = {
        "cpu": name[1] if name else platform.machine(),
        "cores": physical_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }
    if torch.cuda.is_available():
        query = [shutil.which("nvidia-smi") or "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0]
        found |= {"gpu": torch.cuda.get_device_name(), "driver": driver}
    return found


def versions(*names: str) -> dict[str, str]:
    """Returns the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a GPU machine may have torch and little else
            continue
    return found


def keep(results: Path, measured: dict[str, Any]) -> None:
    """Writes results over those of the same names; the others in the file stay as they are."""
    kept = json.loads(results.read_text()) if results.exists() else {}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(kept | measured, indent=1) + "\n")


def line_by_line(report: dict[str, Any]) -> str:
    """Returns JSON with a line for each entry of a list: a diff shows which measurement changed."""
    lines = []
    for name, value in report.items():
        entries = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else None
        lines.append(f" {json.dumps(name)}: " + (json.dumps(value) if entries is None else f"[\n  {entries}\n ]"))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def example_texts(file: str, length: int, num_texts: int = sys.maxsize) -> torch.Tensor:
    """Returns token ids [texts, length] of the example model's texts: `heldout.parquet` or `calibration.parquet`."""
    from transformers import AutoTokenizer

    from sere_dist.texts import read_texts, tokenise

    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE / "model")
    return torch.tensor(tokenise(read_texts(str(TINY_MOE / file)), tokenizer, num_texts, length))


def data_parallel_ranks(ranks: int) -> list[dict[str, str]]:
    """Returns the environment of each of vLLM's data-parallel ranks on this machine; one rank is an engine alone."""
    from vllm.utils.network_utils import get_open_port  # a GPU machine that times the kernel has no vLLM

    port = str(get_open_port())
    common = {"VLLM_DP_SIZE": str(ranks), "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": port}
    common |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return [{**common, "VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)} for rank in range(ranks)]


def run_together(
    commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], timeout: float
) -> list[str]:
    """Runs commands side by side, each with its own additions to the environment; returns what they printed.

    Raises:
        RuntimeError: one failed; its output is in the message.
        subprocess.TimeoutExpired: one took more than `timeout` seconds.
    """
    with ExitStack() as files:
        running = []
        for command, environment in zip(commands, environments, strict=True):
            # A file: a rank that waits for its pipe to be read would keep the others waiting.
            output = files.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=output)
            running.append((process, output))
        printed = []
        for process, output in running:
            failed = process.wait(timeout)
            output.seek(0)
            printed.append(output.read())
            if failed:
                raise RuntimeError(f"a process failed with exit status {failed}:\n{printed[-1]}")
        return printed

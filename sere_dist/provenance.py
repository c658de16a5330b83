"""What a published number carries with it: the machine and the versions it was measured with, and the file it is in."""

import json
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from sere_dist.files import written_whole

TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def rounded(number: float, digits: int = 4) -> float:
    return float(f"{number:.{digits}g}")


def physical_cores() -> int:
    """Returns how many cores this process may use, those that two of its CPUs share counted once."""
    return len({siblings(cpu) for cpu in os.sched_getaffinity(0)})


def siblings(cpu: int) -> str:
    """Returns the CPUs of this one's core. Where the kernel does not name them (gVisor), each has a core of its own."""
    topology = Path(TOPOLOGY.format(cpu))
    return topology.read_text() if topology.exists() else str(cpu)


def driver_version() -> str:
    """Returns the version of NVIDIA's driver, or "unknown" where neither its library nor nvidia-smi tells it."""
    try:
        import pynvml
    except ImportError:  # a GPU machine may have torch and little else
        return driver_by_smi()
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return driver_by_smi()


def driver_by_smi() -> str:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "unknown"
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True)
    return "unknown" if told.returncode else told.stdout.splitlines()[0]


def machine() -> dict[str, Any]:
    name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    found = {
        "cpu": name[1] if name else platform.machine(),
        "cores": physical_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "driver": driver_version()}
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
    """Writes results over those of the same names; the others in the file stay as they are.

    The file is there whole at any time, so that a benchmark that is killed loses nothing.
    """
    kept = json.loads(results.read_text()) if results.exists() else {}
    results.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(results) as path:
        path.write_text(json.dumps(kept | measured, indent=1) + "\n")


def line_by_line(report: dict[str, Any]) -> str:
    """Returns JSON with a line for each entry of a list: a diff shows which measurement changed."""
    lines = []
    for name, value in report.items():
        entries = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else None
        lines.append(f" {json.dumps(name)}: " + (json.dumps(value) if entries is None else f"[\n  {entries}\n ]"))
    return "{\n" + ",\n".join(lines) + "\n}\n"

"""What the benchmarks share: spreads, options, results, and CUDA graphs."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sere_dist.provenance import rounded

if TYPE_CHECKING:
    from cuda.core import Kernel

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def spread(numbers: list[float]) -> dict[str, float]:
    values = {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}
    return {name: rounded(value) for name, value in values.items()}


def ranged(values: dict[str, float]) -> str:
    return f"{values['median']:.3g} ({values['min']:.3g}-{values['max']:.3g})"


def numbers(text: str) -> list[int]:
    """Reads an option such as "1,4,16"."""
    return [int(part) for part in text.split(",") if part]


def capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def resources(kernel: "Kernel") -> dict[str, int]:
    """Returns what a thread of a loaded kernel takes. Local bytes are spills, or arrays that need an address."""
    return {"registers": kernel.attributes.num_regs, "local_bytes": kernel.attributes.local_size_bytes}

"""What the timings share: spreads, and where results are kept."""

import statistics
from pathlib import Path

from sere_dist.provenance import rounded

ROOT = Path(__file__).resolve().parents[1]


def spread(numbers: list[float]) -> dict[str, float]:
    values = {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}
    return {name: rounded(value) for name, value in values.items()}


def ranged(values: dict[str, float]) -> str:
    return f"{values['median']:.3g} ({values['min']:.3g}-{values['max']:.3g})"

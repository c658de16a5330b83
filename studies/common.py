"""What the studies share: where their results are kept, and how policies are compared at one KL divergence."""

import math
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "studies" / "results"
ENGINES = ("data-parallel.json", "data-parallel-4.json")  # there, of `studies.data_parallel`: two engines, and four


def at_kl(points: list[tuple[float, float]], kl: float) -> float | None:
    """Returns what the points (KL divergence, number) have at a KL divergence, between the two around it.

    None: there are none.
    """
    points = sorted(points)
    for (low, at_low), (high, at_high) in pairwise(points):
        if low <= kl <= high:
            share = (math.log(kl) - math.log(low)) / (math.log(high) - math.log(low))
            return at_low + share * (at_high - at_low)
    return None

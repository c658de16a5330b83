"""Standard errors over sequences, which are independent of each other where the tokens of one are not.

What was measured on the same sequences is compared by pairs: most of the spread is the sequences', and both share it.
"""

import math
import statistics
from collections.abc import Sequence


def with_error(numbers: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error."""
    return statistics.fmean(numbers), statistics.stdev(numbers) / math.sqrt(len(numbers))


def difference_with_error(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of ours less theirs, of paired numbers, and its standard error."""
    return with_error([a - b for a, b in zip(ours, theirs, strict=True)])


def ratio_with_error(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Returns sum(ours) / sum(theirs) of paired numbers, and its standard error."""
    ratio = math.fsum(ours) / math.fsum(theirs)
    _, error = with_error([a - ratio * b for a, b in zip(ours, theirs, strict=True)])
    return ratio, error / abs(statistics.fmean(theirs))

"""Losses and prices as integers: sums of them do not depend on the order, so that threads and ranks agree."""

import torch

FIXED_POINT_ONE = 2**24  # a squared error of 1, in the unit of w² n
ALWAYS_PRIMARY = 2**40  # the loss without an expert that runs in any case; the most that a loss or a price can be


def to_fixed_point(price: float) -> int:
    """Returns a price, 1 to ALWAYS_PRIMARY: rounded to float32, in fixed point. 0 is no price, and stays 0."""
    fixed = float(torch.tensor(price, dtype=torch.float32)) * FIXED_POINT_ONE
    return max(1, round(min(fixed, ALWAYS_PRIMARY))) if price > 0 else 0

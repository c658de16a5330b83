"""The outputs of all experts of a layer, a block of tokens at a time."""

from itertools import pairwise
from typing import Protocol

import torch

BLOCK_BYTES = 2**30  # what a block's outputs and Gram matrices take, unless told otherwise


class Outputs(Protocol):
    """Outputs [E, N, H] of all experts, or their routing weights [N, E], computed when sliced by experts and tokens."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: tuple[slice, slice]) -> torch.Tensor: ...


def float64_zeros(outputs_ENH: torch.Tensor | Outputs, *shape: int) -> torch.Tensor:
    """Returns zeros to sum in, on the device that the outputs are on."""
    return torch.zeros(shape, dtype=torch.float64, device=outputs_ENH[:1, :1].device)


def split_evenly(count: int, block: int) -> list[slice]:
    """Cuts `count` into the fewest pieces of at most `block`, as even as can be."""
    pieces = -(-count // block)
    edges = [count * i // max(1, pieces) for i in range(pieces + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]

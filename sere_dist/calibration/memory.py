"""Half as much at a time, until it fits into memory."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def with_halving(size: int, compute: Callable[[int], T], what: str) -> tuple[T, int]:
    """Returns `compute(size)` and `size`; whenever memory runs out, half the size is tried.

    Raises:
        MemoryError: it ran out at size 1.
    """
    while True:
        try:
            return compute(size), size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise MemoryError(
                    f"{what} does not fit in memory even in the smallest piece: give each task more with "
                    "--memory-per-task (fewer then share a node), or try --device cpu on nodes with more memory"
                ) from error
        # Here, not above: a traceback keeps what its frames hold.
        gc.collect()
        torch.cuda.empty_cache()
        size //= 2


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether this is a failed allocation. torch has an exception type for those of a GPU alone."""
    texts = ("allocate memory", "not enough memory", "bad_alloc", "bad allocation", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)

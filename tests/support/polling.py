"""Waiting for what happens in other processes, however slow the machine is."""

import time
from collections.abc import Callable

PATIENCE = 300  # seconds: several times what the slowest of these waits took on two cores that were throttled to half


def eventually(holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Returns once `holds` does; an error meanwhile counts as not yet."""
    deadline, error = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            if holds():
                return
            error = None
        except Exception as caught:
            error = caught
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds} s") from error

"""When a job may go on from what a stopped one left on disk.

A calibration leaves a folder with a file per layer, a tuning one file with a line per measurement: a layer's tensors
are too large for a line, and thousands of measurements are too many for a file each. What both have in common is here.
"""

import json
from pathlib import Path
from typing import Any

Fingerprint = dict[str, Any]  # everything that decides a job's results, by the name that a user knows it by


def check_same_job(path: Path, kept: Fingerprint, own: Fingerprint, what: str, instead: str) -> None:
    """Refuses to go on from the results of another job.

    Args:
        path: where the results are.
        kept: the fingerprint that was written with them, from JSON.
        own: the fingerprint of the job that wants to go on.
        what: what `path` holds, for the message.
        instead: what else a user can do than to throw it away with `--restart`, for the message.

    Raises:
        ValueError: the fingerprints differ; the message says in what.
    """
    own = json.loads(json.dumps(own))  # a tuple comes back as a list
    if changed := sorted(name for name in {*kept, *own} if kept.get(name) != own.get(name)):
        raise ValueError(
            f"{path} holds {what} (other: {', '.join(changed)}): {instead}, or throw them away with --restart"
        )

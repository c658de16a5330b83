"""The calibration's command, where a task meets a stale file once per layer: what an NFS server that was started again
leaves behind. The folder STALE_FILES remembers which layers have had theirs."""

import errno
import os
from pathlib import Path

import ray
import typer

from calibration_jobs import calibrate
from calibration_jobs.transient import transient_errors
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import score_layer

FOLDER = Path(os.environ["STALE_FILES"])


@ray.remote
def score_task(model, revision, layer, *arguments):
    *settings, device = arguments[:5]
    with transient_errors(pause_s=0):
        if not (mark := FOLDER / f"layer {layer}").exists():
            mark.touch()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), model)
        return score_layer(Checkpoint(model, revision), layer, arguments[5:], *settings, device)


if __name__ == "__main__":
    calibrate.score_task = score_task
    typer.run(calibrate.main)

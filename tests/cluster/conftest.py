"""What the tests of the Ray cluster share."""

from pathlib import Path

import pytest

from examples.application import calibrate


@pytest.fixture(scope="session")
def job_artifact(cluster, tmp_path_factory) -> Path:
    """The artifact of the example model, written by a job that went through `ray job submit`."""
    path = tmp_path_factory.mktemp("job") / "tiny-moe-sere"
    calibrate(cluster, artifact=path)
    return path

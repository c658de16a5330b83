"""Several hosts with a network between them, and one that is cut off: nothing that it was told arrives, nothing that it
says does, and no connection closes."""

import pytest

from sere_dist.artifact.folder import TENSORS_FILE
from sere_dist.testing.namespaces import can_be_made
from tests.cluster.test_survival import Job
from tests.support import hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_be_made(), reason="network namespaces need root and iproute2"),
]


@pytest.fixture(scope="module")
def network():
    with hosts.Hosts(3) as network:
        yield network
    assert network.processes() == []


def test_a_host_that_is_cut_off_from_a_calibration(network, job_artifact, tmp_path):
    job = Job(network.address, tmp_path / "out", on=network)
    job.until("scored (1/")
    network.cut_off(2)
    job.end()
    assert (tmp_path / "out" / TENSORS_FILE).read_bytes() == (job_artifact / TENSORS_FILE).read_bytes()

"""A minute of `make soak`, or as long as it takes: a replica and an engine that die under load."""

import pytest

from examples.application import served
from sere_dist.testing.local_cluster import LocalCluster, free_ports
from tests.soak import survival

pytestmark = pytest.mark.slow


def test_clients_of_what_dies_get_answers_or_clean_errors(artifact_path, monkeypatch):
    # Other tests run beside this one: clients that leave them time, where `make soak` is told to find the machine idle.
    fewer = {
        "CLIENTS": 5,
        "PAUSE_SECONDS": 2.0,
        "LONG_CLIENTS": 0,
        "HUNG_SECONDS": 1200,
        "FAST_SECONDS": 600,
    }
    for name, value in fewer.items():
        monkeypatch.setattr(survival, name, value)
    # On the cluster of the run, another test's application may be up. Serve would keep that one's HTTP port.
    with (
        LocalCluster(num_cpus=12) as cluster,
        served(cluster, free_ports(1)[0], artifact=artifact_path, **survival.ARGUMENTS) as url,
    ):
        survived = survival.survive(cluster, url.removesuffix("/v1"), seconds=60)
    assert all(survived["checks"].values()), survived
    assert survived["failed"] < 0.1 * sum(survived["sent"].values())

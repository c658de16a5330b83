"""A minute of `make soak`, or as long as it takes: a replica and an engine that die under load."""

import pytest

from examples import demo
from sere_dist.testing.local_cluster import LocalCluster, free_ports
from tests.soak.load import ENVIRONMENT
from tests.soak.survival import REPLICAS, survive

pytestmark = pytest.mark.slow


def test_clients_of_what_dies_get_answers_or_clean_errors(artifact_path):
    arguments = {"num_replicas": REPLICAS, "environment": ENVIRONMENT}
    # On the cluster of the run, another test's application may be up. Serve would keep that one's HTTP port.
    with (
        LocalCluster(num_cpus=12) as cluster,
        demo.served(cluster, free_ports(1)[0], artifact_path, **arguments) as url,
    ):
        survived = survive(cluster, url.removesuffix("/v1"), seconds=60, deploys=False)
    assert all(survived["checks"].values()), survived
    assert survived["failed"] < 0.1 * sum(survived["sent"].values())

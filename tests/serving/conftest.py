"""The applications that the tests of the endpoint share: one for each layout of the engine's workers."""

from pathlib import Path

import pytest

from examples import demo
from sere_dist.admin import request_settings
from sere_dist.config import CHANGEABLE
from sere_dist.environment import ADMIN_TOKEN, API_KEY
from sere_dist.testing.local_cluster import free_ports
from tests.soak.load import ENVIRONMENT

# The workers of an engine in parallel hold half of the experts each: as one replica under tensor parallelism, and as a
# gang of two replicas under data-parallel attention.
LAYOUTS = {
    "one worker": {},
    "TP2+EP2": {"tensor_parallel_size": 2, "expert_parallel": True},
    "DP2+EP2": {"data_parallel_size": 2, "expert_parallel": True},
}
KEYS = ("old-key-of-clients", "new-key-of-clients")  # of the parallel layouts


@pytest.fixture(scope="session")
def key_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("secrets") / "keys"
    path.write_text("\n".join(KEYS))
    return path


@pytest.fixture(scope="session")
def url(request, cluster, artifact_path, key_file):
    """The endpoint of the layout that a test is parametrised with. pytest runs all tests of a layout in a row, whatever
    their files, so each is served once."""
    arguments, key = dict(LAYOUTS[request.param]), "none"
    if arguments:
        environment = {"runtime_env": {"env_vars": {f"{API_KEY}_FILE": str(key_file)}}}
        ingress = {"num_replicas": 1, "ray_actor_options": environment}
        arguments |= {"environment": ENVIRONMENT, "require_api_key": True, "ingress": ingress}
        key = KEYS[0]
    with demo.served(cluster, free_ports(1)[0], artifact_path, key=key, **arguments) as url:
        yield url


@pytest.fixture
def admin(cluster, url, monkeypatch):
    """Reads and changes the settings over HTTP; leaves them as the application started."""
    monkeypatch.setenv(ADMIN_TOKEN, cluster.environment[ADMIN_TOKEN])
    as_started = request_settings(url)["settings"]
    yield lambda **changes: request_settings(url, changes or None)
    request_settings(url, {name: as_started[name] for name in CHANGEABLE})

"""The applications that the tests of the endpoint share: one for each layout of the engine's workers."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.application import ROOT, served
from sere_dist.admin import change_settings, request_settings
from sere_dist.config import CHANGEABLE
from sere_dist.environment import ADMIN_TOKEN, API_KEY, EXACT_API_KEY
from sere_dist.testing.local_cluster import free_ports
from tests.soak.load import ENVIRONMENT

# The workers of an engine in parallel hold half of the experts each: as one replica under tensor parallelism, and as a
# gang of two replicas under data-parallel attention. They are behind keys, and no header opts a request out.
PARALLEL = {
    "TP2+EP2": {"tensor_parallel_size": 2, "expert_parallel": True},
    "DP2+EP2": {"data_parallel_size": 2, "expert_parallel": True},
}
FEW = {"max_num_seqs": 2, "max_num_queued_reqs": 4}
KEYS = ("old-key-of-clients", "new-key-of-clients")
EXACT_KEY = "key-of-exact-clients"


@pytest.fixture(scope="session")
def key_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("secrets") / "keys"
    path.write_text("\n".join(KEYS))
    return path


@pytest.fixture(scope="session")
def exact_key_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("secrets") / "exact-keys"
    path.write_text(EXACT_KEY)
    return path


@pytest.fixture(scope="session")
def pools(tmp_path_factory) -> dict[str, Any]:
    """The arguments of `serve_apps/tiny_moe_pd.yaml`, with a folder of its own for keys and values."""
    (application,) = yaml.safe_load((ROOT / "serve_apps" / "tiny_moe_pd.yaml").read_text())["applications"]
    arguments, folder = application["args"], tmp_path_factory.mktemp("keys and values")
    for pool in (arguments, arguments["prefill"]):
        pool["engine"]["kv_transfer_config"]["kv_connector_extra_config"] = {"shared_storage_path": str(folder)}
    del arguments["rerouting"]  # `served` has the same, with the artifact's place
    return arguments


@pytest.fixture(scope="session")
def url(request, cluster, artifact_path, key_file, exact_key_file, pools):
    """The endpoint of the layout that a test is parametrised with. pytest runs all tests of a layout in a row, whatever
    their files, so each is served once, and one after the other: they are one application."""
    if request.param in PARALLEL:
        files = {f"{API_KEY}_FILE": str(key_file), f"{EXACT_API_KEY}_FILE": str(exact_key_file)}
        ingress = {"num_replicas": 1, "ray_actor_options": {"runtime_env": {"env_vars": files}}}
        doors = {"require_api_key": True, "opt_out_by": ["body"], "ingress": ingress}
        arguments = {"environment": ENVIRONMENT} | doors | PARALLEL[request.param]
    else:
        arguments = {
            "one worker": {"rerouting": {"artifact": str(artifact_path), "select_top_k": 2, "shadow_share": 0}},
            "two pools": pools,
            "few at a time": {
                "engine": {"max_model_len": 512, "enforce_eager": True, "kv_cache_memory_bytes": 2**27, **FEW},
                "environment": ENVIRONMENT,
                "max_body_bytes": 100_000,
                "engine_timeout_s": 15,
            },
        }[request.param]
    key = KEYS[0] if request.param in PARALLEL else "none"
    with served(cluster, free_ports(1)[0], artifact=artifact_path, key=key, **arguments) as url:
        yield url


@pytest.fixture
def admin(cluster, url, monkeypatch):
    """Reads and changes the settings over HTTP, on every replica; leaves them as the application started."""
    monkeypatch.setenv(ADMIN_TOKEN, cluster.environment[ADMIN_TOKEN])
    as_started = request_settings(url)["settings"]
    yield lambda **changes: change_settings(url, changes) if changes else request_settings(url)
    change_settings(url, {name: as_started[name] for name in CHANGEABLE})

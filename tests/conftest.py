"""What the rooms share. Nothing here is imported before a test asks for it: torch and its company take seconds.

`tests/unit` needs neither a cluster nor an engine, and runs by `make check`. The other rooms start the real thing. In
`tests/unit` a test that is marked `long` is left to `make test`. Anywhere, a test that is marked `slow` is left to
`make test-all`, as are the many examples of hypothesis's profile `thorough`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Before anything imports vLLM. The engine's core stays in the test's process, so that all requests of a call are queued
# before the first step and batches are the same in every run. Its workers are processes of their own all the same.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # lets a test send a spy to the workers
os.environ["HF_HUB_OFFLINE"] = "1"
# Two engines that spin on the same cores slow each other down, and the example model is too small for two threads.
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("quick", max_examples=60, deadline=None)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("quick")


STARTS_ITS_OWN = ("test_autoscaling.py", "test_local_cluster.py", "test_serving_survival.py")


class ByFileAndCluster(LoadScopeScheduling):
    """Of several processes, each takes whole files, and one all that share a Ray cluster: a run has one for them.

    pytest-xdist 3.8 has a mark for this, `xdist_group`, which does nothing beside pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        is_shared = file.startswith(("tests/serving/", "tests/cluster/")) and not file.endswith(STARTS_ITS_OWN)
        return "cluster" if is_shared else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever starts the real thing takes long."""
    for item in items:
        if not item.nodeid.startswith("tests/unit/"):
            item.add_marker("long")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> ByFileAndCluster | None:
    return ByFileAndCluster(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def cluster():
    """The one Ray cluster of the run."""
    from sere_dist.testing.local_cluster import LocalCluster

    with LocalCluster(num_cpus=12) as cluster:  # logical: a gang of replicas, their ingress and proxies need them
        yield cluster
    assert cluster.processes() == []


@pytest.fixture(scope="session")
def artifact_path(tmp_path_factory) -> Path:
    """An artifact of the example model, by the paper's method."""
    from examples.tiny_moe.data import example_texts
    from tests.support.artifacts import example_artifact

    path = tmp_path_factory.mktemp("calibration") / "tiny-moe-sere"
    example_artifact(example_texts("calibration.parquet", 64, 24).tolist(), "frobenius").save(path)
    return path


@pytest.fixture(scope="session")
def projection_path(tmp_path_factory) -> Path:
    """The same of method projection, from few texts."""
    from examples.tiny_moe.data import example_texts
    from tests.support.artifacts import example_artifact

    path = tmp_path_factory.mktemp("projection") / "artifact"
    example_artifact(example_texts("calibration.parquet", 32, 12).tolist(), "projection").save(path)
    return path


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    from examples.tiny_moe.data import MODEL
    from sere_dist.moe import load_model

    return load_model(str(MODEL), "cpu")


@pytest.fixture(scope="session")
def heldout_ids() -> torch.Tensor:
    """Token ids [16, 96] of held-out texts."""
    from examples.tiny_moe.data import example_texts

    return example_texts("heldout.parquet", 96, 16)


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory):
    """The kernels as compiled for this CPU: (dtype of weights, dtype of ids) -> HostKernels, each when first used."""
    from tests.support.host_kernels import CompiledOnDemand

    return CompiledOnDemand(tmp_path_factory.mktemp("reroute"))

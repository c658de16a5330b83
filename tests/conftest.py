"""What the tests share: the example model, one Ray cluster, one calibration by a Ray job."""

import itertools
import os
import sys
from pathlib import Path
from typing import Literal

# Before anything imports vLLM. The engine's core stays in the test's process, so that all requests of a call are queued
# before the first step and batches are the same in every run. Its workers are processes of their own all the same.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # lets a test send a spy to the workers
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from examples import demo
from examples.tiny_moe.data import example_texts
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.layer import Layer, LayerStatistics
from sere_dist.artifact.recommendation import LayerSetting, Outcome, Recommendation
from sere_dist.artifact.schema import SCHEMA_VERSION, ArtifactConfig
from sere_dist.kernels import reroute as kernel
from sere_dist.moe import load_model
from sere_dist.testing.local_cluster import LocalCluster
from tests.support.host_kernels import HostKernels, compile_on_host

MODEL = demo.MODEL
TEXTS = MODEL.parent


@pytest.fixture(scope="session")
def cluster():
    with LocalCluster(num_cpus=12) as cluster:  # logical: a gang of replicas, their ingress and proxies need them
        yield cluster
    assert cluster.processes() == []


@pytest.fixture(scope="session")
def artifact_path(cluster, tmp_path_factory) -> Path:
    """The artifact of the example model, written by a job that went through `ray job submit`."""
    path = tmp_path_factory.mktemp("calibration") / "tiny-moe-sere"
    demo.calibrate(cluster, path)
    return path


def job(cluster: LocalCluster, *options: str) -> str:
    """Runs the calibration's command on the cluster; returns what it printed."""
    done = cluster.run([sys.executable, "-m", "calibration_jobs.calibrate", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def projection_job(cluster, tmp_path_factory) -> tuple[Path, str]:
    """An artifact of method projection, from few texts, and what the job that wrote it printed."""
    folder = tmp_path_factory.mktemp("projection")
    settings, texts = folder / "calibration.yaml", TEXTS / "calibration.parquet"
    settings.write_text(f"model: {MODEL}\ndataset: {texts}\nnum_samples: 999\nmax_length: 32\n")
    printed = job(
        cluster,
        *("--config", str(settings), "--num-samples", "12", "--min-length", "8", "--max-tokens", "300"),
        *("--method", "projection", "--output", str(folder / "artifact"), "--min-tokens-per-expert", "20"),
    )
    return folder / "artifact", printed


@pytest.fixture(scope="session")
def projection_path(projection_job) -> Path:
    return projection_job[0]


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory) -> dict[tuple[torch.dtype, torch.dtype], HostKernels]:
    source = kernel.SOURCE.read_text()
    return {
        types: compile_on_host(tmp_path_factory.mktemp("reroute"), source, *types)
        for types in itertools.product(kernel.WEIGHT_DTYPES, kernel.ID_DTYPES)
    }


@pytest.fixture(scope="session")
def model():
    return load_model(str(MODEL), "cpu")


@pytest.fixture(scope="session")
def heldout_ids() -> torch.Tensor:
    """Token ids [16, 96] of held-out texts."""
    return example_texts("heldout.parquet", 96, 16)


def recommend(
    artifact: Artifact, policy: Literal["sere", "projection"], layers: dict[int, LayerSetting]
) -> Recommendation:
    """Returns a recommendation for a saved artifact, with layers as given and made-up evidence."""
    numbers = {"kl": 0.01, "kl_error": 0.001, "loss_rise": 0.02, "loss_rise_error": 0.002}
    numbers |= {"perplexity": 20, "top1": 0.9, "top1_error": 0.01}
    off, ours = Outcome(batch=16, active_experts=4, **numbers), Outcome(batch=16, active_experts=2, **numbers)
    evidence = {"curve": [ours], "tuned": ours, "off": [off], "recommended": [ours], "uniform": {1: ours}}
    about = {"batch": 16, "budget": "a KL of at most 0.02 nats a token", "texts": "texts", "versions": {}}
    sha256 = artifact.config.tensors_sha256
    return Recommendation(tensors_sha256=sha256, policy=policy, layers=layers, **about, **evidence)


def small_artifact(num_experts: int = 4, layers: tuple[int, ...] = (0, 1), **changes) -> Artifact:
    config = ArtifactConfig(
        schema_version=SCHEMA_VERSION,
        base_model="nobody/small-moe",
        architecture="Qwen3MoeForCausalLM",
        num_layers=2,
        hidden_size=8,
        num_experts=num_experts,
        num_experts_per_token=2,
        layer_names={layer: f"model.layers.{layer}.mlp.experts" for layer in layers},
        method="frobenius",
        dataset="texts.parquet",
        num_tokens=16,
        versions={"torch": torch.__version__},
    ).model_copy(update=changes)
    torch.manual_seed(0)
    row = {"tokens_per_expert_min": 3, "tokens_per_expert_median": 4.5, "seconds": 0.1}
    row |= {"similarity_mean": 0.5, "similarity_min": 0.1, "similarity_max": 0.9}
    return Artifact(
        config,
        {
            layer: Layer(
                torch.rand(num_experts, num_experts).fill_diagonal_(1),
                LayerStatistics(layer=layer, name=config.layer_names[layer], **row),
            )
            for layer in layers
        },
        settings={"model": "nobody/small-moe", "num_samples": 2},
    )

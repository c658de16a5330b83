"""What the benchmarks that start engines share."""

import os
from pathlib import Path

import torch
from transformers import AutoConfig

from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.layer import Layer, LayerStatistics
from sere_dist.artifact.schema import SCHEMA_VERSION, ArtifactConfig
from sere_dist.environment import ALLOW_UNTESTED_VLLM, is_tested_release
from sere_dist.method.similarity import random_similarity
from sere_dist.moe import MoeShape


def write_random_artifact(model: Path, folder: Path) -> Path:
    """Writes an artifact with random similarities for a shape; which expert is like which does not change the time."""
    config = AutoConfig.from_pretrained(model)
    shape = MoeShape.from_config(config)
    dense = getattr(config, "first_k_dense_replace", 0)
    layers = {layer: f"model.layers.{layer}.mlp.experts" for layer in range(dense, shape.num_layers)}
    about = ArtifactConfig(
        schema_version=SCHEMA_VERSION,
        base_model=str(model),
        **vars(shape),
        layer_names=layers,
        method="projection",  # it has tables for both policies
        dataset=None,
        num_tokens=0,
        versions={},
    )
    found = {}
    for layer, name in layers.items():
        similarity_EE = random_similarity(shape.num_experts, layer)
        coefficient_EE, size_E = torch.ones_like(similarity_EE), torch.ones(shape.num_experts)
        found[layer] = Layer(similarity_EE, LayerStatistics.of(layer, name, similarity_EE), coefficient_EE, size_E)
    Artifact(about, found).save(folder / "artifact")
    return folder / "artifact"


def allow_this_vllm() -> bool:
    """Lets the plugin start on whatever vLLM is here, and returns whether sere_dist was tested with it."""
    import vllm

    from sere_dist.vllm_plugin import TESTED_VLLM

    is_tested = is_tested_release(vllm.__version__, TESTED_VLLM)
    if not is_tested:
        os.environ[ALLOW_UNTESTED_VLLM] = "1"
    return is_tested

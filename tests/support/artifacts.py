"""Artifacts for tests: a small made-up one, and one of the example model that is computed here, without Ray."""

from collections.abc import Mapping
from typing import Literal

import torch

from examples.tiny_moe.data import MODEL
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.layer import Layer, LayerStatistics
from sere_dist.artifact.recommendation import LayerSetting, Outcome, Recommendation
from sere_dist.artifact.schema import SCHEMA_VERSION, ArtifactConfig
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import expert_inputs, score_layer, text_blocks
from sere_dist.method.similarity import Method
from sere_dist.moe import MoeShape


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


def change_layers(artifact: Artifact, **tables: Mapping[int, torch.Tensor] | None) -> Artifact:
    """Replaces tables of an artifact's layers in place: `similarity_EE={layer: ...}`, or None for all layers."""
    for index, layer in artifact.layers.items():
        for name, by_layer in tables.items():
            setattr(layer, name, None if by_layer is None else by_layer[index])
    return artifact


def example_artifact(texts: list[list[int]], method: Method) -> Artifact:
    """Returns what a calibration of the example model on these token ids finds."""
    checkpoint = Checkpoint(str(MODEL))
    shape, inputs = MoeShape.from_config(checkpoint.config), expert_inputs(checkpoint, text_blocks(texts))
    results = {layer: score_layer(checkpoint, layer, of_layer, method) for layer, of_layer in inputs}
    names = {"base_model": str(MODEL), "num_tokens": sum(map(len, texts))}
    artifact = small_artifact(layers=tuple(results), method=method, **names, **vars(shape))
    for layer, result in results.items():
        artifact.layers[layer] = result
    return artifact

"""Artifacts made up for tests."""

from collections.abc import Mapping

import torch

from sere_dist.artifact.folder import Artifact


def change_layers(artifact: Artifact, **tables: Mapping[int, torch.Tensor] | None) -> Artifact:
    """Replaces tables of an artifact's layers in place: `similarity_EE={layer: ...}`, or None for all layers."""
    for index, layer in artifact.layers.items():
        for name, by_layer in tables.items():
            setattr(layer, name, None if by_layer is None else by_layer[index])
    return artifact

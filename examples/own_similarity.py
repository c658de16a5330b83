"""Write an artifact with a similarity of your own, computed from the experts' outputs.

python -m examples.own_similarity build/own-sere
"""

import sys
from pathlib import Path

import torch

from examples.tiny_moe.data import MODEL, example_texts
from sere_dist import Artifact
from sere_dist.artifact.layer import Layer, LayerStatistics
from sere_dist.artifact.schema import SCHEMA_VERSION, ArtifactConfig
from sere_dist.moe import MoeShape, expert_outputs, hooked_experts, load_model, routed_experts


def agreement(outputs_ENH: torch.Tensor) -> torch.Tensor:
    """Returns [E, E]: how often the outputs of two experts have the same sign, 0 to 1."""
    signs_EF = outputs_ENH.flatten(1).sign()
    return ((signs_EF @ signs_EF.T / signs_EF.shape[1] + 1) / 2).fill_diagonal_(1)


def calibrate(output: Path) -> None:
    model, ids_BL = load_model(str(MODEL), "cpu"), example_texts("calibration.parquet", length=32, num_texts=4)
    inputs: dict[int, torch.Tensor] = {}  # what the experts of each layer read: [N, H]
    with torch.no_grad(), hooked_experts(model, lambda layer, routing: inputs.update({layer: routing[0]})):
        model(ids_BL)
    layers = {}
    for layer, (name, experts) in routed_experts(model).items():
        similarity_EE = agreement(expert_outputs(experts, inputs[layer]))
        layers[layer] = Layer(similarity_EE, LayerStatistics.of(layer, name, similarity_EE))
    config = ArtifactConfig(
        schema_version=SCHEMA_VERSION,
        base_model=str(MODEL),
        **vars(MoeShape.from_config(model.config)),
        layer_names={layer: found.statistics.name for layer, found in layers.items()},
        method="sign agreement",
        dataset="calibration.parquet",
        num_tokens=ids_BL.numel(),
        versions={"torch": torch.__version__},
    )
    Artifact(config, layers).save(output)


if __name__ == "__main__":
    calibrate(Path(sys.argv[1]))
    print(f"wrote {sys.argv[1]}: serve it as any artifact, with policy: sere")

"""What users of the method's reference implementation bring along: its checkpoints and its `hf_overrides`.

Its calibration saves the whole model again, with a tensor `mlp.similarity_matrix` per layer, and
`similarity_matrices.pt` beside it. Both are read as an artifact.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.hub import local_folder
from sere_dist.artifact.layer import Layer, LayerStatistics
from sere_dist.artifact.schema import CONFIG_FILE, SCHEMA_VERSION, ArtifactConfig, ArtifactError
from sere_dist.moe import MoeShape

MATRICES_FILE = "similarity_matrices.pt"
MATRIX = "similarity_matrix"  # how its tensors' names end

# Its vLLM architectures and the models' own; and its S where `hf_overrides` names none.
ARCHITECTURES = {
    f"{name}SERE": name for name in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM")
}
SELECT_TOP_K = 4


def load_artifact(name: str | Path, shape: MoeShape, model: str) -> Artifact:
    """Reads an artifact of sere_dist, or what the reference implementation wrote for a model of this shape.

    `name` is an artifact in a folder or on the Hub, a checkpoint of the reference implementation, or its
    `similarity_matrices.pt`.

    Raises:
        ArtifactError: it can't be read or used; the message names what is wrong.
    """
    path = local_folder(name)
    if path.is_dir() and (path / CONFIG_FILE).exists():
        return Artifact.load(path)
    matrices = _matrices(path)
    if matrices is None:
        return Artifact.load(path)  # which says what is missing
    similarity = {layer: _checked(path, layer, matrix, shape.num_experts) for layer, matrix in sorted(matrices.items())}
    names = {layer: f"model.layers.{layer}.mlp" for layer in similarity}
    about = ArtifactConfig(
        schema_version=SCHEMA_VERSION,
        base_model=model,
        **vars(shape),
        layer_names=names,
        method="reference",
        dataset=None,
        num_tokens=0,
        versions={},
    )
    layers = {
        layer: Layer(similarity_EE, LayerStatistics.of(layer, names[layer], similarity_EE))
        for layer, similarity_EE in similarity.items()
    }
    return Artifact(about, layers)


def load_artifact_of(name: str | Path, model: str) -> Artifact:
    """The same for a checkpoint folder or Hub id `model`, and checks that the artifact is this model's.

    Raises:
        ArtifactError: it can't be read or used, or is not; the message names what is wrong.
        ValueError: the model's configuration can't be read.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: no configuration of {model!r} could be read: {error}") from error
    shape = MoeShape.from_config(config)
    artifact = load_artifact(name, shape, model)
    artifact.check_serves(shape, model, getattr(config, "_commit_hash", None))
    return artifact


def settings_from_overrides(
    hf_overrides: Any, additional_config: Mapping[str, Any], model: str
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Translates the reference implementation's `hf_overrides`; returns None if these are not its own.

    `select_top_k` and `threshold` become settings of `additional_config["sere"]`, whose own entries win. The artifact
    is the model's folder, where the reference implementation saved the matrices.

    Returns:
        `hf_overrides` and `additional_config` as sere_dist and vLLM understand them.

    Raises:
        ValueError: an architecture that the reference implementation does not have.
    """
    if not isinstance(hf_overrides, dict):
        return None
    names = hf_overrides.get("architectures") or []
    if not any(name.endswith("SERE") for name in names):
        return None
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        raise ValueError(f"hf_overrides names {', '.join(unknown)}; the reference has {', '.join(ARCHITECTURES)}")
    overrides = {key: value for key, value in hf_overrides.items() if key not in ("select_top_k", "threshold")}
    overrides["architectures"] = [ARCHITECTURES[name] for name in names]
    ours = additional_config.get("sere", {})
    of_reference = {"select_top_k": SELECT_TOP_K} if ours.get("policy") != "recommended" else {}
    of_reference |= {name: hf_overrides[name] for name in ("select_top_k", "threshold") if name in hf_overrides}
    return overrides, {**additional_config, "sere": {"artifact": model, **of_reference, **ours}}


def _matrices(path: Path) -> dict[int, torch.Tensor] | None:
    """Returns the matrices by layer, or None where there are none."""
    file = path if path.suffix == ".pt" else path / MATRICES_FILE
    if file.is_file():
        try:
            matrices = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch names no common type
            raise ArtifactError(f"{file} can't be read as tensors: {error}") from error
        if not isinstance(matrices, dict) or not all(isinstance(layer, int) for layer in matrices):
            raise ArtifactError(f"{file} does not hold a matrix for each layer index")
        return matrices
    return _matrices_of_checkpoint(path)


def _matrices_of_checkpoint(path: Path) -> dict[int, torch.Tensor] | None:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = {
            path / file for name, file in json.loads(index.read_text())["weight_map"].items() if name.endswith(MATRIX)
        }
    else:
        files = set(path.glob("*.safetensors")) if path.is_dir() else set()
    matrices = {}
    for file in sorted(files):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 not a dict
                if name.endswith(MATRIX):
                    (layer,) = (int(part) for part in name.split(".") if part.isdigit())
                    matrices[layer] = tensors.get_tensor(name)
    return matrices or None


def _checked(path: Path, layer: int, matrix: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Returns a matrix of the reference as float32 with diagonal 1, as its own vLLM models load it."""
    if not isinstance(matrix, torch.Tensor) or matrix.shape != (num_experts, num_experts):
        found = tuple(matrix.shape) if isinstance(matrix, torch.Tensor) else type(matrix).__name__
        raise ArtifactError(f"{path}: the matrix of layer {layer} is {found}, the model has {num_experts} experts")
    matrix = matrix.float().clone().fill_diagonal_(1)
    if not matrix.isfinite().all():
        raise ArtifactError(f"{path}: the matrix of layer {layer} holds NaN or infinity")
    return matrix

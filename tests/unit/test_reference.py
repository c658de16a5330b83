"""Coming from the reference implementation: its files and its settings."""

import pytest
import torch
from safetensors.torch import save_file

from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.reference import load_artifact, settings_from_overrides
from sere_dist.artifact.schema import ArtifactError
from sere_dist.moe import MoeShape
from tests.support.artifacts import small_artifact

SHAPE = MoeShape("Qwen3MoeForCausalLM", num_layers=3, hidden_size=8, num_experts=4, num_experts_per_token=2)


@pytest.fixture
def matrices() -> dict[int, torch.Tensor]:
    """As the reference computes them: bfloat16, and a diagonal that rounding has moved off 1."""
    return {layer: torch.rand(4, 4, generator=torch.Generator().manual_seed(layer)).bfloat16() for layer in (1, 2)}


def check(artifact: Artifact, matrices: dict[int, torch.Tensor]) -> None:
    assert artifact.layers.keys() == matrices.keys() == artifact.config.layer_names.keys()
    for layer, matrix in matrices.items():
        assert torch.equal(artifact.layers[layer].similarity_EE, matrix.float().fill_diagonal_(1))
    artifact.check_serves(SHAPE, "model")


def test_its_matrices_file(tmp_path, matrices):
    torch.save(matrices, tmp_path / "similarity_matrices.pt")
    check(load_artifact(tmp_path, SHAPE, "model"), matrices)
    check(load_artifact(tmp_path / "similarity_matrices.pt", SHAPE, "model"), matrices)


@pytest.mark.parametrize("sharded", [False, True])
def test_its_checkpoint(tmp_path, matrices, sharded):
    tensors = {f"model.layers.{layer}.mlp.similarity_matrix": matrix for layer, matrix in matrices.items()}
    weights = {"model.embed_tokens.weight": torch.zeros(2, 2)}
    if sharded:
        for number, tensor in enumerate([*tensors.items(), *weights.items()], start=1):
            save_file(dict([tensor]), tmp_path / f"model-{number:05}-of-00003.safetensors")
        names = {name: f"model-{number:05}-of-00003.safetensors" for number, name in enumerate([*tensors, *weights], 1)}
        (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {names!r}}}'.replace("'", '"'))
    else:
        save_file(tensors | weights, tmp_path / "model.safetensors")
    check(load_artifact(tmp_path, SHAPE, "model"), matrices)


def test_an_artifact_of_ours_is_read_as_ever(tmp_path):
    artifact = small_artifact()
    artifact.save(tmp_path / "artifact")
    assert load_artifact(tmp_path / "artifact", SHAPE, "model").config.method == artifact.config.method


def test_what_can_not_be_used_is_named(tmp_path, matrices):
    with pytest.raises(ArtifactError, match=r"sere_config\.json is missing"):
        load_artifact(tmp_path, SHAPE, "model")
    file = tmp_path / "similarity_matrices.pt"
    torch.save(matrices | {0: torch.rand(5, 5)}, file)
    with pytest.raises(ArtifactError, match=r"layer 0 is \(5, 5\), the model has 4 experts"):
        load_artifact(tmp_path, SHAPE, "model")
    torch.save(matrices | {0: torch.full((4, 4), torch.nan)}, file)
    with pytest.raises(ArtifactError, match="layer 0 holds NaN"):
        load_artifact(tmp_path, SHAPE, "model")
    torch.save({"a": torch.rand(4, 4)}, file)
    with pytest.raises(ArtifactError, match="a matrix for each layer"):
        load_artifact(tmp_path, SHAPE, "model")
    torch.save({1: open}, file)  # not tensors: code, as a pickle may carry it
    with pytest.raises(ArtifactError, match="can't be read as tensors"):
        load_artifact(tmp_path, SHAPE, "model")


def test_its_overrides_become_settings():
    overrides = {"architectures": ["Qwen3MoeForCausalLMSERE"], "select_top_k": 2, "threshold": 0.1, "rope_scaling": 1}
    assert settings_from_overrides(overrides, {"other": 1}, "folder") == (
        {"architectures": ["Qwen3MoeForCausalLM"], "rope_scaling": 1},
        {"other": 1, "sere": {"artifact": "folder", "select_top_k": 2, "threshold": 0.1}},
    )
    _, additional = settings_from_overrides(
        {"architectures": ["DeepseekV2ForCausalLMSERE"]}, {"sere": {"artifact": "mine"}}, "folder"
    )
    assert additional == {"sere": {"artifact": "mine", "select_top_k": 4}}
    _, additional = settings_from_overrides(
        {"architectures": ["DeepseekV2ForCausalLMSERE"]}, {"sere": {"policy": "recommended"}}, "folder"
    )
    assert additional == {"sere": {"artifact": "folder", "policy": "recommended"}}
    assert settings_from_overrides({"architectures": ["Qwen3MoeForCausalLM"]}, {}, "folder") is None
    assert settings_from_overrides({}, {}, "folder") is None
    assert settings_from_overrides(lambda config: config, {}, "folder") is None
    with pytest.raises(ValueError, match="MixtralForCausalLMSERE; the reference has Qwen2MoeForCausalLMSERE"):
        settings_from_overrides({"architectures": ["MixtralForCausalLMSERE"]}, {}, "folder")

"""Quantised checkpoints beside what they stand for, and whether both are read, and calibrated, alike."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import expert_inputs, score_layer, text_blocks


def calibrated(folder: Path | str, revision: str | None = None) -> dict[int, torch.Tensor]:
    """Returns the similarity of each MoE layer."""
    texts = [torch.arange(3, 3 + length).tolist() for length in (9, 20, 13)]
    checkpoint = Checkpoint(str(folder), revision)
    return {
        layer: score_layer(checkpoint, layer, inputs, "frobenius").similarity_EE
        for layer, inputs in expert_inputs(checkpoint, text_blocks(texts))
    }


def assert_same_model(folder: Path, reference: Path) -> None:
    """The parameters of `folder`, loaded here, are those of `reference`, loaded by transformers, bit by bit."""
    expected = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).state_dict()
    checkpoint = Checkpoint(str(folder))
    model = checkpoint.empty_model()
    checkpoint.load(model, lambda name: True, "cpu")
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name


def assert_same_results(folder: Path, reference: Path) -> None:
    ours, theirs = calibrated(folder), calibrated(reference)
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[layer], theirs[layer]) for layer in ours)


def write_quantised(
    plain: Path, stored: dict, dequantised: dict, quantisation: dict, folder: Path | None = None
) -> tuple[Path, Path]:
    """Writes the quantised tensors beside the model `plain`, into which it writes what they stand for."""
    save_file(dequantised, plain / "model.safetensors", {"format": "pt"})
    folder = folder or plain.parent / "quantised"
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    return folder, plain

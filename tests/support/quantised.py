"""A checkpoint whose experts are INT8, as compressed-tensors has it: a scale per output, and per row at run time."""

import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
ROWS = WEIGHTS | {"strategy": "token", "dynamic": True}


def save_int8_experts(model: Path, folder: Path) -> None:
    """Copies a checkpoint, with the weights of its routed experts quantised."""
    shutil.copytree(model, folder)
    arguments, tensors = QuantizationArgs(**WEIGHTS), load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        if ".mlp.experts." in name:
            rows = weight.float()
            scale, zero = calculate_qparams(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), arguments)
            tensors[name] = quantize(rows, scale, zero, arguments, dtype=torch.int8)
            tensors[f"{name}_scale"] = scale.to(weight.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*self_attn.*"],
        "config_groups": {"experts": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": ROWS}},
    }
    (folder / "config.json").write_text(json.dumps(config))

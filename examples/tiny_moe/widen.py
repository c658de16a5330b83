"""The example model with a large model's memory traffic: the same outputs, from experts that take time to read.

The example model is too small to be slow for the reason that large ones are, which is reading the experts of a step.
Columns of zeros change no output, and are read like any others.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def widen(model: Path, folder: Path, width: int) -> Path:
    """Writes a checkpoint with the same outputs, whose experts have `width` columns: those beyond the model's are 0."""
    shutil.copytree(model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
    wide = {}
    for name, weight in load_file(model / "model.safetensors").items():
        more = width - weight.shape[-1] if "down_proj" in name else width - weight.shape[0]
        if ".experts." in name:
            weight = torch.nn.functional.pad(weight, (0, more) if "down_proj" in name else (0, 0, 0, more))
        wide[name] = weight.contiguous()
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": width}))
    return folder

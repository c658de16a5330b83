"""The example model and its texts, for everything that measures or tests with them."""

import sys
from pathlib import Path

import torch

from sere_dist.calibration.texts import load_tokenizer, read_texts, tokenise

FOLDER = Path(__file__).resolve().parent
MODEL_ID = "tiny-moe"  # its name in requests
MODEL, DRAFT = FOLDER / "model", FOLDER / "draft"  # the second drafts for the first in speculative decoding
GROUPED = FOLDER / "grouped"  # its router scores by sigmoids and chooses groups of experts first, like DeepSeek-V3's
CALIBRATION, HELDOUT = FOLDER / "calibration.parquet", FOLDER / "heldout.parquet"


def example_texts(file: str, length: int, num_texts: int = sys.maxsize) -> torch.Tensor:
    """Returns token ids [texts, length] of the example model's texts: `heldout.parquet` or `calibration.parquet`."""
    tokenizer = load_tokenizer(MODEL)
    return torch.tensor(tokenise(read_texts(str(FOLDER / file)), tokenizer, num_texts, length))

"""What is decoded wherever this project publishes a number about quality, so that all pages quote the same ones.

Held-out texts come in halves of each kind: whoever chooses a policy, a setting or a model does so on the first half
(`choice`); what is published is measured on the second (`final`). Of that half, `TEXTS` texts are cut to `LENGTH`
tokens. The first `PROMPT` tokens are prefill, and the others are decoded. Texts of all kinds alternate, because the
requests of a server's batch are strangers to each other. Similarities come from `CALIBRATION_TEXTS` other texts of
`CALIBRATION_LENGTH` tokens, in which all kinds alternate too.

Texts stand in Parquet files with the columns `text` and `kind`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from sere_dist.evaluation.lockstep import HeldOut

TEXTS, LENGTH, PROMPT = 64, 128, 32
CALIBRATION_TEXTS, CALIBRATION_LENGTH = 400, 64
BATCHES, BATCH = (1, 4, 16, 64), 16  # texts that decode together; the second is that of whatever has one batch only

Half = Literal["final", "choice"]


class Text(NamedTuple):
    kind: str
    text: str
    ids: list[int]


def read_texts(path: Path, tokenizer: Any) -> list[Text]:
    """Returns all texts of a Parquet file, in its order."""
    rows = pq.read_table(path, columns=["text", "kind"]).to_pylist()
    return [Text(row["kind"], row["text"], tokenizer(row["text"])["input_ids"]) for row in rows]


def cut(texts: Sequence[Text], length: int) -> list[Text]:
    """Returns the texts that have `length` tokens, with their ids cut to it."""
    return [text._replace(ids=text.ids[:length]) for text in texts if len(text.ids) >= length]


def by_kind(texts: Sequence[Text]) -> dict[str, list[Text]]:
    kinds = sorted({text.kind for text in texts})
    return {kind: [text for text in texts if text.kind == kind] for kind in kinds}


def half_of(texts: Sequence[Text], half: Half) -> list[Text]:
    """Returns the first half of each kind, on which choices may be made, or the second (`final`)."""
    chosen = []
    for of_kind in by_kind(texts).values():
        middle = len(of_kind) // 2
        chosen += of_kind[middle:] if half == "final" else of_kind[:middle]
    return chosen


def mixed(texts: Sequence[Text]) -> list[Text]:
    """Returns the texts so that any run of them holds all kinds, in proportion."""
    places = [((i + 0.5) / len(of_kind), text) for of_kind in by_kind(texts).values() for i, text in enumerate(of_kind)]
    return [text for _, text in sorted(places, key=lambda place: place[0])]


def held_out_texts(
    path: Path, tokenizer: Any, *, half: Half = "final", count: int = TEXTS, length: int = LENGTH
) -> list[Text]:
    """Returns the texts to decode, in the order of their batches."""
    return mixed(cut(half_of(read_texts(path, tokenizer), half), length))[:count]


def calibration_texts(
    path: Path, tokenizer: Any, *, count: int = CALIBRATION_TEXTS, length: int = CALIBRATION_LENGTH
) -> list[Text]:
    """Returns the texts to calibrate on."""
    return mixed(cut(read_texts(path, tokenizer), length))[:count]


def decoded(model: PreTrainedModel, texts: Sequence[Text], prompt: int = PROMPT) -> HeldOut:
    """Returns the texts as a model decodes them; see `HeldOut.run`."""
    return HeldOut(model, torch.tensor([text.ids for text in texts]), prompt)

"""The steps of a calibration, in one process: texts to tokens, tokens to the experts' inputs, inputs to similarities.

Shape suffixes: N tokens, H hidden size, L tokens of a text, K experts a token, E experts.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sere_dist.artifact import LayerStatistics
from sere_dist.moe import Routing, expert_outputs, hooked_experts, routed_experts
from sere_dist.similarity import (
    Kernel,
    Method,
    expert_similarity,
    expert_similarity_from_blocks,
    tokens_a_block,
)

TEXTS_A_FORWARD = 8


def read_texts(path: Path) -> Iterator[str]:
    """Yields the `text` column of a Parquet file, or of a folder of them, row by row.

    Raises:
        ValueError: there is no such file, it is not Parquet (noticed at the row that can't be read), or it has no
            column `text` of strings.
    """
    if not path.exists():
        raise ValueError(f"--dataset {path}: no such file or folder")
    files = [str(file) for file in sorted(path.rglob("*.parquet"))] if path.is_dir() else [str(path)]
    if not files:
        raise ValueError(f"--dataset {path}: the folder holds no .parquet file")
    for file in files:
        try:
            schema = pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"--dataset {file}: not readable as Parquet: {error}") from error
        if "text" not in schema.names:
            raise ValueError(
                f"--dataset {file}: no column 'text' (it has {', '.join(schema.names)}); rename the one to use"
            )
        kind = schema.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"--dataset {file}: the column 'text' holds {kind}, not strings")
    return _rows(path, files)


def _rows(path: Path, files: list[str]) -> Iterator[str]:
    if not any(pq.read_metadata(file).num_rows for file in files):  # which datasets can't stream
        return
    try:
        for row in datasets.load_dataset("parquet", data_files=files, split="train", streaming=True):
            yield row["text"]
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"--dataset {path}: damaged: {error}") from error


def tokenise(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, num_samples: int, max_length: int
) -> torch.Tensor:
    """Returns int64 [texts, L]: the first `num_samples` texts that have `max_length` tokens, cut to that length.

    Each text is tokenised on its own, with the tokenizer's default special tokens; shorter ones are left out.

    Raises:
        ValueError: not one text is long enough.
    """
    kept, longest, seen = [], 0, 0
    for text in texts:
        ids = tokenizer(text or "")["input_ids"]
        seen, longest = seen + 1, max(longest, len(ids))
        if len(ids) >= max_length:
            kept.append(ids[:max_length])
        if len(kept) == num_samples:
            break
    if not kept:
        raise ValueError(
            f"no usable text: the longest of {seen} has {longest} tokens and --max-length is {max_length}; "
            "lower --max-length or give longer texts"
        )
    return torch.tensor(kept)


@dataclass
class ExpertInputs:
    """What the experts of one layer got during the calibration forward pass, and their weights."""

    hidden_states_NH: torch.Tensor
    tokens_per_expert_E: torch.Tensor
    weights: dict[str, torch.Tensor]


@torch.inference_mode()
def capture_expert_inputs(model: PreTrainedModel, ids_BL: torch.Tensor) -> dict[int, ExpertInputs]:
    """Runs the texts through the model and returns what reached the experts of each MoE layer."""
    experts = routed_experts(model)
    hidden: dict[int, list[torch.Tensor]] = {layer: [] for layer in experts}
    counts = {layer: torch.zeros(module.num_experts, dtype=torch.long) for layer, (_, module) in experts.items()}

    def keep(layer: int, routing: Routing) -> None:
        hidden_states_NH, top_k_index_NK, _ = routing
        hidden[layer].append(hidden_states_NH.cpu())
        counts[layer] += torch.bincount(top_k_index_NK.flatten().cpu(), minlength=len(counts[layer]))

    with hooked_experts(model, keep):
        for batch in ids_BL.split(TEXTS_A_FORWARD):
            model.model(batch.to(model.device))
    return {
        layer: ExpertInputs(
            torch.cat(hidden[layer]), counts[layer], {name: w.detach().cpu() for name, w in module.state_dict().items()}
        )
        for layer, (_, module) in experts.items()
    }


@torch.inference_mode()
def score_layer(
    config: PretrainedConfig, layer: int, inputs: ExpertInputs, method: Method, kernel: Kernel, device: str
) -> tuple[torch.Tensor, LayerStatistics]:
    """Returns the similarity [E, E] of one layer's experts, and its row of `layers.csv`.

    Only this layer's experts are built: the rest of the model stays on the meta device.
    """
    started = time.perf_counter()
    name, experts = routed_experts(empty_model(config))[layer]
    experts.load_state_dict(inputs.weights, assign=True)
    experts.to(device)
    hidden_states_NH = inputs.hidden_states_NH.to(device)
    if method == "cka":
        similarity_EE = expert_similarity(expert_outputs(experts, hidden_states_NH), method, kernel)
    else:
        block = tokens_a_block(experts.num_experts, hidden_states_NH.shape[1])
        blocks = (expert_outputs(experts, block_BH) for block_BH in hidden_states_NH.split(block))
        similarity_EE = expert_similarity_from_blocks(blocks, method)
    similarity_EE = similarity_EE.cpu()

    tokens = inputs.tokens_per_expert_E
    different = similarity_EE[~torch.eye(len(similarity_EE), dtype=torch.bool)]
    statistics = LayerStatistics(
        layer=layer,
        name=name,
        tokens_per_expert_min=int(tokens.min()),
        tokens_per_expert_median=float(tokens.double().quantile(0.5)),
        similarity_mean=float(different.mean()),
        similarity_min=float(different.min()),
        similarity_max=float(different.max()),
        seconds=round(time.perf_counter() - started, 3),
    )
    return similarity_EE, statistics


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Returns the model without weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load_model(name: str, device: str) -> PreTrainedModel:
    """Returns the whole model in float32, ready to run."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()

"""The steps of a calibration: through one decoder layer, to what its experts get, to how similar they are.

Each step loads the part of the checkpoint that it needs and takes its tokens block by block, so that neither the model
nor the tokens' states are ever in memory whole. Nothing here knows Ray. Shape suffixes: B texts of a block, L tokens of
the longest text, N tokens (padding left out), H hidden size, K experts per token, E experts.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from sere_dist.artifact.layer import Layer, LayerStatistics
from sere_dist.artifact.sources import SourceStatistics
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.memory import is_out_of_memory, with_halving
from sere_dist.method.blocks import BLOCK_BYTES
from sere_dist.method.certainty import Certainty, certainty_of
from sere_dist.method.cka import Kernel
from sere_dist.method.similarity import (
    METHODS,
    SIMILARITY_OF_GROUPS,
    MethodName,
    OfGroups,
    Projection,
    expert_similarity,
    projection_of_groups,
    random_similarity,
    tokens_a_block,
    weight_similarity,
)
from sere_dist.method.sources import fits_of_sources, of_all_sources
from sere_dist.moe import RoutedExperts, Routing, decoder_layers, expert_outputs, hooked_experts, routed_experts

TOKENS_A_FORWARD = 4096
BLOCK_BYTES_ON = {"cpu": BLOCK_BYTES, "cuda": 8 * 2**30}


class Texts(NamedTuple):
    """A block of tokenised texts, padded on the right. A causal model's tokens never see what comes after them."""

    ids_BL: np.ndarray
    lengths_B: np.ndarray
    group: int = 0  # of texts: see `certainty`
    source: str = ""  # of the texts: see `sources`

    @property
    def is_token_BL(self) -> np.ndarray:
        return np.arange(self.ids_BL.shape[1]) < self.lengths_B[:, None]


class ExpertInputs(NamedTuple):
    """What reached the experts of one layer from one block of texts, padding left out."""

    hidden_states_NH: np.ndarray
    top_k_index_NK: np.ndarray
    top_k_weights_NK: np.ndarray
    group: int = 0  # that the texts belong to
    source: str = ""


@dataclass
class LayerResult(Layer):
    """What a calibration finds about the experts of one layer.

    Attributes:
        block_tokens: tokens taken at a time in the end.
        halved: how often memory ran out before.
    """

    block_tokens: int = 0
    halved: int = 0


def text_blocks(
    texts: Sequence[Sequence[int]],
    tokens_a_block: int = TOKENS_A_FORWARD,
    groups: int = 1,
    sources: Sequence[str] | None = None,
) -> list[Texts]:
    """Pads the token ids of texts, the longest first, into blocks of about `tokens_a_block` tokens.

    A block holds texts of one group and of one source. Groups are runs of each source's texts in the order given, of
    about equal numbers of texts. Their number is even, so that they make halves: `groups`, or what the source with the
    most texts has texts for. Without `sources` all texts are of one.
    """
    by_source: dict[str, list[Sequence[int]]] = {}
    for text, source in zip(texts, sources or [""] * len(texts), strict=True):
        by_source.setdefault(source, []).append(text)
    count = max(1, min(groups, max(map(len, by_source.values()), default=0)) // 2 * 2)
    blocks = []
    for group in range(count):
        for source, of_source in by_source.items():
            start, stop = (len(of_source) * edge // count for edge in (group, group + 1))
            left = sorted(of_source[start:stop], key=len, reverse=True)
            while left:
                taken = left[: max(1, tokens_a_block // len(left[0]))]
                ids_BL = np.zeros((len(taken), len(taken[0])), dtype=np.int64)
                for row, text in zip(ids_BL, taken, strict=True):
                    row[: len(text)] = text
                blocks.append(Texts(ids_BL, np.array([len(text) for text in taken]), group, source))
                left = left[len(taken) :]
    return blocks


@torch.no_grad()
def run_layer(
    checkpoint: Checkpoint,
    layer: int,
    blocks: Sequence[Texts],
    hidden_states: Sequence[np.ndarray] | None,
    device: str = "cpu",
    tokens_a_forward: int = TOKENS_A_FORWARD,
) -> Iterator[tuple[np.ndarray, ExpertInputs | None]]:
    """Runs blocks of texts through one decoder layer; yields, block by block, its output [B, L, H] and what its experts
    got, None if it has none. Only this layer's weights are loaded, and for layer 0 the embeddings.

    `hidden_states` are the outputs of the layer before, None for layer 0. A forward takes `tokens_a_forward` tokens,
    and half as many for good once memory runs out.

    Raises:
        ValueError: the layer can't be loaded, or the model does not run layer by layer.
        MemoryError: not even one text fits.
    """
    model, decoder, module = load_layer(checkpoint, layer, device)
    for block, states in zip(blocks, hidden_states or [None] * len(blocks), strict=True):
        states_BLH = None if states is None else torch.from_numpy(np.array(states))
        texts = max(1, tokens_a_forward // block.ids_BL.shape[1])

        def forward(texts: int, block=block, states_BLH=states_BLH) -> tuple[np.ndarray, ExpertInputs | None]:
            outputs, inputs = [], []
            for start in range(0, len(block.ids_BL), texts):
                part = slice(start, start + texts)
                ids_BL = torch.from_numpy(block.ids_BL[part]).to(device)
                given_BLH = None if states_BLH is None else states_BLH[part].to(device)
                output_BLH, routing = forward_layer(model, decoder, module, ids_BL, given_BLH)
                outputs.append(output_BLH.cpu())
                if routing:
                    is_token_N = torch.from_numpy(block.is_token_BL[part].flatten())
                    inputs.append([tensor.cpu()[is_token_N] for tensor in routing])
            reached = ExpertInputs(*_joined(inputs), block.group, block.source) if inputs else None
            return torch.cat(outputs).numpy(), reached

        result, texts_at_last = with_halving(texts, forward, f"the forward pass through layer {layer}")
        if texts_at_last < texts:
            tokens_a_forward = texts_at_last * block.ids_BL.shape[1]
        yield result


def load_layer(
    checkpoint: Checkpoint, layer: int, device: str
) -> tuple[PreTrainedModel, torch.nn.Module, torch.nn.Module]:
    """Returns the model with one decoder layer's weights, and for layer 0 the embeddings; its decoder; that layer.

    The decoder's own forward makes masks and positions and calls every layer: the others let the hidden states pass.
    """
    model = checkpoint.empty_model()
    stack, layers = decoder_layers(model)
    decoder_name = stack.rpartition(".")[0]
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())

    def needed(parameter: str) -> bool:
        if parameter.startswith(f"{stack}."):
            return parameter.startswith(f"{stack}.{layer}.")
        in_decoder = parameter.startswith(f"{decoder_name}.")
        return in_decoder and (layer == 0 or not parameter.startswith(f"{embedding}."))

    load_part(checkpoint, model, needed, device, f"loading layer {layer}")
    let_pass(module for index, module in enumerate(layers) if index != layer)
    return model, model.get_submodule(decoder_name), layers[layer]


def load_head(checkpoint: Checkpoint, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns what makes logits [B, L, V] of the states [B, L, H] that the last decoder layer gives."""
    model = checkpoint.empty_model()
    stack, layers = decoder_layers(model)
    load_part(checkpoint, model, lambda name: not name.startswith(f"{stack}."), device, "loading the output layer")
    let_pass(layers)

    def logits_of(states_BLH: torch.Tensor) -> torch.Tensor:
        with given_states(layers[0], states_BLH):
            return model(inputs_embeds=states_BLH, use_cache=False).logits

    return logits_of


def load_part(
    checkpoint: Checkpoint, model: PreTrainedModel, needed: Callable[[str], bool], device: str, what: str
) -> None:
    """Loads the parameters that are needed, and moves the buffers that no file holds to the device, too."""
    with_halving(1, lambda _: checkpoint.load(model, needed, device), what)
    for buffer in model.buffers():
        if not buffer.is_meta:
            buffer.data = buffer.data.to(device)


def let_pass(layers: Iterable[torch.nn.Module]) -> None:
    """Makes decoder layers return the hidden states that they get."""
    for layer in layers:
        layer.forward = _pass


def _pass(hidden_states: torch.Tensor, *_args, **_kwargs) -> torch.Tensor:
    return hidden_states


def _joined(parts: list[list[torch.Tensor]]) -> Iterator[np.ndarray]:
    hidden_NH, index_NK, weights_NK = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    yield from (hidden_NH.numpy(), index_NK.to(torch.int32).numpy(), weights_NK.float().numpy())


def forward_layer(
    model: PreTrainedModel,
    decoder: torch.nn.Module,
    layer: torch.nn.Module,
    ids_BL: torch.Tensor,
    hidden_BLH: torch.Tensor | None,
) -> tuple[torch.Tensor, Routing | None]:
    """Returns the output of the only decoder layer that is loaded, and what its experts got.

    Raises:
        ValueError: the model does not run layer by layer.
    """
    outputs: list[torch.Tensor] = []
    routings: list[Routing] = []

    handle = layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    why = "a decoder layer was not called just once, with a tensor for its output"
    try:
        with hooked_experts(model, lambda _layer, routing: routings.append(routing)), given_states(layer, hidden_BLH):
            given = {"input_ids": ids_BL} if hidden_BLH is None else {"inputs_embeds": hidden_BLH}
            decoder(**given, use_cache=False)
    except (ValueError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        why, outputs = f"{type(error).__name__}: {error}", []
    finally:
        handle.remove()
    if not (len(outputs) == 1 and isinstance(outputs[0], torch.Tensor) and len(routings) <= 1):
        raise ValueError(f"{model.config.model_type} can't be run layer by layer here: {why}")
    return outputs[0], routings[0] if routings else None


@contextmanager
def given_states(layer: torch.nn.Module, hidden_BLH: torch.Tensor | None) -> Generator[None]:
    """Gives a decoder layer these hidden states instead of its own, if any.

    `inputs_embeds` alone would not do: some models scale those before the first layer.
    """

    def replace(_module, args: tuple, kwargs: dict):
        return ((hidden_BLH, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_BLH})

    with nullcontext() if hidden_BLH is None else layer.register_forward_pre_hook(replace, with_kwargs=True):
        yield


@torch.no_grad()
def expert_inputs(
    checkpoint: Checkpoint, blocks: Sequence[Texts], device: str = "cpu"
) -> Iterator[tuple[int, list[ExpertInputs]]]:
    """Yields each MoE layer's index and what reached its experts, block by block, in this process alone."""
    last = max(routed_experts(checkpoint.empty_model()))
    hidden_states = None
    for layer in range(last + 1):
        hidden_states, inputs = zip(*run_layer(checkpoint, layer, blocks, hidden_states, device), strict=True)
        if inputs[0] is not None:
            yield layer, list(inputs)


class _Rows:
    """Arrays [n, ...] one after the other, as one that is read when sliced."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
        self.starts = np.cumsum([0, *map(len, arrays)]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(len(self))
        parts = [
            array[max(0, start - first) : stop - first]
            for first, array in zip(self.starts, self.arrays, strict=False)
            if first < stop and start < first + len(array)
        ]
        return torch.from_numpy(np.concatenate(parts))  # a copy: mapped memory stays unwritten


class ExpertOutputs:
    """Outputs [E, N, H] of every expert of a layer on every token, computed when sliced."""

    def __init__(self, experts: RoutedExperts, inputs: Sequence[ExpertInputs], device: str):
        self.experts, self.device = experts, device
        self.hidden = _Rows([block.hidden_states_NH for block in inputs])
        self.shape = (experts.num_experts, len(self.hidden), inputs[0].hidden_states_NH.shape[1])

    def __getitem__(self, index: tuple[slice, slice]) -> torch.Tensor:
        experts, tokens = index
        which = range(*experts.indices(self.shape[0]))
        return expert_outputs(self.experts, self.hidden[tokens].to(self.device), which)


class RoutingWeights:
    """Router weights [N, E], 0 where a token was not routed to an expert, spread out when sliced."""

    def __init__(self, inputs: Sequence[ExpertInputs], num_experts: int, device: str):
        self.device = device
        self.index = _Rows([block.top_k_index_NK for block in inputs])
        self.weights = _Rows([block.top_k_weights_NK for block in inputs])
        self.shape = (len(self.index), num_experts)

    def __getitem__(self, index: tuple[slice, slice]) -> torch.Tensor:
        tokens, experts = index
        index_NK = self.index[tokens].long()
        weights_NE = torch.zeros(len(index_NK), self.shape[1]).scatter_add_(1, index_NK, self.weights[tokens])
        return weights_NE[:, experts].to(self.device)


@torch.no_grad()
def score_layer(
    checkpoint: Checkpoint,
    layer: int,
    inputs: Sequence[ExpertInputs],
    method: MethodName,
    kernel: Kernel = "linear",
    seed: int = 0,
    block_tokens: int | None = None,
    device: str = "cpu",
) -> LayerResult:
    """Returns how similar one layer's experts are; loads these experts and nothing else.

    `inputs` are empty for methods without data. Takes `block_tokens` at a time (default: what suits the method), and
    half as many whenever memory runs out.

    Raises:
        ValueError: the experts can't be loaded.
        MemoryError: not even one token at a time fits.
    """
    started = time.perf_counter()
    model = checkpoint.empty_model()
    name, experts = routed_experts(model)[layer]
    if METHODS[method].needs_weights:
        with_halving(
            1,
            lambda _: checkpoint.load(model, lambda parameter: parameter.startswith(f"{name}."), device),
            f"loading the experts of layer {layer}",
        )
    tokens_E, coactivation_EE, projection, certainty, sources, halved = None, None, None, None, [], 0
    if method == "random":
        similarity_EE, block_tokens = random_similarity(experts.num_experts, seed + layer), 0
    elif method == "weights":
        similarity_EE, block_tokens = weight_similarity(experts.parameters()), 0
    else:
        inputs = sorted(inputs, key=lambda block: block.group)
        outputs = ExpertOutputs(experts, inputs, device)
        num_experts, num_tokens, hidden_size = outputs.shape
        default_block = tokens_a_block(num_experts, hidden_size, METHODS[method], BLOCK_BYTES_ON[device])
        first_block = min(num_tokens, block_tokens or default_block)
        (similarity_EE, projection, certainty, sources), block_tokens = with_halving(
            first_block,
            lambda block: _scores(layer, outputs, inputs, method, kernel, block, device),
            f"scoring layer {layer}",
        )
        halved = (first_block // block_tokens).bit_length() - 1
        tokens_E = torch.zeros(num_experts, dtype=torch.int64)
        for block in inputs:
            tokens_E += torch.bincount(torch.from_numpy(block.top_k_index_NK.flatten()), minlength=num_experts)
        coactivation_EE = coactivation(inputs, num_experts)
    similarity_EE = similarity_EE.cpu()
    statistics = LayerStatistics.of(
        layer,
        name,
        similarity_EE,
        tokens_E,
        time.perf_counter() - started,
        None if projection is None else float(projection.mean_square),
        certainty,
    )
    return LayerResult(
        similarity_EE,
        statistics,
        None if projection is None else projection.coefficient_EE.cpu(),
        None if projection is None else projection.size_E.cpu(),
        coactivation_EE,
        tokens_E,
        None if projection is None else projection.saliency_E.cpu(),
        sources,
        block_tokens,
        halved,
    )


def _scores(
    layer: int,
    outputs: ExpertOutputs,
    inputs: Sequence[ExpertInputs],
    method: MethodName,
    kernel: Kernel,
    block_tokens: int,
    device: str,
) -> tuple[torch.Tensor, Projection | None, Certainty | None, list[SourceStatistics]]:
    """Returns similarities [E, E] from the outputs on `inputs`, which are in the order of their groups.

    Beside them: the projection, of that method alone; and how surely similarities are known, and how well they serve
    each source of the texts, of methods whose sums are kept by group.
    """
    tokens_of = token_groups(inputs)
    members, groups = list(tokens_of), list(tokens_of.values())  # a member is a group of texts and a source
    whole = None
    if method == "projection":
        weights = RoutingWeights(inputs, outputs.shape[0], device)
        projected = projection_of_groups(outputs, weights, groups, block_tokens)
        whole = projected(range(len(groups)))

        def similarity_of(chosen: Sequence[int]) -> torch.Tensor:
            return projected(chosen).similarity_EE

    elif method in SIMILARITY_OF_GROUPS:
        similarity_of = SIMILARITY_OF_GROUPS[method](outputs, groups, block_tokens)
    else:
        return expert_similarity(outputs, method, kernel, block_tokens), None, None, []
    similarity_EE = similarity_of(range(len(groups))) if whole is None else whole.similarity_EE
    certainty = certainty_of(*of_all_sources(similarity_of, members))
    return similarity_EE, whole, certainty, source_statistics(layer, similarity_of, tokens_of)


def token_groups(inputs: Sequence[ExpertInputs]) -> dict[tuple[int, str], slice]:
    """Returns the tokens of each group of texts and source, where the blocks of these follow one another."""
    ends = accumulate(len(block.hidden_states_NH) for block in inputs)
    last = {(block.group, block.source): end for block, end in zip(inputs, ends, strict=True)}
    return dict(zip(last, (slice(*edges) for edges in pairwise([0, *last.values()])), strict=True))


def source_statistics(
    layer: int, similarity_of: OfGroups, tokens_of: Mapping[tuple[int, str], slice]
) -> list[SourceStatistics]:
    """Returns how well a layer's substitutes serve each source of the texts; nothing where there is one.

    Args:
        layer: its index.
        similarity_of: gives the similarities by some groups of texts and sources, named by their places.
        tokens_of: their tokens.
    """
    tokens: dict[str, int] = {}
    for (_, source), these in tokens_of.items():
        tokens[source] = tokens.get(source, 0) + these.stop - these.start
    if len(tokens) == 1:
        return []
    fits = fits_of_sources(similarity_of, list(tokens_of))
    return [
        SourceStatistics(layer=layer, source=source, tokens=count, **(fit._asdict() if (fit := fits[source]) else {}))
        for source, count in tokens.items()
    ]


def coactivation(inputs: Sequence[ExpertInputs], num_experts: int) -> torch.Tensor:
    """Returns [E, E], float32: products of the router weights that a token gave two experts, summed over tokens."""
    weights_NE = RoutingWeights(inputs, num_experts, "cpu")
    sum_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for start in range(0, len(weights_NE.index), TOKENS_A_FORWARD):
        part_NE = weights_NE[start : start + TOKENS_A_FORWARD, :].double()
        sum_EE += part_NE.T @ part_NE
    return sum_EE.float()

"""What an error of a layer's experts costs: nats of KL divergence of the next tokens, to first order, from data.

An error d of what the experts give to one token changes the distributions of the next tokens by a KL divergence of
d' F d / 2. F is their Fisher information there: the mean of g g', where g is the gradient of the log-probability of
tokens that are drawn from the model's own distributions. Of an error in no particular direction that is

    |d|² E[|g|²] / 2H.

The gradient goes back through the layers one at a time, as the texts went forward, so one layer is in memory. Shape
suffixes: B texts, L tokens of the longest text, H hidden size, V tokens of the vocabulary.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch

from sere_dist.artifact.layer import Layer
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import (
    Texts,
    forward_layer,
    load_head,
    load_layer,
    run_layer,
    text_blocks,
)
from sere_dist.moe import decoder_layers, routed_experts
from sere_dist.standard_errors import with_error

TOKENS_A_BACKWARD = 1024  # the logits and all that a layer keeps for its gradient are in memory at once


class Sensitivity(NamedTuple):
    """Nats per token that a squared error of 1 of a layer's experts costs, and its standard error over texts."""

    nats: float
    error: float


Sensitivities = dict[int, Sensitivity]  # by decoder layer index


def layer_sensitivities(
    checkpoint: Checkpoint, texts: Sequence[Sequence[int]], device: str = "cpu", seed: int = 0
) -> Sensitivities:
    """Returns the sensitivity of each MoE layer on these texts (token ids), of which there are at least two.

    Reads the checkpoint twice. The states of all layers are in memory: 4 H bytes per layer and token.

    Raises:
        ValueError: the model can't be loaded, or does not run layer by layer.
    """
    blocks = text_blocks(texts, TOKENS_A_BACKWARD)
    _, layers = decoder_layers(checkpoint.empty_model())
    states: list[list[np.ndarray]] = []  # that each layer gives
    for layer in range(len(layers)):
        given = states[-1] if states else None
        states.append([output for output, _ in run_layer(checkpoint, layer, blocks, given, device)])
    gradients = _gradients_of_states(checkpoint, blocks, states.pop(), device, seed)
    found: Sensitivities = {}
    for layer in reversed(range(len(layers))):
        given = states.pop() if states else None
        gradients, squares = _back_through(checkpoint, layer, blocks, given, gradients, device)
        if squares:
            found[layer] = Sensitivity(*with_error(squares))
    return dict(sorted(found.items()))


def weigh_layers(layers: Mapping[int, Layer], found: Sensitivities) -> float | None:
    """Writes what an error costs into the layers' statistics, relative to the mean over layers; returns this mean.

    It is None where nothing was measured, or where no error of any layer costs anything.
    """
    costs = {layer: found[layer].nats * (layers[layer].statistics.mean_square or 0) for layer in found}
    mean = math.fsum(costs.values()) / len(costs) if costs else 0.0
    if not (0 < mean < math.inf):
        return None
    for layer, cost in costs.items():
        statistics = layers[layer].statistics
        statistics.sensitivity = cost / mean
        statistics.sensitivity_error = found[layer].error * (statistics.mean_square or 0) / mean
    return mean


def _gradients_of_states(
    checkpoint: Checkpoint, blocks: Sequence[Texts], states: Sequence[np.ndarray], device: str, seed: int
) -> list[np.ndarray]:
    """Returns the gradients [B, L, H] of the drawn tokens' log-probabilities by what the last layer gives."""
    logits_of = load_head(checkpoint, device)
    generator = torch.Generator(device).manual_seed(seed)
    gradients = []
    for block, block_states in zip(blocks, states, strict=True):
        states_BLH = torch.from_numpy(block_states).to(device).requires_grad_()
        log_p_NV = (
            logits_of(states_BLH).flatten(0, 1).float().log_softmax(-1)[torch.from_numpy(block.is_token_BL.flatten())]
        )
        drawn_N1 = torch.multinomial(log_p_NV.detach().exp(), 1, generator=generator)
        (gradient_BLH,) = torch.autograd.grad(log_p_NV.gather(1, drawn_N1).sum(), states_BLH)
        gradients.append(gradient_BLH.cpu().numpy())
    return gradients


def _back_through(
    checkpoint: Checkpoint,
    layer: int,
    blocks: Sequence[Texts],
    states: Sequence[np.ndarray] | None,
    gradients: Sequence[np.ndarray],
    device: str,
) -> tuple[list[np.ndarray], list[float]]:
    """Takes gradients from a layer's output back to its input; those of layer 0 stay, as nothing comes before it.

    Returns them, and for each text what `Sensitivity.nats` is the mean of, nothing where the layer has no experts.
    """
    model, decoder, module = load_layer(checkpoint, layer, device)
    name, _ = routed_experts(model).get(layer, (None, None))
    before, squares = [], []
    for block, block_states, gradient in zip(blocks, states or [None] * len(blocks), gradients, strict=True):
        states_BLH = None if block_states is None else torch.from_numpy(block_states).to(device).requires_grad_()
        probes: list[torch.Tensor] = []
        with nullcontext() if name is None else _probed(model.get_submodule(name), probes):
            output_BLH, _ = forward_layer(model, decoder, module, torch.from_numpy(block.ids_BL).to(device), states_BLH)
        wanted = [*probes, *([] if states_BLH is None else [states_BLH])]
        found = list(torch.autograd.grad(output_BLH, wanted, torch.from_numpy(gradient).to(device))) if wanted else []
        if probes:
            square_BL = found.pop(0).square().sum(-1).view(block.ids_BL.shape).cpu().numpy()
            of_texts = (square_BL * block.is_token_BL).sum(1) / block.lengths_B
            squares += (of_texts / (2 * gradient.shape[-1])).tolist()
        before.append(found[0].cpu().numpy() if found else gradient)
    return before, squares


@contextmanager
def _probed(experts: torch.nn.Module, probes: list[torch.Tensor]) -> Generator[None]:
    """Adds zeros to what the experts give, and puts them into `probes`: their gradient is that of an error there."""

    def add(_module: torch.nn.Module, _args: tuple, output_NH: torch.Tensor) -> torch.Tensor:
        probes.append(torch.zeros_like(output_NH, requires_grad=True))
        return output_NH + probes[-1]

    with experts.register_forward_hook(add):
        yield

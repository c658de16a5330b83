"""How alike are the experts of a layer? Computed from the outputs of every expert on the same tokens.

Pure functions on tensors. Shape suffixes: E experts, N tokens, H hidden size, B tokens of a block. Every method reduces
to inner products between experts, summed over tokens (or, for CKA, over pairs of tokens), so one matrix product holds
all pairs of experts and no loop over pairs is needed. Sums are float64: experts of upcycled models are nearly equal,
and a distance taken from float32 inner products would be rounding noise.
"""

from collections.abc import Iterable
from typing import Literal, get_args

import torch
import torch.nn.functional as F

Method = Literal["frobenius", "cosine", "cka"]
Kernel = Literal["linear", "polynomial", "rbf"]

BLOCK_BYTES = 256 * 2**20  # of float64 expert outputs, taken at a time


def expert_similarity(
    outputs_ENH: torch.Tensor, method: Method = "frobenius", kernel: Kernel = "linear"
) -> torch.Tensor:
    """Returns the similarity [E, E], float32, symmetric, diagonal 1, of experts with these outputs [E, N, H].

    `frobenius` (the paper's default): 1 - d / max(d), d the Frobenius distance between two experts' outputs, the
    maximum over the layer's pairs. `cosine`: the mean over tokens of (cos + 1) / 2. `cka`: centred kernel alignment
    with the given `kernel`, clamped to [0, 1]; it compares all pairs of tokens and needs `cka_bytes`.

    Raises:
        ValueError: the method or the kernel is unknown.
    """
    if method not in get_args(Method):
        raise ValueError(f"method {method!r} is not one of {', '.join(get_args(Method))}")
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel {kernel!r} is not one of {', '.join(get_args(Kernel))}")
    if method == "cka":
        return _cka(outputs_ENH, kernel)
    num_experts, _, hidden = outputs_ENH.shape
    return expert_similarity_from_blocks(outputs_ENH.split(tokens_a_block(num_experts, hidden), dim=1), method)


def tokens_a_block(num_experts: int, hidden_size: int) -> int:
    """Returns how many tokens' outputs of all experts fit into BLOCK_BYTES, at least 1."""
    return max(1, BLOCK_BYTES // (8 * num_experts * hidden_size))


def cka_bytes(num_experts: int, num_tokens: int) -> int:
    """Returns the memory that `cka` needs: all experts' Gram matrices [E, N, N] in float64."""
    return 8 * num_experts * num_tokens**2


def expert_similarity_from_blocks(blocks_EBH: Iterable[torch.Tensor], method: Method = "frobenius") -> torch.Tensor:
    """Returns `expert_similarity` of the blocks' tokens taken together, holding one block [E, B, H] at a time.

    Raises:
        ValueError: the method does not add up over tokens (`cka`), or is unknown; or there is no token.
    """
    features = {"frobenius": _centred_over_experts, "cosine": _unit_outputs}.get(method)
    if features is None:
        raise ValueError(f"method {method!r} is not one of frobenius, cosine")
    num_tokens, gram_EE = 0, None
    for outputs_EBH in blocks_EBH:
        flat = features(outputs_EBH.double()).flatten(1)
        product = flat @ flat.T
        gram_EE = product if gram_EE is None else gram_EE + product
        num_tokens += outputs_EBH.shape[1]
    if num_tokens == 0:
        raise ValueError("no tokens: similarity needs the experts' outputs on at least one")
    if method == "cosine":
        return _finish((gram_EE / num_tokens + 1) / 2)
    squared = gram_EE.diagonal()
    distance_EE = (squared[:, None] + squared[None, :] - 2 * gram_EE).clamp(min=0).sqrt()
    distance_EE.fill_diagonal_(0)
    largest = distance_EE.max()
    return _finish(1 - distance_EE / largest if largest > 0 else torch.ones_like(distance_EE))


def _centred_over_experts(outputs_EBH: torch.Tensor) -> torch.Tensor:
    """What the experts share at a token cancels in every distance; without it the differences keep their digits."""
    return outputs_EBH - outputs_EBH.mean(dim=0, keepdim=True)


def _unit_outputs(outputs_EBH: torch.Tensor) -> torch.Tensor:
    return F.normalize(outputs_EBH, dim=-1)


def _cka(outputs_ENH: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    features = []
    for outputs_NH in outputs_ENH:
        gram_NN = _KERNELS[kernel](outputs_NH.double())
        centred = gram_NN - gram_NN.mean(dim=0, keepdim=True) - gram_NN.mean(dim=1, keepdim=True) + gram_NN.mean()
        # Scaled first: the outputs of a deep model's first layers are small, and their squares' squares vanish.
        features.append(F.normalize(_scaled(centred.flatten()), dim=0))
    flat = torch.stack(features)
    return _finish((flat @ flat.T).clamp(0, 1))


def _scaled(x: torch.Tensor) -> torch.Tensor:
    largest = x.abs().max()
    return x / largest if largest > 0 else x


def _linear(x_NH: torch.Tensor) -> torch.Tensor:
    return x_NH @ x_NH.T


def _polynomial(x_NH: torch.Tensor) -> torch.Tensor:
    return (x_NH @ x_NH.T + 1) ** 2


def _rbf(x_NH: torch.Tensor) -> torch.Tensor:
    squared = torch.cdist(x_NH, x_NH, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    variance = squared.var()
    return torch.exp(-squared / (2 * variance)) if variance > 1e-8 else torch.ones_like(squared)


_KERNELS = {"linear": _linear, "polynomial": _polynomial, "rbf": _rbf}


def _finish(similarity_EE: torch.Tensor) -> torch.Tensor:
    """Makes the matrix exactly symmetric with a diagonal of exactly 1."""
    similarity_EE = (similarity_EE + similarity_EE.T) / 2
    return similarity_EE.fill_diagonal_(1).float()

"""How alike are the experts of a layer? Computed from the outputs of every expert on the same tokens.

Pure functions on tensors. Shape suffixes: E experts, N tokens, H hidden size, B and C tokens of a block, G groups of
tokens. Outputs [E, N, H] are a tensor, or anything with its `shape` that gives a tensor when sliced,
`outputs[experts, tokens]`: then nothing that grows with the number of tokens is ever in memory at once.

No method loops over pairs of experts. Frobenius, cosine and projection are sums over tokens of something made of one
token's Gram matrix [E, E] of expert outputs; CKA is a sum over pairs of tokens, taken over pairs of blocks. Products
within a few tokens are float32, except CKA's; sums over tokens are float64. Groups of tokens can have their own sums.
Then what some of the tokens alone would give takes no second pass.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch

from sere_dist.method.blocks import BLOCK_BYTES, Outputs, float64_zeros, split_evenly
from sere_dist.method.cka import Kernel, expert_cka, rows_per_block

MethodName = Literal["frobenius", "cosine", "cka", "projection", "weights", "random"]


class Method(NamedTuple):
    """What a similarity method needs, and what it leaves."""

    name: str
    needs_weights: bool = True  # of the experts
    needs_data: bool = True  # the outputs that the experts give for tokens
    has_kernel: bool = False  # it compares kernel matrices [N, N]: its sums go over pairs of tokens
    directed: bool = False  # expert j may replace i better than i replaces j
    tensors: tuple[str, ...] = ("similarity",)  # per layer


METHODS = {
    method.name: method
    for method in (
        Method("frobenius"),
        Method("cosine"),
        Method("cka", has_kernel=True),
        Method("projection", directed=True, tensors=("similarity", "coefficient", "size")),
        Method("weights", needs_data=False),
        Method("random", needs_data=False, needs_weights=False),
    )
}

# The similarity [E, E] by the tokens of some groups alone, named by their places. It makes no pass over the tokens.
OfGroups = Callable[[Sequence[int]], torch.Tensor]

GRAM_TOKENS = 64  # whose products are summed in float32, or whose Gram matrices exist at a time
FLOAT32_ERROR = 1e-6  # of an inner product over GRAM_TOKENS, relative to the factors' sizes; 5e-8 is usual
TOLERANCE = 1e-5  # of a similarity


def expert_similarity(
    outputs_ENH: torch.Tensor | Outputs,
    method: MethodName = "frobenius",
    kernel: Kernel = "linear",
    block_tokens: int | None = None,
) -> torch.Tensor:
    """Returns the similarity [E, E], float32, symmetric, diagonal 1, of experts with these outputs.

    `frobenius` (the paper's default): 1 - d / max(d), d the Frobenius distance between two experts' outputs, the
    maximum over the layer's pairs. `cosine`: the mean over tokens of (cos + 1) / 2. `cka`: centred kernel alignment
    with the given `kernel`, clamped to [0, 1]. `block_tokens` are taken at a time (default: what BLOCK_BYTES hold).

    Raises:
        ValueError: the method or the kernel is not one of these, or there is no token.
    """
    num_experts, num_tokens, hidden_size = outputs_ENH.shape
    if method not in (*SIMILARITY_OF_GROUPS, "cka"):
        raise ValueError(f"method {method!r} is not one of {', '.join((*SIMILARITY_OF_GROUPS, 'cka'))}")
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel {kernel!r} is not one of {', '.join(get_args(Kernel))}")
    if num_tokens == 0:
        raise ValueError("no tokens: similarity needs the experts' outputs on at least one")
    block = block_tokens or tokens_a_block(num_experts, hidden_size, METHODS[method])
    if method == "cka":
        return _symmetric(expert_cka(outputs_ENH, kernel, block))
    return SIMILARITY_OF_GROUPS[method](outputs_ENH, [slice(0, num_tokens)], block)([0])


def method_named(name: str) -> Method:
    """Returns the record of a method; one that is not ours has what every similarity has."""
    return METHODS.get(name, Method(name))


def tokens_a_block(num_experts: int, hidden_size: int, method: Method, block_bytes: int = BLOCK_BYTES) -> int:
    """Returns how many tokens' outputs, or for CKA rows of kernel matrices, fit into `block_bytes`, at least 1."""
    if method.has_kernel:
        return rows_per_block(num_experts, hidden_size, block_bytes)
    return max(1, block_bytes // (4 * num_experts * hidden_size))


def _symmetric(similarity_EE: torch.Tensor) -> torch.Tensor:
    return ((similarity_EE + similarity_EE.T) / 2).fill_diagonal_(1).float()


def _sum_of(sums_GEE: torch.Tensor, chosen: Sequence[int]) -> torch.Tensor:
    """Returns the sum over some groups. Unlike an index it makes no copy of theirs, which may be many."""
    sum_EE = sums_GEE[chosen[0]].clone()
    for place in chosen[1:]:
        sum_EE += sums_GEE[place]
    return sum_EE


def _pieces(groups: Sequence[slice], block: int) -> Iterator[tuple[int, slice]]:
    """Yields a group's place and at most `block` of its tokens, until all tokens of all groups have come."""
    for place, group in enumerate(groups):
        for piece in split_evenly(group.stop - group.start, block):
            yield place, slice(group.start + piece.start, group.start + piece.stop)


def _token_grams(
    outputs_ENH: torch.Tensor | Outputs, groups: Sequence[slice], block: int
) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """Yields a group's place, tokens of it, and [B, E, E], the inner products of all experts' outputs on each of these
    in float32.
    """
    for place, tokens in _pieces(groups, block):
        outputs_EBH = outputs_ENH[:, tokens].float()
        for part in split_evenly(tokens.stop - tokens.start, GRAM_TOKENS):
            outputs_BEH = outputs_EBH[:, part].transpose(0, 1)
            these = slice(tokens.start + part.start, tokens.start + part.stop)
            yield place, these, outputs_BEH @ outputs_BEH.transpose(1, 2)


def frobenius_of_groups(outputs_ENH: torch.Tensor | Outputs, groups: Sequence[slice], block: int) -> OfGroups:
    """Returns method frobenius as a function of groups of tokens; takes `block` tokens at a time."""
    num_experts = outputs_ENH.shape[0]
    gram_GEE = float64_zeros(outputs_ENH, len(groups), num_experts, num_experts)
    for place, tokens in _pieces(groups, block):
        for outputs_EBH in outputs_ENH[:, tokens].float().split(GRAM_TOKENS, dim=1):
            flat = outputs_EBH.flatten(1)
            gram_GEE[place] += (flat @ flat.T).double()
    _, rounding = _distances(gram_GEE.sum(dim=0))
    if rounding > TOLERANCE:
        # Experts that are nearly equal, as in upcycled models: their distance is what is left of a difference of large
        # numbers. Once more in float64, without what all experts share at a token, which no distance depends on.
        gram_GEE.zero_()
        for place, tokens in _pieces(groups, block):
            outputs_EBH = outputs_ENH[:, tokens].to(torch.float64, copy=True)
            flat = outputs_EBH.sub_(outputs_EBH.mean(dim=0)).flatten(1)
            gram_GEE[place] += flat @ flat.T

    def of(chosen: Sequence[int]) -> torch.Tensor:
        distance_EE, _ = _distances(_sum_of(gram_GEE, chosen))
        largest = distance_EE.max()
        return _symmetric(1 - distance_EE / largest if largest > 0 else torch.ones_like(distance_EE))

    return of


def _distances(gram_EE: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Returns the distances [E, E], and the most that float32 products may have cost 1 - distance / largest."""
    squared_E = gram_EE.diagonal()
    sizes_EE = squared_E[:, None] + squared_E
    distance_EE = (sizes_EE - 2 * gram_EE).clamp(min=0).sqrt().fill_diagonal_(0)
    different = ~torch.eye(len(gram_EE), dtype=torch.bool, device=gram_EE.device)
    rounding_EE = FLOAT32_ERROR * sizes_EE / (2 * distance_EE * distance_EE.max())
    return distance_EE, float(rounding_EE[different].nan_to_num(nan=torch.inf).max()) if len(gram_EE) > 1 else 0.0


def cosine_of_groups(outputs_ENH: torch.Tensor | Outputs, groups: Sequence[slice], block: int) -> OfGroups:
    """Returns method cosine as a function of groups of tokens; takes `block` tokens at a time."""
    num_experts = outputs_ENH.shape[0]
    cosine_GEE = float64_zeros(outputs_ENH, len(groups), num_experts, num_experts)
    for place, _, gram_BEE in _token_grams(outputs_ENH, groups, block):
        length_BE = gram_BEE.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-12)
        cosine_BEE = gram_BEE.div_(length_BE[:, :, None]).div_(length_BE[:, None, :])
        cosine_GEE[place] += cosine_BEE.sum(dim=0, dtype=torch.float64)

    def of(chosen: Sequence[int]) -> torch.Tensor:
        num_tokens = sum(groups[place].stop - groups[place].start for place in chosen)
        return _symmetric((_sum_of(cosine_GEE, chosen) / num_tokens + 1) / 2)

    return of


# What is a sum over tokens: CKA is not.
SIMILARITY_OF_GROUPS = {"frobenius": frobenius_of_groups, "cosine": cosine_of_groups}


class Projection(NamedTuple):
    """How well a multiple of expert j stands in for expert i. All float32; the first two are not symmetric."""

    similarity_EE: torch.Tensor  # the share of i's output that it explains, 0 where only a negative multiple would
    coefficient_EE: torch.Tensor  # that multiple, at least 0; the diagonals are 1
    size_E: torch.Tensor  # an expert's mean squared output over all tokens, relative to the mean over experts
    mean_square: torch.Tensor  # [], what the sizes are relative to
    saliency_E: torch.Tensor  # REAP's: the mean of routing weight times output's norm, over an expert's tokens; or 0


def expert_projection(
    outputs_ENH: torch.Tensor | Outputs, routing_weights_NE: torch.Tensor | Outputs, block_tokens: int | None = None
) -> Projection:
    """Returns how well a multiple of expert j stands in for expert i on the tokens routed to i.

    A token counts with the square of its routing weight for i, which is 0 where it was not routed to i. For an expert
    that no token was routed to all tokens count alike.

    Raises:
        ValueError: there is no token, or the routing weights are not [N, E].
    """
    num_tokens = outputs_ENH.shape[1]
    return projection_of_groups(outputs_ENH, routing_weights_NE, [slice(0, num_tokens)], block_tokens)([0])


def projection_of_groups(
    outputs_ENH: torch.Tensor | Outputs,
    routing_weights_NE: torch.Tensor | Outputs,
    groups: Sequence[slice],
    block_tokens: int | None = None,
) -> Callable[[Sequence[int]], Projection]:
    """Returns `expert_projection` as a function of groups of tokens, which are named by their places.

    Raises:
        ValueError: see `expert_projection`.
    """
    num_experts, num_tokens, hidden_size = outputs_ENH.shape
    if num_tokens == 0:
        raise ValueError("no tokens: projection needs the experts' outputs on at least one")
    if tuple(routing_weights_NE.shape) != (num_tokens, num_experts):
        raise ValueError(f"routing weights are {tuple(routing_weights_NE.shape)}, not [N, E] {num_tokens, num_experts}")
    block = block_tokens or tokens_a_block(num_experts, hidden_size, METHODS["projection"])
    # Sums of r^2 <O_i, O_j> and of r^2 |O_j|^2.
    product_GEE, squared_GEE = (float64_zeros(outputs_ENH, len(groups), num_experts, num_experts) for _ in range(2))
    # Of |O_i|^2; of r |O_i|, and of the tokens routed to i.
    size_GE, salient_GE, routed_GE = (float64_zeros(outputs_ENH, len(groups), num_experts) for _ in range(3))
    reached_E = torch.zeros_like(size_GE[0], dtype=torch.bool)
    for tokens in split_evenly(num_tokens, block):
        reached_E |= (routing_weights_NE[tokens, :] != 0).any(dim=0)
    for place, tokens, gram_BEE in _token_grams(outputs_ENH, groups, block):
        gram_BEE = gram_BEE.double()
        squared_BE = gram_BEE.diagonal(dim1=1, dim2=2).clone()
        weights_BE = routing_weights_NE[tokens, :].double()
        importance_BE = torch.where(reached_E, weights_BE**2, 1.0)
        product_GEE[place] += gram_BEE.mul_(importance_BE[:, :, None]).sum(dim=0)
        squared_GEE[place] += importance_BE.T @ squared_BE
        size_GE[place] += squared_BE.sum(dim=0)
        salient_GE[place] += (weights_BE * squared_BE.sqrt()).sum(dim=0)
        routed_GE[place] += (weights_BE != 0).sum(dim=0)

    def of(chosen: Sequence[int]) -> Projection:
        count = sum(groups[place].stop - groups[place].start for place in chosen)
        product_EE, squared_EE, size_E = (_sum_of(sums, chosen) for sums in (product_GEE, squared_GEE, size_GE))
        own_E1 = squared_EE.diagonal()[:, None]
        product_EE.clamp_(min=0)
        multiple_EE = product_EE / squared_EE
        coefficient_EE = multiple_EE.nan_to_num(nan=0.0).fill_diagonal_(1)
        similarity_EE = (multiple_EE * product_EE / own_E1).nan_to_num(nan=0.0).clamp(max=1).fill_diagonal_(1)
        mean_size = size_E.mean()
        size_E = size_E / mean_size if mean_size > 0 else torch.ones_like(size_E)
        saliency_E = _sum_of(salient_GE, chosen) / _sum_of(routed_GE, chosen).clamp(min=1)
        return Projection(*(t.float() for t in (similarity_EE, coefficient_EE, size_E, mean_size / count, saliency_E)))

    return of


def weight_similarity(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns the cosine [E, E], float32, diagonal 1, of the experts' concatenated weights: tensors [E, ...] each.

    A control: it needs no data. Hidden neurons have no order, so equal functions need not have equal weights.
    """
    weights = list(weights)
    num_experts = len(weights[0])
    gram_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=weights[0].device)
    for weight in weights:
        flat = weight.flatten(1)
        for part in flat.split(max(1, BLOCK_BYTES // (8 * len(flat))), dim=1):
            part = part.double()
            gram_EE += part @ part.T
    length_E = gram_EE.diagonal().sqrt().clamp(min=1e-12)
    return (gram_EE / length_E[:, None] / length_E).fill_diagonal_(1).float()


def random_similarity(num_experts: int, seed: int) -> torch.Tensor:
    """Returns a symmetric random matrix [E, E], float32, uniform in [0, 1), diagonal 1: the control of all methods."""
    matrix_EE = torch.rand(num_experts, num_experts, generator=torch.Generator().manual_seed(seed))
    upper_EE = matrix_EE.triu(1)
    return (upper_EE + upper_EE.T).fill_diagonal_(1)

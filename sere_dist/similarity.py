"""How alike are the experts of a layer? Computed from the outputs of every expert on the same tokens.

Pure functions on tensors. Shape suffixes: E experts, N tokens, H hidden size, B and C tokens of a block. Outputs
[E, N, H] are a tensor, or anything with its `shape` that gives a tensor when sliced, `outputs[experts, tokens]`: then
nothing that grows with the number of tokens is ever in memory at once.

No method loops over pairs of experts. Frobenius, cosine and projection are sums over tokens of something made of one
token's Gram matrix [E, E] of expert outputs; CKA is a sum over pairs of tokens, taken over pairs of blocks. Products
within a few tokens are float32, except CKA's; sums over tokens are float64.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Literal, Protocol, get_args

import torch

Method = Literal["frobenius", "cosine", "cka", "projection", "weights", "random"]
Kernel = Literal["linear", "polynomial", "rbf"]

BLOCK_BYTES = 2**30  # what a block's outputs and Gram matrices take, unless told otherwise
GRAM_TOKENS = 64  # whose products are summed in float32, or whose Gram matrices exist at a time
COLUMN_TOKENS = 256  # of a kernel matrix, at a time, beside a block of rows
FLOAT32_ERROR = 1e-6  # of an inner product over GRAM_TOKENS, relative to the factors' sizes; 5e-8 is usual
TOLERANCE = 1e-5  # of a similarity


class Outputs(Protocol):
    """Outputs [E, N, H] of all experts, computed when sliced by experts and tokens."""

    shape: tuple[int, int, int]

    def __getitem__(self, index: tuple[slice, slice]) -> torch.Tensor: ...


def expert_similarity(
    outputs_ENH: torch.Tensor | Outputs,
    method: Method = "frobenius",
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
    if method not in ("frobenius", "cosine", "cka"):
        raise ValueError(f"method {method!r} is not one of frobenius, cosine, cka")
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel {kernel!r} is not one of {', '.join(get_args(Kernel))}")
    if num_tokens == 0:
        raise ValueError("no tokens: similarity needs the experts' outputs on at least one")
    block = block_tokens or tokens_a_block(num_experts, hidden_size, method)
    if method == "frobenius":
        similarity_EE = _frobenius(outputs_ENH, block)
    elif method == "cosine":
        similarity_EE = _cosine(outputs_ENH, block)
    elif kernel == "linear" and features_are_cheaper(num_experts, num_tokens, hidden_size):
        similarity_EE = _linear_cka_of_features(outputs_ENH, block)
    else:
        similarity_EE = _cka(outputs_ENH, kernel, block)
    return ((similarity_EE + similarity_EE.T) / 2).fill_diagonal_(1).float()


def tokens_a_block(num_experts: int, hidden_size: int, method: Method, block_bytes: int = BLOCK_BYTES) -> int:
    """Returns how many tokens' outputs, or for CKA rows of kernel matrices, fit into `block_bytes`, at least 1."""
    if method == "cka":  # rows, also while they are made float64; columns in a few forms; their kernel values
        columns = 20 * COLUMN_TOKENS * hidden_size
        return max(1, (block_bytes // num_experts - columns) // (12 * hidden_size + 8 * COLUMN_TOKENS))
    return max(1, block_bytes // (4 * num_experts * hidden_size))


def _blocks(count: int, block: int) -> list[slice]:
    """Cuts `count` into the fewest pieces of at most `block`, as even as can be."""
    pieces = -(-count // block)
    edges = [count * i // max(1, pieces) for i in range(pieces + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _token_grams(outputs_ENH: torch.Tensor | Outputs, block: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields tokens, and [B, E, E], the inner products of all experts' outputs on each of them in float32."""
    for tokens in _blocks(outputs_ENH.shape[1], block):
        outputs_EBH = outputs_ENH[:, tokens].float()
        for part in _blocks(tokens.stop - tokens.start, GRAM_TOKENS):
            outputs_BEH = outputs_EBH[:, part].transpose(0, 1)
            yield slice(tokens.start + part.start, tokens.start + part.stop), outputs_BEH @ outputs_BEH.transpose(1, 2)


def _frobenius(outputs_ENH: torch.Tensor | Outputs, block: int) -> torch.Tensor:
    gram_EE = 0
    for tokens in _blocks(outputs_ENH.shape[1], block):
        for outputs_EBH in outputs_ENH[:, tokens].float().split(GRAM_TOKENS, dim=1):
            flat = outputs_EBH.flatten(1)
            gram_EE += (flat @ flat.T).double()
    distance_EE, rounding = _distances(gram_EE)
    if rounding > TOLERANCE:
        # Experts that are nearly equal, as in upcycled models: their distance is what is left of a difference of large
        # numbers. Once more in float64, without what all experts share at a token, which no distance depends on.
        gram_EE = 0
        for tokens in _blocks(outputs_ENH.shape[1], block):
            outputs_EBH = outputs_ENH[:, tokens].to(torch.float64, copy=True)
            flat = outputs_EBH.sub_(outputs_EBH.mean(dim=0)).flatten(1)
            gram_EE += flat @ flat.T
        distance_EE, _ = _distances(gram_EE)
    largest = distance_EE.max()
    return 1 - distance_EE / largest if largest > 0 else torch.ones_like(distance_EE)


def _distances(gram_EE: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Returns the distances [E, E], and the most that float32 products may have cost 1 - distance / largest."""
    squared_E = gram_EE.diagonal()
    sizes_EE = squared_E[:, None] + squared_E
    distance_EE = (sizes_EE - 2 * gram_EE).clamp(min=0).sqrt().fill_diagonal_(0)
    different = ~torch.eye(len(gram_EE), dtype=torch.bool, device=gram_EE.device)
    rounding_EE = FLOAT32_ERROR * sizes_EE / (2 * distance_EE * distance_EE.max())
    return distance_EE, float(rounding_EE[different].nan_to_num(nan=torch.inf).max()) if len(gram_EE) > 1 else 0.0


def _cosine(outputs_ENH: torch.Tensor | Outputs, block: int) -> torch.Tensor:
    cosine_EE = 0
    for _, gram_BEE in _token_grams(outputs_ENH, block):
        length_BE = gram_BEE.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-12)
        cosine_EE += gram_BEE.div_(length_BE[:, :, None]).div_(length_BE[:, None, :]).sum(dim=0, dtype=torch.float64)
    return (cosine_EE / outputs_ENH.shape[1] + 1) / 2


def expert_projection(
    outputs_ENH: torch.Tensor | Outputs, routing_weights_NE: torch.Tensor | Outputs, block_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns how well a multiple of expert j stands in for expert i on the tokens routed to i.

    The similarity [E, E] is the share of i's output that it explains, 0 where only a negative multiple would, diagonal
    1; the coefficient [E, E] is that multiple, at least 0; the size [E] is an expert's mean squared output over all
    tokens, relative to its mean over experts. All float32; the first two are not symmetric. A token counts with the
    square of its routing weight for i, which is 0 where it was not routed to i. For an expert that no token was routed
    to all tokens count alike.

    Raises:
        ValueError: there is no token, or the routing weights are not [N, E].
    """
    num_experts, num_tokens, hidden_size = outputs_ENH.shape
    if num_tokens == 0:
        raise ValueError("no tokens: projection needs the experts' outputs on at least one")
    if tuple(routing_weights_NE.shape) != (num_tokens, num_experts):
        raise ValueError(f"routing weights are {tuple(routing_weights_NE.shape)}, not [N, E] {num_tokens, num_experts}")
    block = block_tokens or tokens_a_block(num_experts, hidden_size, "projection")
    reached_E = sum((routing_weights_NE[tokens, :] != 0).sum(dim=0) for tokens in _blocks(num_tokens, block)) > 0
    product_EE, squared_EE, size_E = 0, 0, 0  # sums of r^2 <O_i, O_j>, of r^2 |O_j|^2, and of |O_i|^2
    for tokens, gram_BEE in _token_grams(outputs_ENH, block):
        gram_BEE = gram_BEE.double()
        squared_BE = gram_BEE.diagonal(dim1=1, dim2=2).clone()
        importance_BE = torch.where(reached_E, routing_weights_NE[tokens, :].double() ** 2, 1.0)
        product_EE += gram_BEE.mul_(importance_BE[:, :, None]).sum(dim=0)
        squared_EE += importance_BE.T @ squared_BE
        size_E += squared_BE.sum(dim=0)
    own_E1 = squared_EE.diagonal()[:, None]
    product_EE.clamp_(min=0)
    coefficient_EE = (product_EE / squared_EE).nan_to_num(nan=0.0).fill_diagonal_(1)
    similarity_EE = (product_EE / squared_EE * product_EE / own_E1).nan_to_num(nan=0.0).clamp(max=1).fill_diagonal_(1)
    mean_size = size_E.mean()
    size_E = size_E / mean_size if mean_size > 0 else torch.ones_like(size_E)
    return similarity_EE.float(), coefficient_EE.float(), size_E.float()


def weight_similarity(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns the cosine [E, E], float32, diagonal 1, of the experts' concatenated weights: tensors [E, ...] each.

    A control: it needs no data. Hidden neurons have no order, so equal functions need not have equal weights.
    """
    gram_EE = 0
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


def features_are_cheaper(num_experts: int, num_tokens: int, hidden_size: int) -> bool:
    """Says which form of linear CKA takes fewer multiplications: features [H, H] of every pair of experts, or Gram
    matrices [N, N] of every expert. Both are exact.
    """
    of_features = num_experts * (num_experts + 1) // 2 * num_tokens * hidden_size**2
    of_tokens = num_experts * num_tokens**2 * (hidden_size + num_experts)
    return of_features < of_tokens


def _cka(outputs_ENH: torch.Tensor | Outputs, kernel: Kernel, block: int) -> torch.Tensor:
    """CKA from kernel matrices K_e [N, N], of which a block of rows and a few columns are in memory at once.

    Centring needs no centred matrix: <HKH, HLH> = <K, L> - 2/N sum_t k_t l_t + k l / N^2, with K's row sums k_t and its
    sum k. A constant added to K drops out, so the kernels below lack their 1: what varies keeps its digits.
    """
    num_tokens, width = outputs_ENH.shape[1], min(block, COLUMN_TOKENS)
    # Linear and rbf do not depend on where the origin is. Among the outputs less has to cancel.
    origin_E1H = 0 if kernel == "polynomial" else outputs_ENH[:, :1].double()
    scale_E11 = _rbf_scale(outputs_ENH, origin_E1H, block)[:, None, None] if kernel == "rbf" else None
    product_EE, rows_EE, total_E = 0, 0, 0
    for rows in _blocks(num_tokens, block):
        x_EBH = outputs_ENH[:, rows].to(torch.float64, copy=True).sub_(origin_E1H)
        row_sums_EB = x_EBH.new_zeros(x_EBH.shape[:2])
        after = [slice(rows.stop + c.start, rows.stop + c.stop) for c in _blocks(num_tokens - rows.stop, width)]
        for columns in [*_blocks(rows.start, width), *after]:
            y_ECH = outputs_ENH[:, columns].to(torch.float64, copy=True).sub_(origin_E1H)
            kernel_EBC = _kernel_values(x_EBH, y_ECH, kernel, scale_E11)
            product_EE += _products(kernel_EBC)
            row_sums_EB += kernel_EBC.sum(dim=2)
        for columns in _blocks(x_EBH.shape[1], width):  # among the rows themselves: what is above is below
            size = columns.stop - columns.start
            kernel_EBC = _kernel_values(x_EBH[:, columns.start :], x_EBH[:, columns], kernel, scale_E11)
            product_EE += _products(kernel_EBC[:, :size]) + 2 * _products(kernel_EBC[:, size:])
            row_sums_EB[:, columns.start :] += kernel_EBC.sum(dim=2)
            row_sums_EB[:, columns] += kernel_EBC[:, size:].sum(dim=1)
        rows_EE += row_sums_EB @ row_sums_EB.T
        total_E += row_sums_EB.sum(dim=1)
        x_EBH = y_ECH = kernel_EBC = None  # before the next rows: two blocks would be twice the memory
    centred_EE = product_EE - 2 / num_tokens * rows_EE + total_E[:, None] * total_E / num_tokens**2
    return _alignment(centred_EE, product_EE.diagonal())


def _kernel_values(
    x_EBH: torch.Tensor, y_ECH: torch.Tensor, kernel: Kernel, scale_E11: torch.Tensor | None
) -> torch.Tensor:
    """Returns the kernel of every x with every y [E, B, C], without its constant."""
    if kernel == "rbf":  # exp(-|x - y|^2 / (2 v)) - 1
        x_size_EB, y_size_EC = (torch.linalg.vector_norm(z, dim=2).square() for z in (x_EBH, y_ECH))
        kernel_EBC = scale_E11 * x_size_EB[:, :, None] + scale_E11 * y_size_EC[:, None, :]
        return kernel_EBC.baddbmm_(x_EBH, (-2 * scale_E11 * y_ECH).transpose(1, 2)).expm1_()
    kernel_EBC = x_EBH @ y_ECH.transpose(1, 2)
    if kernel == "polynomial":  # (x.y + 1)^2 - 1
        kernel_EBC.addcmul_(kernel_EBC, kernel_EBC, value=0.5).mul_(2)
    return kernel_EBC


def _products(kernel_EBC: torch.Tensor) -> torch.Tensor:
    flat = kernel_EBC.flatten(1)
    return flat @ flat.T


def _rbf_scale(outputs_ENH: torch.Tensor | Outputs, origin_E1H: torch.Tensor, block: int) -> torch.Tensor:
    """Returns -1 / (2 v) [E], v the unbiased variance of an expert's N x N squared distances; 0 where v <= 1e-8.

    With n_t = |x_t|^2 and d_tu = n_t + n_u - 2 x_t.x_u, the sums of d and of d^2 follow from moments of x: no pair of
    tokens is looked at. The second moment [H, H] exists for one expert at a time.
    """
    num_experts, num_tokens, _ = outputs_ENH.shape
    pairs = num_tokens**2
    scales = []
    for expert in range(num_experts):
        first_H, second_HH, weighted_H, sizes, sizes_squared = 0, 0, 0, 0, 0
        for tokens in _blocks(num_tokens, block):
            x_BH = outputs_ENH[expert : expert + 1, tokens][0].double() - origin_E1H[expert]
            n_B = x_BH.square().sum(dim=1)
            first_H += x_BH.sum(dim=0)
            second_HH += x_BH.T @ x_BH
            weighted_H += n_B @ x_BH
            sizes += n_B.sum()
            sizes_squared += n_B.square().sum()
        sum_of_d = 2 * (num_tokens * sizes - first_H.square().sum())
        sum_of_d_squared = 2 * num_tokens * sizes_squared + 2 * sizes**2  # of (n_t + n_u)^2
        sum_of_d_squared += 4 * second_HH.square().sum() - 8 * weighted_H @ first_H
        variance = (sum_of_d_squared - sum_of_d**2 / pairs) / max(1, pairs - 1)
        scales.append(torch.where(variance > 1e-8, -0.5 / variance, 0.0))
    return torch.stack(scales)


def _linear_cka_of_features(outputs_ENH: torch.Tensor | Outputs, block: int) -> torch.Tensor:
    """Linear CKA as |X_i^T X_j|^2 of centred outputs, for as many pairs of experts at a time as BLOCK_BYTES hold."""
    num_experts, num_tokens, hidden_size = outputs_ENH.shape
    origin_E1H = outputs_ENH[:, :1].double()
    centred_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=origin_E1H.device)
    uncentred_E = torch.zeros_like(centred_EE[0])
    tiles = list(_blocks(num_experts, max(1, int((BLOCK_BYTES / 8) ** 0.5) // hidden_size)))
    for i, left in enumerate(tiles):
        for right in tiles[i:]:
            product, left_sum, right_sum = 0, 0, 0
            for tokens in _blocks(num_tokens, block):
                x, y = (_features(outputs_ENH[tile, tokens].double() - origin_E1H[tile]) for tile in (left, right))
                product += x @ y.T
                left_sum += x.sum(dim=1)
                right_sum += y.sum(dim=1)
            if left == right:
                uncentred_E[left] = _squares(product, hidden_size).diagonal()
            product.addr_(left_sum, right_sum, alpha=-1 / num_tokens)
            squares = _squares(product, hidden_size)
            centred_EE[left, right], centred_EE[right, left] = squares, squares.T
    return _alignment(centred_EE, uncentred_E)


def _features(outputs_EBH: torch.Tensor) -> torch.Tensor:
    return outputs_EBH.transpose(1, 2).flatten(0, 1)


def _squares(product: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Returns the sum of squares of every [H, H] in a grid of them."""
    return product.square().unflatten(0, (-1, hidden_size)).unflatten(2, (-1, hidden_size)).sum(dim=(1, 3))


def _alignment(centred_EE: torch.Tensor, uncentred_E: torch.Tensor) -> torch.Tensor:
    """Returns <K, L> / (|K| |L|) in [0, 1], 0 where a centred kernel is nothing but rounding."""
    squared_E = centred_EE.diagonal()
    varies_E = squared_E > 1e-13 * uncentred_E
    length_E = torch.where(varies_E, squared_E, torch.inf).sqrt()
    return (centred_EE / length_E[:, None] / length_E).clamp(0, 1)

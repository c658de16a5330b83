"""Centred kernel alignment (CKA) of experts' outputs, from blocks of tokens.

With K_e the kernel matrix [N, N] of expert e's outputs on N tokens, and H = I - 1/N the centring matrix,

    CKA(i, j) = <H K_i H, H K_j H> / (|H K_i H| |H K_j H|).

A kernel matrix of all tokens is never in memory. It is a grid of tiles, and the products of two experts' tiles are
summed tile by tile. A block of rows meets the columns of all other blocks. Within the block's own square, only tiles
on and below the diagonal are computed, because the matrix is symmetric:

                columns of other blocks     own square
              +------------------------+    +--+
      block   |                        |    |__|__        computed once,
              |                        |    |__|__|__     and counted twice
              +------------------------+    |__|__|__|    below the diagonal

Shape suffixes: E experts, N tokens, H hidden size, B rows of a block, C columns of a tile. Products are float64.
"""

from typing import Literal, get_args

import torch

from sere_dist.method.blocks import BLOCK_BYTES, Outputs, float64_zeros, split_evenly

Kernel = Literal["linear", "polynomial", "rbf"]

COLUMN_TOKENS = 256  # columns of a tile


def expert_cka(outputs_ENH: torch.Tensor | Outputs, kernel: Kernel, block: int) -> torch.Tensor:
    """Returns the CKA [E, E], float64, in [0, 1], of experts with these outputs, `block` tokens at a time.

    Kernels: `linear` x.y; `polynomial` (x.y + 1)^2; `rbf` exp(-|x - y|^2 / (2 v)), v the unbiased variance of the
    expert's N x N squared distances.

    Raises:
        ValueError: the kernel is not one of these.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel {kernel!r} is not one of {', '.join(get_args(Kernel))}")
    if kernel == "linear" and features_are_cheaper(*outputs_ENH.shape):
        return _linear_of_features(outputs_ENH, block)
    return _of_kernel_matrices(outputs_ENH, kernel, block)


def rows_per_block(num_experts: int, hidden_size: int, block_bytes: int) -> int:
    """Returns how many rows of all experts' kernel matrices fit into `block_bytes`, at least 1."""
    # Rows, also while they are made float64; columns in a few forms; the kernel values of both.
    columns = 20 * COLUMN_TOKENS * hidden_size
    return max(1, (block_bytes // num_experts - columns) // (12 * hidden_size + 8 * COLUMN_TOKENS))


def features_are_cheaper(num_experts: int, num_tokens: int, hidden_size: int) -> bool:
    """Says which form of linear CKA takes fewer multiplications: features [H, H] of every pair of experts, or Gram
    matrices [N, N] of every expert. Both are exact.
    """
    of_features = num_experts * (num_experts + 1) // 2 * num_tokens * hidden_size**2
    of_tokens = num_experts * num_tokens**2 * (hidden_size + num_experts)
    return of_features < of_tokens


def _of_kernel_matrices(outputs_ENH: torch.Tensor | Outputs, kernel: Kernel, block: int) -> torch.Tensor:
    """CKA from kernel matrices K_e [N, N], of which a block of rows and a few columns are in memory at once.

    Centring needs no centred matrix: <HKH, HLH> = <K, L> - 2/N sum_t k_t l_t + k l / N^2, with K's row sums k_t and its
    sum k. A constant added to K drops out, so the kernels below lack their 1: what varies keeps its digits.
    """
    num_experts, num_tokens, _ = outputs_ENH.shape
    width = min(block, COLUMN_TOKENS)
    # Linear and rbf do not depend on where the origin is. Among the outputs less has to cancel.
    origin_E1H = outputs_ENH[:, :1].double()
    if kernel == "polynomial":
        origin_E1H = torch.zeros_like(origin_E1H)
    scale_E11 = _rbf_scale(outputs_ENH, origin_E1H, block)[:, None, None] if kernel == "rbf" else None
    product_EE, rows_EE = (float64_zeros(outputs_ENH, num_experts, num_experts) for _ in range(2))
    total_E = float64_zeros(outputs_ENH, num_experts)
    for rows in split_evenly(num_tokens, block):
        x_EBH = outputs_ENH[:, rows].to(torch.float64, copy=True).sub_(origin_E1H)
        row_sums_EB = x_EBH.new_zeros(x_EBH.shape[:2])
        after = [slice(rows.stop + c.start, rows.stop + c.stop) for c in split_evenly(num_tokens - rows.stop, width)]
        for columns in [*split_evenly(rows.start, width), *after]:
            y_ECH = outputs_ENH[:, columns].to(torch.float64, copy=True).sub_(origin_E1H)
            kernel_EBC = _kernel_values(x_EBH, y_ECH, kernel, scale_E11)
            product_EE += _products(kernel_EBC)
            row_sums_EB += kernel_EBC.sum(dim=2)
        for columns in split_evenly(x_EBH.shape[1], width):  # among the rows themselves: what is above is below
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
    """Returns the kernel of every x with every y [E, B, C], without its constant; only rbf has a scale."""
    if scale_E11 is not None:  # exp(-|x - y|^2 / (2 v)) - 1
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
    num_experts, num_tokens, hidden_size = outputs_ENH.shape
    pairs = num_tokens**2
    scales = []
    for expert in range(num_experts):
        first_H, weighted_H = (origin_E1H.new_zeros(hidden_size) for _ in range(2))
        second_HH = origin_E1H.new_zeros(hidden_size, hidden_size)
        sizes, sizes_squared = (origin_E1H.new_zeros(()) for _ in range(2))
        for tokens in split_evenly(num_tokens, block):
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


def _linear_of_features(outputs_ENH: torch.Tensor | Outputs, block: int) -> torch.Tensor:
    """Linear CKA as |X_i^T X_j|^2 of centred outputs, for as many pairs of experts at a time as BLOCK_BYTES hold."""
    num_experts, num_tokens, hidden_size = outputs_ENH.shape
    origin_E1H = outputs_ENH[:, :1].double()
    centred_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=origin_E1H.device)
    uncentred_E = torch.zeros_like(centred_EE[0])
    tiles = list(split_evenly(num_experts, max(1, int((BLOCK_BYTES / 8) ** 0.5) // hidden_size)))
    for i, left in enumerate(tiles):
        for right in tiles[i:]:
            left_size, right_size = ((tile.stop - tile.start) * hidden_size for tile in (left, right))
            product = origin_E1H.new_zeros(left_size, right_size)
            left_sum, right_sum = origin_E1H.new_zeros(left_size), origin_E1H.new_zeros(right_size)
            for tokens in split_evenly(num_tokens, block):
                x, y = (_features(outputs_ENH[tile, tokens].double() - origin_E1H[tile]) for tile in (left, right))
                product.addmm_(x, y.T)  # without a second matrix of this size
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

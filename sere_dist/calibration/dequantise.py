"""Tensors of quantised checkpoints, in float32: FP8, MXFP8 and MXFP4.

Shape suffixes: E experts, R rows, C columns, G groups of columns that share a scale, B bytes of a group.
"""

import re

import torch

# Methods that are undone here, and the block [rows, columns] that shares a scale where a configuration doesn't say.
DEQUANTISED = {"fp8": (128, 128), "mxfp8": (1, 32), "mxfp4": (1, 32)}
QUANTISED_SUFFIX = re.compile(
    r"([-_.](fp8|mxfp[48]|nvfp4|fp4|awq|gptq|autoround|int[48]|w\d+a\d+|[348]bit|\d+g|g\d+|bnb|unsloth|mlx|kv"
    r"|mixed|dynamic|static|block|quantized))+$",
    re.I,
)
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # e2m1, by code


def block_size(name: str, quantisation: dict) -> tuple[int, int]:
    """Returns the rows and columns of a block of weights that shares a scale.

    Raises:
        ValueError: the method is not undone here.
    """
    method = quantisation.get("quant_method")
    if method not in DEQUANTISED:
        sibling = QUANTISED_SUFFIX.sub("", name.rstrip("/"))
        where = f"{sibling}, by its name" if sibling != name.rstrip("/") else "base_model in its card"
        raise ValueError(
            f"--model {name} is quantised ({method}), which is dequantised here only for {', '.join(DEQUANTISED)}: "
            f"calibrate the checkpoint it was made from ({where}); the artifact serves the quantised model too"
        )
    return tuple(quantisation.get("weight_block_size") or DEQUANTISED[method])


def from_float8(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Returns values [..., R, C] in float32, times one scale for all, or one for each block of rows and columns.

    There are as many blocks as it takes: the last of a row or a column may be cut short.

    Raises:
        ValueError: there are more or fewer scales.
    """
    if scales.numel() > 1:
        grid = [-(-size // step) for size, step in zip(values.shape[-2:], block, strict=True)]
        if list(scales.shape) != [*values.shape[:-2], *grid]:
            raise ValueError(f"weights {tuple(values.shape)} in blocks of {block} have scales {tuple(scales.shape)}")
        for dim, step in zip((-2, -1), block, strict=True):
            scales = scales.repeat_interleave(step, dim).narrow(dim, 0, values.shape[dim])
    return values.float().mul_(scales)


def from_mxfp4(blocks_ERGB: torch.Tensor, scales_ERG: torch.Tensor) -> torch.Tensor:
    """Returns [E, C, R], float32, of E experts' transposed weights, in G groups of 32 columns with a scale each.

    A byte holds two codes, the lower bits first. Experts are read one at a time.
    """
    experts, rows, groups = scales_ERG.shape
    table = torch.tensor(FP4_VALUES, device=scales_ERG.device)
    weights_ECR = torch.empty(experts, groups * 32, rows, device=scales_ERG.device)
    for expert in range(experts):
        bytes_RGB = blocks_ERGB[expert].to(scales_ERG.device, torch.int32)
        values_RGB2 = table[torch.stack([bytes_RGB & 15, bytes_RGB >> 4], dim=-1)]
        values_RG32 = values_RGB2.flatten(2) * scales_ERG[expert, :, :, None]
        weights_ECR[expert] = values_RG32.flatten(1).T
    return weights_ECR


def unpack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Returns scales in float32; bytes are exponents."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()

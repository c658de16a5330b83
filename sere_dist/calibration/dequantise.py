"""Tensors of quantised checkpoints, in float32: FP8, INT8, INT4, NVFP4, MXFP4 and MXFP8.

A weight's values, scales and zeros are tensors of their own, its parts. Their names, dtypes and shapes say how to undo
it, so nobody reads the configuration's lists of what is quantised and what is not. It says the method and the sizes of
blocks.

Shape suffixes: E experts, R rows (outputs), C columns (inputs), G groups of columns that share a scale, B bytes of a
group.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

import torch

READ = (  # the methods that are undone here, with what varies within a method
    *("fp8", "mxfp8", "mxfp4", "awq 4 bits gemm"),
    *(f"gptq {bits} bits {layout}" for bits in (4, 8) for layout in ("gptq", "gptq_v2")),
    *(
        f"compressed-tensors {kind}-quantized"
        for kind in ("float", "int", "naive", "pack", "nvfp4-pack", "mxfp4-pack", "mxfp8")
    ),
    *(
        f"modelopt {algorithm}"
        for algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "NVFP4", "W4A16_NVFP4")
    ),
)
QUANTISED_SUFFIX = re.compile(
    r"([-_.](fp8|mxfp[48]|nvfp4|fp4|awq|gptq|autoround|int[2348]|w\d+a\d+|[348]bit|\d+g|g\d+|bnb|unsloth|mlx|kv"
    r"|mixed|dynamic|static|block|quantized))+$",
    re.I,
)
ENDS = {  # the end of a part's name: the end of its weight's name, and what it is; of two that match, the first counts
    ".qweight": (".weight", "values"),
    ".qzeros": (".weight", "zeros"),
    ".scales": (".weight", "scales"),
    ".g_idx": (".weight", "groups"),
    "_packed": ("", "values"),
    "_blocks": ("", "values"),
    "_scales": ("", "scales"),
    "_scale_inv": ("", "scales"),
    "_scale_2": ("", "multiplier"),  # ModelOpt's; compressed-tensors' is one through it
    "_global_scale": ("", "divisor"),
    "_scale": ("", "scales"),
    "_zero_point": ("", "zeros"),
    "_g_idx": ("", "groups"),
    "_shape": ("", "shape"),
}
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # e2m1, by code
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place of each of eight codes in a word
Block = tuple[int, int]  # the rows and columns that share a scale; 0: all of them
ROW, WHOLE = (1, 0), (0, 0)


class Parts(dict[str, torch.Tensor]):
    """What a quantised weight is made of, by what it is."""

    def __missing__(self, part: str) -> torch.Tensor:
        ends = " or ".join(end for end, (_, what) in ENDS.items() if what == part)
        raise ValueError(f"the checkpoint has no {ends} for it: fetch it again")


def weight_parts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns, by each tensor's name, the names of its parts by what they are; "values" are always there."""
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        end = next((end for end in ENDS if name.endswith(end)), "")
        weight_end, what = ENDS.get(end, ("", "values"))
        parts[name.removesuffix(end) + weight_end][what] = name
    alone = [name for of in parts.values() if "values" not in of for name in of.values()]  # such as `input_scale`
    return {weight: of for weight, of in parts.items() if "values" in of} | {name: {"values": name} for name in alone}


class Quantisation:
    """How a checkpoint is quantised, by its configuration."""

    def __init__(self, name: str, config: dict):
        """Takes the `quantization_config` of the model `name`, or the content of ModelOpt's `hf_quant_config.json`.

        Raises:
            ValueError: the method is not undone here.
        """
        if "quantization" in config:  # ModelOpt's file
            config = {"quant_method": "modelopt"} | config["quantization"]
        if unread := sorted(_kinds(config) - set(READ)):
            sibling = QUANTISED_SUFFIX.sub("", name.rstrip("/"))
            where = f"{sibling}, by its name" if sibling != name.rstrip("/") else "base_model in its card"
            raise ValueError(
                f"--model {name} is quantised ({', '.join(unread)}), which is dequantised here only for "
                f"{', '.join(READ)}: calibrate the checkpoint it was made from ({where}); the artifact serves the "
                "quantised model too"
            )
        self._method, self._blocks = config["quant_method"], _blocks(config)
        self._is_gptq_v1 = "gptq_v2" not in (config.get("checkpoint_format"), config.get("format"))
        # Parts without which a weight would seem whole, and come out wrong.
        weights = _group_weights(config)
        has_zeros = bool(weights) and not any(each.get("symmetric", True) for each in weights)
        is_ordered = bool(weights) and all(each.get("actorder") in ("group", "dynamic", True) for each in weights)
        is_ordered |= bool(config.get("desc_act")) and config.get("group_size", -1) > 0
        self._needed = ["zeros"] * has_zeros + ["groups"] * is_ordered

    def undo(self, parts: Parts) -> torch.Tensor:
        """Returns the weights [..., R, C] that the parts stand for, in float32.

        Raises:
            ValueError: a part is missing, or its shape does not go with that of another.
        """
        for part in self._needed:
            _ = parts[part]
        values, scales, zeros = parts["values"], parts["scales"], parts.get("zeros")
        if values.dtype == torch.uint8:
            return from_fp4(parts)
        if values.dtype == torch.int32 and self._method == "gptq":
            values, scales, zeros = gptq_codes(parts, self._is_gptq_v1)
        elif values.dtype == torch.int32 and self._method == "awq":
            values, scales, zeros = awq_codes(parts)
        elif values.dtype == torch.int32:
            values, scales, zeros = packed_codes(parts)
        return scaled(values, unpack_scales(scales), self._blocks, zeros, parts.get("groups"))


def _kinds(config: dict) -> set[str]:
    """Returns how a checkpoint is quantised, in the words of `READ`."""
    method = config.get("quant_method")
    if method in ("gptq", "awq"):
        keys = ("checkpoint_format", "format") if method == "gptq" else ("version", "format")
        layout = next((config[key] for key in keys if config.get(key)), "gptq" if method == "gptq" else "gemm")
        return {f"{method} {config.get('bits', config.get('w_bit'))} bits {str(layout).lower()}"}
    if method == "compressed-tensors":
        groups = [group for group in config.get("config_groups", {}).values() if group.get("weights")]
        kinds = {group.get("format") or config.get("format") for group in groups}
        # Weights that the model rotates as it runs, and those that are kept without their zeros.
        kinds |= {"transforms"} if (config.get("transform_config") or {}).get("config_groups") else set()
        kinds |= {"sparse"} if (config.get("sparsity_config") or {}).get("format", "dense") != "dense" else set()
        return {f"{method} {kind}" for kind in kinds}
    if method == "modelopt":
        layers = config.get("quantized_layers") or {"all": config}  # each has its own with MIXED_PRECISION
        return {f"{method} {str(layer['quant_algo']).upper()}" for layer in layers.values() if layer.get("quant_algo")}
    return {str(method)}


def _blocks(config: dict) -> list[Block]:
    """Returns each block that shares a scale in some tensor of the checkpoint."""
    if config["quant_method"] in ("gptq", "awq"):
        each = [config, *(config.get("dynamic") or {}).values()]  # GPTQModel's, for some of the layers
        sizes = [one.get("group_size", one.get("q_group_size")) for one in each]
        return [(1, size) if size > 0 else ROW for size in sizes if size is not None]
    if config["quant_method"] == "compressed-tensors":
        return [_group_block(weights) for weights in _group_weights(config)]
    return [tuple(config.get("weight_block_size") or (128, 128)), (1, 32), ROW, WHOLE]


def _group_weights(config: dict) -> list[dict]:
    """Returns what each of compressed-tensors' groups says of weights."""
    return [group["weights"] for group in config.get("config_groups", {}).values() if group.get("weights")]


def _group_block(weights: dict) -> Block:
    if weights.get("block_structure"):
        return tuple(weights["block_structure"])
    size = weights.get("group_size") or 0
    if size > 0:
        return (1, size)
    return ROW if size < 0 or weights.get("strategy") == "channel" else WHOLE


def scaled(
    values: torch.Tensor,
    scales: torch.Tensor,
    blocks: list[Block],
    zeros: torch.Tensor | None = None,
    groups_C: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns values [..., R, C] in float32, less their zeros, times their scales. Values in float32 are overwritten.

    Args:
        scales: one for all, [R], or one for each block: the first of `blocks` of which there are as many as scales. The
            last block of a row or a column may be cut short.
        zeros: as many as scales, or one without dimensions.
        groups_C: each column's group of those that scales [R, G] are for, instead of blocks.

    Raises:
        ValueError: there are more or fewer scales or zeros.
    """
    *experts, rows, columns = values.shape
    stored = tuple(scales.shape)
    if scales.numel() == 1:
        scales = scales.reshape(1, 1).expand(*experts, 1, 1)
    elif scales.ndim == 1:
        scales = scales[:, None]
    elif scales.ndim == 4:  # ModelOpt's, for blocks
        scales = scales[:, 0, :, 0]

    row_R, column_C = (torch.arange(size, device=scales.device) for size in (rows, columns))
    choices = ((row_R // (block[0] or rows), column_C // (block[1] or columns)) for block in blocks)
    what = " or ".join(f"({rows or 'all'}, {columns or 'all'})" for rows, columns in blocks)
    if groups_C is not None and (groups_C >= 0).all():  # compressed-tensors has -1 where columns keep their order
        choices, what = iter([(row_R, groups_C.long())]), f"the groups of {len(groups_C)} columns"
    for scale_of_row_R, scale_of_column_C in choices:
        grid = [int(scale_of_row_R.max()) + 1, int(scale_of_column_C.max()) + 1]
        if [*scales.shape] == [*experts, *grid] and len(scale_of_column_C) == columns:
            break
    else:
        raise ValueError(f"weights {tuple(values.shape)} in blocks of {what} have scales {stored}")

    def spread(each: torch.Tensor) -> torch.Tensor:
        for dim, of in ((-2, scale_of_row_R), (-1, scale_of_column_C)):
            each = each if each.shape[dim] == 1 else each.index_select(dim, of)
        return each

    weights = values.float().contiguous()
    if zeros is not None:
        if zeros.ndim and zeros.numel() != scales.numel():
            raise ValueError(f"scales {stored} have zeros {tuple(zeros.shape)}")
        weights.sub_(spread(zeros.float().reshape(scales.shape)) if zeros.ndim else zeros)
    return weights.mul_(spread(scales))


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the codes in words of 32 bits, the lowest bits first: of [..., n] words [..., n * 32 / bits] codes."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def gptq_codes(parts: Parts, is_v1: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns codes [R, C] that are packed along the inputs, and their scales and zeros [R, G]."""
    zeros, scales_GR = parts["zeros"], parts["scales"]
    bits = 32 * zeros.shape[-1] / scales_GR.shape[-1]  # not the same for all weights of a checkpoint
    if bits not in (4, 8):
        raise ValueError(f"zeros {tuple(zeros.shape)} and scales {tuple(scales_GR.shape)} make {bits:g} bits")
    if is_v1:  # its zeros are less by one, taken off the words, where it may carry over to the next code
        zeros = zeros + sum(1 << shift for shift in range(0, 32, int(bits)))
    return unpacked(parts["values"].T, int(bits)), scales_GR.T, unpacked(zeros, int(bits)).T


def awq_codes(parts: Parts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns codes [R, C] that are packed along the outputs, and their scales and zeros [R, G]."""
    values_CR, zeros_GR = (
        unpacked(parts[part], 4).unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2) for part in ("values", "zeros")
    )
    return values_CR.T, parts["scales"].T, zeros_GR.T


def packed_codes(parts: Parts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns compressed-tensors' codes [R, C], their scales [R, G], and zeros [R, G] or the one that all have."""
    packed, (rows, columns) = parts["values"], parts["shape"].tolist()
    bits = next((bits for bits in (4, 8) if packed.shape == (rows, -(-columns * bits // 32))), None)
    if bits is None:
        raise ValueError(f"weights {(rows, columns)} of 4 or 8 bits are in words {tuple(packed.shape)}")
    zeros = unpacked(parts["zeros"].T, bits)[:, :rows].T if "zeros" in parts else torch.tensor(1 << bits - 1)
    return unpacked(packed, bits)[:, :columns], parts["scales"], zeros


def from_fp4(parts: Parts) -> torch.Tensor:
    """Returns weights [R, C] in float32, of NVFP4, whose scales have a scale in their turn, or of MXFP4."""
    scales, size = unpack_scales(parts["scales"]), 32
    if parts["scales"].dtype == torch.float8_e4m3fn:
        size = 16
        scales = scales * parts["multiplier"] if "multiplier" in parts else scales / parts["divisor"]
    return scaled(fp4_values(parts["values"]), scales, [(1, size)])


def fp4_values(codes: torch.Tensor) -> torch.Tensor:
    """Returns the values [..., 2 n] in float32 of bytes [..., n], each of two codes, the lower bits first."""
    table = torch.tensor(FP4_VALUES, device=codes.device)
    codes = codes.int()
    return table[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)]


def from_mxfp4(blocks_ERGB: torch.Tensor, scales_ERG: torch.Tensor) -> torch.Tensor:
    """Returns [E, C, R], float32, of E experts' transposed weights, in G groups of 32 columns with a scale each.

    Experts are read one at a time.
    """
    experts, rows, groups = scales_ERG.shape
    weights_ECR = torch.empty(experts, groups * 32, rows, device=scales_ERG.device)
    for expert in range(experts):
        values_RG32 = fp4_values(blocks_ERGB[expert].to(scales_ERG.device))
        weights_ECR[expert] = (values_RG32 * scales_ERG[expert, :, :, None]).flatten(1).T
    return weights_ECR


def unpack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Returns scales in float32; bytes are exponents."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()

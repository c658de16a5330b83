"""Quantised checkpoints of the example model, packed and undone by the libraries that publish them or serve them."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4 import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.utils.mxfp8_utils import (
    _mxfp8_e4m3_quantize_torch,
    dequant_mxfp8_to_bf16,
)
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype, ref_nvfp4_quant
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    awq_pack,
    gptq_pack,
    quantize_weights,
    scaled_dequantize,
    scaled_quantize,
)
from vllm.scalar_type import ScalarType, scalar_types

from examples.tiny_moe.data import MODEL
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.dequantise import Parts, gptq_codes
from tests.support.checkpoints import assert_same_model, assert_same_results, calibrated, write_quantised

EXPERTS = 4
GROUP = 32  # columns that share a scale in INT4; the example's down_proj has no more
FP8 = torch.float8_e4m3fn
Quantised = tuple[dict[str, torch.Tensor], torch.Tensor]  # a weight's parts by the ends of their names, and the weight


class Format(NamedTuple):
    """How checkpoints are published: what their configuration says, and what becomes of a weight [R, C] in float32."""

    quantisation: dict
    quantise: Callable[[torch.Tensor], Quantised]


def compressed(kind: str, scheme: QuantizationScheme | None = None, **weights) -> Format:
    """Returns compressed-tensors' format `kind`, of a scheme of its own or one for weights alone."""
    scheme = scheme or QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    return Format(quantisation, partial(compressed_weight, kind=kind, scheme=scheme))


def compressed_weight(weight: torch.Tensor, kind: str, scheme: QuantizationScheme) -> Quantised:
    """Takes the weight that the library makes of what it made of a weight."""
    args, compressor = scheme.weights, BaseCompressor.get_value_from_registry(kind)
    columns, is_ordered = weight.shape[1], args.actorder == "group"
    order = torch.randperm(columns) if is_ordered else torch.arange(columns)
    if args.strategy == "block":
        rows_of_block, columns_of_block = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, args.block_structure)
        blocks = padded.unflatten(1, (-1, columns_of_block)).unflatten(0, (-1, rows_of_block))
        alike = blocks.transpose(1, 2).flatten(2)
    elif args.group_size:
        alike = weight[:, order].unflatten(1, (-1, args.group_size))
    else:
        alike = weight.flatten() if args.strategy == "tensor" else weight[:, None]

    parts = {"weight": weight}
    if args.strategy == "tensor_group":
        parts["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    if is_ordered:
        parts["weight_g_idx"] = (order.argsort() // args.group_size).int()
    scales, parts["weight_zero_point"] = calculate_qparams(
        alike.amin(-1), alike.amax(-1), args, parts.get("weight_global_scale")
    )
    parts["weight_scale"] = scales if args.scale_dtype else scales.bfloat16()
    parts = compressor.compress(parts, scheme)

    exact = parts if args.scale_dtype else parts | {"weight_scale": parts["weight_scale"].float()}
    if kind == "nvfp4-pack-quantized":  # what the library makes of a whole state is rounded to bfloat16
        values = unpack_fp4_from_uint8(parts["weight_packed"], *weight.shape, torch.float32)
        scales = parts["weight_scale"].float()
        undone = dequantize(values, scales, args=args, global_scale=parts["weight_global_scale"])
    elif args.strategy == "block":  # there it guesses the size of a block
        undone = dequantize(parts["weight"].float(), exact["weight_scale"], args=args)
    else:
        undone = compressor.decompress(exact, scheme)["weight"]
    return {f".{name}": part for name, part in parts.items()}, undone.float()


def gptq(kind: ScalarType, version: int = 1, ordered: bool = False, group: int = GROUP) -> Format:
    quantisation = {
        "quant_method": "gptq",
        "bits": kind.size_bits,
        "group_size": group,
        "desc_act": ordered,
        "sym": kind.has_bias(),
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Format(quantisation, partial(gptq_weight, kind=kind, version=version, ordered=ordered, group=group))


def gptq_weight(weight: torch.Tensor, kind: ScalarType, version: int, ordered: bool, group: int) -> Quantised:
    (columns, rows), bits = weight.T.shape, kind.size_bits
    order = torch.randperm(columns) if ordered else torch.arange(columns)
    undone, codes, scales, zeros = int_weight(weight.T[order], kind, group)
    if zeros is None:
        zeros = torch.full(scales.shape, kind.bias)
    back = order.argsort()
    packed_zeros = gptq_pack(zeros.T, bits, rows, len(scales)).T
    parts = {
        ".qweight": gptq_pack(codes[back], bits, columns, rows),
        ".qzeros": packed_zeros - (ONES[bits] if version == 1 else 0),
        ".scales": scales,
        ".g_idx": (back // (group if group > 0 else columns)).int(),
    }
    return parts, undone[back].T


ONES = {4: 0x11111111, 8: 0x01010101}  # what GPTQModel takes off each word of zeros for version 1


def int_weight(weight_CR: torch.Tensor, kind: ScalarType, group: int) -> tuple[torch.Tensor, ...]:
    """Returns what vLLM makes of a weight: itself, codes, scales and zeros. The scales are float16, as published."""
    undone, codes, scales, zeros = quantize_weights(weight_CR.contiguous(), kind, group, not kind.has_bias())
    each = len(weight_CR) // len(scales)
    whole = (undone / scales.repeat_interleave(each, 0)).round()
    return whole * scales.half().float().repeat_interleave(each, 0), codes, scales.half(), zeros


def awq_weight(weight: torch.Tensor) -> Quantised:
    _, codes, scales, zeros = int_weight(weight.T, scalar_types.uint4, GROUP)
    (columns, rows), groups = codes.shape, len(zeros)
    parts = {
        ".qweight": awq_pack(codes, 4, columns, rows),
        ".qzeros": awq_pack(zeros, 4, groups, rows),
        ".scales": scales,
    }
    converter = AutoAWQConverter(bits=4, group_size=GROUP, ignore=())
    converted = converter.process({f"linear{end}": part for end, part in parts.items()})
    state = {name.removeprefix("linear."): part for name, part in converted.items()}
    (scheme,) = converter.create_config().config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return parts, compressor.decompress(state | {"weight_scale": state["weight_scale"].float()}, scheme)["weight"]


def modelopt_fp8_weight(weight: torch.Tensor, shape: GroupShape) -> Quantised:
    rows, columns = weight.shape
    padded = maybe_pad_tensor_for_block_quant(weight, (max(shape.row, 1), max(shape.col, 1)))
    values, scales = scaled_quantize(padded, shape, FP8)
    undone = scaled_dequantize(values, scales)
    stored = {GroupShape.PER_TENSOR: scales.squeeze(), GroupShape.PER_TOKEN: scales[:, 0]}
    parts = {".weight": values[:rows, :columns], ".weight_scale": stored.get(shape, scales[:, None, :, None])}
    return parts, undone[:rows, :columns]


def modelopt_mxfp8_weight(weight: torch.Tensor) -> Quantised:
    values, scales = _mxfp8_e4m3_quantize_torch(weight)
    return {".weight": values, ".weight_scale": scales}, dequant_mxfp8_to_bf16(
        values, scales
    ).float()  # nothing is lost


def modelopt_nvfp4_weight(weight: torch.Tensor) -> Quantised:
    scale_2 = weight.abs().max() / (448 * 6)
    values, scales = ref_nvfp4_quant(weight, 1 / scale_2, 16)
    parts = {".weight": pack_fp4_to_uint8(values), ".weight_scale": scales.to(FP8), ".weight_scale_2": scale_2}
    return parts, dequantize_to_dtype(*parts.values(), torch.float32, 16, swizzle=False)


def modelopt(algorithm: str, quantise: Callable[[torch.Tensor], Quantised]) -> Format:
    quantisation = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    return Format(quantisation, quantise)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
INT8_ROWS = {"num_bits": 8, "type": "int", "strategy": "channel"}
ASYMMETRIC = {"symmetric": False}
FORMATS = {
    "compressed FP8": compressed("float-quantized", preset_name_to_scheme("FP8", ["Linear"])),
    "compressed FP8 by row": compressed("float-quantized", preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])),
    "compressed FP8 by block": compressed("float-quantized", preset_name_to_scheme("FP8_BLOCK", ["Linear"])),
    "compressed FP8, weights alone": compressed("naive-quantized", num_bits=8, type="float", strategy="channel"),
    "compressed INT8": compressed("int-quantized", preset_name_to_scheme("W8A8", ["Linear"])),
    "compressed INT8, asymmetric": compressed("int-quantized", **INT8_ROWS, **ASYMMETRIC),
    "compressed W4A16": compressed("pack-quantized", **INT4),
    "compressed W4A16, asymmetric": compressed("pack-quantized", **INT4, **ASYMMETRIC),
    "compressed W4A16, ordered": compressed("pack-quantized", **INT4, **ASYMMETRIC, actorder="group"),
    "compressed W4A16 by row": compressed("pack-quantized", num_bits=4, type="int", strategy="channel"),
    "compressed W8A16": compressed("pack-quantized", **INT4 | {"num_bits": 8}),
    "compressed W8A16 by row, asymmetric": compressed("pack-quantized", **INT8_ROWS, **ASYMMETRIC),
    "compressed NVFP4": compressed("nvfp4-pack-quantized", preset_name_to_scheme("NVFP4", ["Linear"])),
    "compressed MXFP4": compressed("mxfp4-pack-quantized", preset_name_to_scheme("MXFP4", ["Linear"])),
    "compressed MXFP8": compressed("mxfp8-quantized", preset_name_to_scheme("MXFP8", ["Linear"])),
    "GPTQ INT4": gptq(scalar_types.uint4b8),
    "GPTQ INT4, ordered": gptq(scalar_types.uint4b8, ordered=True),
    "GPTQ INT4 by row": gptq(scalar_types.uint4b8, group=-1),
    "GPTQ INT4, version 2": gptq(scalar_types.uint4b8, version=2),
    "GPTQ INT4, asymmetric": gptq(scalar_types.uint4),
    "GPTQ INT8": gptq(scalar_types.uint8b128),
    "GPTQ INT8, asymmetric, version 2": gptq(scalar_types.uint8, version=2),
    "AWQ": Format(AWQ, awq_weight),
    "ModelOpt FP8": modelopt("FP8", partial(modelopt_fp8_weight, shape=GroupShape.PER_TENSOR)),
    "ModelOpt FP8 by row": modelopt(
        "FP8_PER_CHANNEL_PER_TOKEN", partial(modelopt_fp8_weight, shape=GroupShape.PER_TOKEN)
    ),
    "ModelOpt FP8 by block": modelopt("fp8_pb_wo", partial(modelopt_fp8_weight, shape=GroupShape(128, 128))),
    "ModelOpt MXFP8": modelopt("MXFP8", modelopt_mxfp8_weight),
    "ModelOpt NVFP4": modelopt("NVFP4", modelopt_nvfp4_weight),
    "ModelOpt NVFP4, weights alone": modelopt("W4A16_NVFP4", modelopt_nvfp4_weight),
}


def write(layout: Format, folder: Path, layers: int = 1) -> tuple[Path, Path]:
    """Returns a part of the example as a quantised checkpoint, and what that stands for in float32."""
    plain = folder / "plain"
    plain.mkdir(parents=True)
    config = json.loads((MODEL / "config.json").read_text()) | {"num_hidden_layers": layers}
    config |= {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    (plain / "config.json").write_text(json.dumps(config))
    stored, undone = {}, {}
    torch.manual_seed(0)
    for name, tensor in load_file(MODEL / "model.safetensors").items():
        numbers = {what: int(number) for what, number in re.findall(r"(layers|experts)\.(\d+)\.", name)}
        if numbers.get("layers", 0) >= layers or numbers.get("experts", 0) >= EXPERTS:
            continue
        stored[name] = undone[name] = tensor[:EXPERTS].clone() if name.endswith("mlp.gate.weight") else tensor
        if "_proj.weight" in name:
            parts, undone[name] = layout.quantise(tensor.float())
            del stored[name]
            stem = name.removesuffix(".weight")
            stored |= {stem + end: part for end, part in parts.items()} | {f"{stem}.input_scale": torch.ones(())}
    stored, undone = ({name: tensor.contiguous() for name, tensor in of.items()} for of in (stored, undone))
    return write_quantised(plain, stored, undone, layout.quantisation)


@pytest.fixture(autouse=True)
def eager():
    """Rounding to FP4 is compiled in the library, which takes longer than all that is rounded here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_is_what_the_library_makes_of_it(name, tmp_path):
    assert_same_model(*write(FORMATS[name], tmp_path))


@pytest.mark.parametrize("name", ["compressed W4A16, asymmetric", "compressed NVFP4", "GPTQ INT4, ordered", "AWQ"])
def test_calibration_gives_what_the_dequantised_model_gives(name, tmp_path):
    assert_same_results(*write(FORMATS[name], tmp_path, layers=2))


def merged(attention: Format, experts: Format, quantisation: dict, folder: Path) -> tuple[Path, Path]:
    """Returns a checkpoint, and what it stands for, whose attention is quantised in another way than its experts."""
    pairs = zip(write(attention, folder / "attention"), write(experts, folder / "experts"), strict=True)
    stored, undone = (
        {name: part for name, part in load_file(one / "model.safetensors").items() if "self_attn" in name}
        | {name: part for name, part in load_file(other / "model.safetensors").items() if "self_attn" not in name}
        for one, other in pairs
    )
    return write_quantised(folder / "attention" / "plain", stored, undone, quantisation, folder / "merged")


def test_a_checkpoint_in_two_of_the_formats_of_compressed_tensors(tmp_path):
    layouts = [FORMATS["compressed FP8 by block"], FORMATS["compressed NVFP4"]]
    groups = {
        target: layout.quantisation["config_groups"]["group_0"] | {"targets": [target], "format": kind}
        for target, layout, kind in zip(
            ("re:.*self_attn.*", "re:.*experts.*"), layouts, ("float-quantized", "nvfp4-pack-quantized"), strict=True
        )
    }
    quantisation = layouts[0].quantisation | {"format": "mixed-precision", "config_groups": groups}
    assert_same_model(*merged(*layouts, quantisation, tmp_path))


def test_a_checkpoint_in_two_of_the_formats_of_modelopt(tmp_path):
    layouts = [FORMATS["ModelOpt FP8"], FORMATS["ModelOpt NVFP4"]]
    layers = {"model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"}, "experts": {"quant_algo": "NVFP4"}}
    quantisation = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    assert_same_model(*merged(*layouts, quantisation, tmp_path))


def test_gptq_with_bits_and_groups_of_their_own_for_some_layers(tmp_path):
    experts = gptq(scalar_types.uint4b8)
    quantisation = experts.quantisation | {
        "dynamic": {"+:.*self_attn.*": {"bits": 8, "group_size": 64}, "-:.*gate": {}}
    }
    folder, plain = merged(gptq(scalar_types.uint8b128, group=64), experts, quantisation, tmp_path)
    assert_same_model(folder, plain)
    change(folder, lambda tensors: {name: tensors[name] for name in tensors if not name.endswith("g_idx")})
    assert_same_model(folder, plain)


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(how(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_of_gptq_version_1_may_be_zero(bits):
    """Less by one they are -1, which takes one off the next code of the word."""
    zeros = torch.randint(1 << bits, (2, 64))
    zeros[:, ::3] = 0
    packed = gptq_pack(zeros.T, bits, 64, 2).T
    parts = Parts(values=torch.zeros(8, 64, dtype=torch.int32), scales=torch.ones(2, 64), zeros=packed - ONES[bits])
    assert torch.equal(gptq_codes(parts, is_v1=True)[2], zeros.T)


def test_modelopt_may_have_its_configuration_in_a_file_of_its_own(tmp_path):
    folder, plain = write(FORMATS["ModelOpt NVFP4"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    algorithm = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
    content = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": algorithm}
    (folder / "hf_quant_config.json").write_text(json.dumps(content))
    assert_same_model(folder, plain)
    content["quantization"] = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    (plain / "hf_quant_config.json").write_text(json.dumps(content))
    assert_same_model(plain, plain)
    content["quantization"] = {"quant_algo": "NVFP4_AWQ"}
    (folder / "hf_quant_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is quantised \(modelopt NVFP4_AWQ\), which is dequantised here only for "):
        Checkpoint(str(folder))


DOWN = "model.layers.0.mlp.experts.2.down_proj"  # [256, 32]
UP = "model.layers.0.mlp.experts.2.up_proj"  # [32, 256]


def without(end: str, name: str = DOWN) -> Callable:
    return lambda tensors: {key: tensors[key] for key in tensors if key != name + end}


def cut(end: str, name: str = DOWN, dim: int = 0) -> Callable:
    return lambda tensors: (
        tensors | {name + end: tensors[name + end].narrow(dim, 0, tensors[name + end].shape[dim] - 1)}
    )


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("compressed FP8 by row", without(".weight_scale"), "is F8_E4M3 and has no scale: calibrate the checkpoint"),
        ("compressed W4A16", without(".weight_scale"), "is I32 and has no scale: calibrate the checkpoint that this"),
        ("GPTQ INT4", without(".scales"), "is I32 and has no scale: calibrate the checkpoint that this one"),
        ("ModelOpt NVFP4", without(".weight_scale"), "is U8 and has no scale: calibrate the checkpoint that this one"),
        ("ModelOpt NVFP4", without(".weight_scale_2"), "the checkpoint has no _global_scale"),
        ("compressed NVFP4", without(".weight_global_scale"), "the checkpoint has no _global_scale"),
        ("compressed W4A16", without(".weight_shape"), "the checkpoint has no _shape"),
        ("compressed W4A16, asymmetric", without(".weight_zero_point"), "the checkpoint has no .qzeros or _zero_point"),
        ("compressed W4A16, ordered", without(".weight_g_idx"), "the checkpoint has no .g_idx or _g_idx"),
        ("GPTQ INT4, ordered", without(".g_idx"), "the checkpoint has no .g_idx or _g_idx"),
        ("GPTQ INT4", without(".qzeros"), "the checkpoint has no .qzeros or _zero_point"),
        ("AWQ", without(".qzeros"), "the checkpoint has no .qzeros or _zero_point"),
        (
            "compressed FP8 by row",
            cut(".weight_scale"),
            "weights (256, 32) in blocks of (1, all) have scales (255, 1)",
        ),
        (
            "compressed FP8 by block",
            cut(".weight_scale"),
            "weights (256, 32) in blocks of (128, 128) have scales (1, 1)",
        ),
        (
            "compressed NVFP4",
            cut(".weight_scale", dim=1),
            "weights (256, 32) in blocks of (1, 16) have scales (256, 1)",
        ),
        ("compressed INT8, asymmetric", cut(".weight_zero_point"), "scales (256, 1) have zeros (255, 1)"),
        ("compressed W4A16", cut(".weight_packed", dim=1), "weights (256, 32) of 4 or 8 bits are in words (256, 3)"),
        (
            "compressed W4A16",
            cut(".weight_scale", UP, dim=1),
            "weights (32, 256) in blocks of (1, 32) have scales (32, 7)",
        ),
        ("compressed W4A16, asymmetric", cut(".weight_zero_point"), "scales (256, 1) have zeros (248, 1)"),
        (
            "GPTQ INT4, ordered",
            cut(".scales", UP),
            "weights (32, 256) in blocks of the groups of 256 columns have scales (32, 7)",
        ),
        (
            "GPTQ INT4",
            cut(".g_idx", UP),
            "weights (32, 256) in blocks of the groups of 255 columns have scales (32, 8)",
        ),
        ("GPTQ INT4", cut(".qzeros", UP, dim=1), "zeros (8, 3) and scales (8, 32) make 3 bits"),
        ("AWQ", cut(".scales", UP), "weights (32, 256) in blocks of (1, 32) have scales (32, 7)"),
        ("AWQ", cut(".qzeros", UP), "scales (32, 8) have zeros (32, 7)"),
    ],
)
def test_weights_with_missing_or_misshapen_parts_are_named(name, how, said, tmp_path):
    folder, _ = write(FORMATS[name], tmp_path)
    change(folder, lambda tensors: {key: part.contiguous() for key, part in how(tensors).items()})
    with pytest.raises(
        ValueError, match=rf"^--model {folder}: model.layers.0.mlp.experts.2.(up|down)_proj.weight"
    ) as error:
        calibrated(folder)
    assert said in str(error.value)

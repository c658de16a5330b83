"""Parts of checkpoints in every format that is published, and what is said of those that can't be read."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    DeepseekV3Config,
    GptOssConfig,
    LagunaConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import score_layer
from sere_dist.moe import MoeShape, routed_experts
from tests.support.checkpoints import assert_same_model, assert_same_results, calibrated, write_quantised

COMMON = {
    "vocab_size": 128,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_experts_per_tok": 2,
    "head_dim": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
QWEN = Qwen3MoeConfig(**COMMON, num_experts=4)
SMALL = Qwen3MoeConfig(**COMMON | {"hidden_size": 32, "moe_intermediate_size": 16, "head_dim": 8}, num_experts=4)
LAGUNA = LagunaConfig(**COMMON | {"hidden_size": 32, "head_dim": 8}, num_experts=4)
# As in DeepSeek-V3 itself, kv_a_proj_with_mqa has 128 + 64 rows: half of its last block is missing.
DEEPSEEK = DeepseekV3Config(
    **COMMON | {"num_key_value_heads": 4, "head_dim": 64},
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_rope_head_dim=64,
    qk_nope_head_dim=64,
    v_head_dim=64,
)
GPT_OSS = GptOssConfig(**COMMON | {"max_position_embeddings": 131072}, num_local_experts=4, sliding_window=8)
INDEX = "model.safetensors.index.json"


def save_random(config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.float32, **how) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        tensor.normal_(mean=float("norm" in name), std=0.3)
    model.to(dtype).save_pretrained(folder, **how)
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return save_random(SMALL, tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = save_random(SMALL, tmp_path_factory.mktemp("sharded"), max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", [{}, {"max_shard_size": "50KB"}], ids=["single file", "sharded"])
def test_every_dtype_and_form_is_loaded_as_transformers_loads_it(tmp_path, dtype, how):
    folder = save_random(SMALL, tmp_path, dtype, **how)
    assert (folder / INDEX).exists() == bool(how)
    assert_same_model(folder, folder)


@pytest.mark.parametrize("config", [SMALL, LAGUNA], ids=["Qwen3", "Laguna"])
def test_tensors_may_have_the_names_of_the_parameters(config, tmp_path):
    """Experts stacked, that is; of Laguna's names the rules for published checkpoints would make others."""
    folder = save_random(config, tmp_path / "model", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in Checkpoint(str(folder)).files
    assert_same_model(folder, save_random(config, tmp_path / "published"))


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_embeddings_are_loaded_by_whichever_name_they_have(tmp_path, stored):
    config = Qwen3MoeConfig(**SMALL.to_diff_dict() | {"tie_word_embeddings": True})
    folder = save_random(config, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors[stored] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert_same_model(folder, folder)


def test_sharded_and_single_give_the_same(single, sharded):
    assert_same_results(single, sharded)


def test_nothing_but_what_is_wanted_is_loaded(single):
    checkpoint = Checkpoint(str(single))
    model = checkpoint.empty_model()
    assert all(tensor.is_meta for tensor in model.parameters())
    checkpoint.load(model, lambda name: name.startswith("model.layers.1.mlp.experts."), "cpu")
    loaded = {name for name, tensor in model.named_parameters() if not tensor.is_meta}
    assert loaded == {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}


class Float8(NamedTuple):
    """How a published FP8 checkpoint is written."""

    config: PretrainedConfig
    quantisation: dict
    block: tuple[int, int] | None  # None: the whole tensor
    suffix: str
    scale_dtype: torch.dtype


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
NOT_CONVERTED = ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.input_layernorm", "model.layers.1.mlp.gate"]
FLOAT8 = {
    "Qwen3": Float8(QWEN, BLOCKS | {"modules_to_not_convert": NOT_CONVERTED}, (128, 128), "_scale_inv", torch.bfloat16),
    "DeepSeek-V3": Float8(DEEPSEEK, BLOCKS, (128, 128), "_scale_inv", torch.float32),
    "a scale for each tensor": Float8(
        QWEN, {"quant_method": "fp8", "activation_scheme": "static"}, None, "_scale", torch.float32
    ),
    "MXFP8": Float8(QWEN, {"quant_method": "mxfp8"}, (1, 32), "_scale_inv", torch.uint8),
}


def quantised(weight: torch.Tensor, kind: Float8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the values, the scales as stored, and the weights that they stand for, block by block."""
    rows, columns = kind.block or weight.shape
    values, dequantised = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns), dtype=kind.scale_dtype)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = (slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns))
            scale = weight[block].abs().max() / 448
            if kind.scale_dtype == torch.uint8:
                exponent = scale.log2().ceil()
                scales[row, column], scale = exponent + 127, exponent.exp2()
            else:
                scale = scales[row, column] = scale.to(kind.scale_dtype)
            values[block] = (weight[block] / scale.float()).to(torch.float8_e4m3fn)
            dequantised[block] = values[block].float() * scale.float()
    return values, scales if kind.block else scales.squeeze(), dequantised


def write_float8(kind: Float8, folder: Path) -> tuple[Path, Path]:
    """Returns a checkpoint whose experts' and attention's projections are FP8, and what it stands for in float32."""
    plain = save_random(kind.config, folder / "plain")
    stored, dequantised = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        stored[name] = dequantised[name] = tensor
        if "_proj" in name and tensor.ndim == 2:
            stored[name], stored[name + kind.suffix], dequantised[name] = quantised(tensor, kind)
            stored[name.replace("weight", "input_scale")] = torch.ones(())
    return write_quantised(plain, stored, dequantised, kind.quantisation)


def write_mxfp4(folder: Path) -> tuple[Path, Path]:
    """Returns a GPT-OSS checkpoint as published, and what it stands for in float32."""
    plain = save_random(GPT_OSS, folder / "plain", torch.bfloat16)
    stored, dequantised = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensor.shape
            blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 126, blocks.shape[:3], dtype=torch.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            code = torch.stack([blocks % 16, blocks // 16], dim=-1).flatten(3).float()
            exponent, mantissa = (code % 8) // 2, code % 2
            size = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2 ** (exponent - 1))
            weight = torch.where(code < 8, size, -size) * 2 ** (scales[..., None].float() - 127)
            dequantised[name] = weight.flatten(2).transpose(1, 2).contiguous()
        else:
            stored[name] = dequantised[name] = tensor
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return write_quantised(plain, stored, dequantised, {"quant_method": "mxfp4", "modules_to_not_convert": kept})


QUANTISED = {name: partial(write_float8, kind) for name, kind in FLOAT8.items()} | {"GPT-OSS": write_mxfp4}


@pytest.fixture(scope="module", params=QUANTISED)
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    return QUANTISED[request.param](tmp_path_factory.mktemp("quantised"))


def test_quantised_checkpoints_are_what_they_stand_for(pair):
    assert_same_model(*pair)
    assert_same_results(*pair)


def test_scoring_dequantises_the_experts_of_its_layer_alone(pair, tmp_path):
    folder, plain = pair
    part = split(folder, r"model\.layers\.1\.mlp\.experts\.", tmp_path)
    (part / "rest.safetensors").unlink()
    result = score_layer(Checkpoint(str(part)), 1, [], "weights")
    assert torch.equal(result.similarity_EE, score_layer(Checkpoint(str(plain)), 1, [], "weights").similarity_EE)
    with pytest.raises(OSError, match=r"the folder has no rest\.safetensors"):
        calibrated(part)


def split(source: Path, pattern: str, folder: Path) -> Path:
    """Writes a checkpoint of two files, `wanted` and `rest`: the tensors whose names match a pattern, and others."""
    tensors = load_file(source / "model.safetensors")
    files = {name: "wanted.safetensors" if re.match(pattern, name) else "rest.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    shutil.copy(source / "config.json", folder)
    return folder


def test_quantised_weights_without_a_scale_are_refused(pair, tmp_path):
    folder = shutil.copytree(pair[0], tmp_path / "copy")
    change(folder, lambda tensors: {name: tensors[name] for name in tensors if "_scale" not in name})
    with pytest.raises(ValueError, match=r"is (F8_E4M3|U8) and has no scale: calibrate the checkpoint that this one"):
        calibrated(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]  # as some tools leave it out
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is F8_E4M3 and has no scale|has nothing for .*experts.*proj"):
        calibrated(folder)


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(how(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def test_scales_of_another_block_size_are_refused(tmp_path):
    folder, _ = write_float8(FLOAT8["Qwen3"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 128]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError,
        match=r"--model .*_proj\.weight: weights \(\d+, \d+\) in blocks of \(64, 128\) or .* have scales \(\d, \d\)",
    ):
        calibrated(folder)


NVIDIA = {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}
ROTATED = {"format": "pack-quantized", "config_groups": {}, "transform_config": {"config_groups": {"R1": {}}}}
COMPRESSED = {"quant_method": "compressed-tensors"}
MARLIN = COMPRESSED | {"format": "marlin-24", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}


@pytest.mark.parametrize(
    ("quantisation", "what", "name", "sibling"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq 4 bits gemv", "Qwen/Qwen3-AWQ", "Qwen/Qwen3"),
        ({"quant_method": "gptq", "bits": 3}, "gptq 3 bits gptq", "Qwen/Qwen3-30B-A3B-GPTQ-Int3", "Qwen/Qwen3-30B-A3B"),
        ({"quant_method": "gptq"}, "gptq None bits gptq", "Qwen/Qwen3-30B-A3B-GPTQ-Int4", "Qwen/Qwen3-30B-A3B"),
        (MARLIN, "compressed-tensors marlin-24", "zai-org/GLM-4.5-Air-FP8", "zai-org/GLM-4.5-Air"),
        (
            COMPRESSED | ROTATED,
            "compressed-tensors transforms",
            "RedHatAI/Mixtral-8x7B-Instruct-v0.1-FP8-dynamic",
            "RedHatAI/Mixtral-8x7B-Instruct-v0.1",
        ),
        (
            COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "compressed-tensors sparse",
            "RedHatAI/Qwen3-30B-A3B-quantized.w4a16",
            "RedHatAI/Qwen3-30B-A3B",
        ),
        (NVIDIA, "modelopt W4A8_AWQ", "models/moe", None),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes", "unsloth/Qwen3-unsloth-bnb-4bit", "unsloth/Qwen3"),
        ({"quant_method": "quark"}, "quark", "models/my_moe_awq", "models/my_moe"),
        ({"bits": 4}, "None", "models/my-moe", None),
    ],
)
def test_other_quantised_checkpoints_are_refused_for_what_they_were_made_from(
    tmp_path, monkeypatch, quantisation, what, name, sibling
):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    (Path(name) / "config.json").write_text(json.dumps(SMALL.to_dict() | {"quantization_config": quantisation}))
    where = f"{sibling}, by its name" if sibling else "base_model in its card"
    with pytest.raises(ValueError) as error:
        Checkpoint(name)
    assert f"--model {name} is quantised ({what}), which is dequantised here only for fp8, " in str(error.value)
    assert f"calibrate the checkpoint it was made from ({where});" in str(error.value)


def write_config(folder: Path, content: dict | str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model_type": "nonesuch"}, "model type `nonesuch`"),
        ({"model_type": "nonesuch", "auto_map": {"AutoConfig": "more.Config"}}, "custom code"),
        ({"hidden_size": 8}, "model_type"),
        ({"model_type": "mixtral", "num_hidden_layers": "three"}, "num_hidden_layers"),
        ("{", "not a valid JSON file"),
    ],
)
def test_configurations_that_transformers_cannot_read(tmp_path, content, said):
    folder = write_config(tmp_path / "model", content)
    with pytest.raises(ValueError, match=f"--model {folder} must be a folder.* can read: (.|\n)*{said}"):
        Checkpoint(folder)


def test_models_without_routed_experts(tmp_path):
    checkpoint = Checkpoint(write_config(tmp_path / "llama", LlamaConfig(num_hidden_layers=1).to_dict()))
    with pytest.raises(ValueError, match="llama has no routed experts"):
        MoeShape.from_config(checkpoint.config)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no routed experts"):
        routed_experts(checkpoint.empty_model())


def test_models_that_write_no_text(tmp_path):
    checkpoint = Checkpoint(write_config(tmp_path / "clip", CLIPConfig().to_dict()))
    with pytest.raises(ValueError, match="has no causal language model for clip"):
        checkpoint.empty_model()


def test_a_folder_that_this_machine_lacks():
    """An absolute path is never a model of the Hub: a job's driver has seen the folder, on another node."""
    with pytest.raises(ValueError, match=r"--model /no/such/folder: the machine .* storage that all nodes share"):
        Checkpoint("/no/such/folder")


def test_a_folder_has_one_name_everywhere(single, monkeypatch):
    monkeypatch.chdir(Path(single).parent)
    checkpoint = Checkpoint(Path(single).name)
    assert (checkpoint.name, checkpoint.place) == (Path(single).name, str(Path(single).resolve()))


@pytest.mark.parametrize("name", ["./no/such", "no/such/folder", "someone/not-cached"])
def test_names_of_nothing(name):
    with pytest.raises(
        ValueError, match=rf"--model {name} \(no such folder here\) must be a folder, or a model on the Hub"
    ):
        Checkpoint(name)


def without(*names: str) -> Callable:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def cut(name: str) -> Callable:
    return lambda tensors: tensors | {name: tensors[name][:-1].contiguous()}


EXPERT = "model.layers.1.mlp.experts.2"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (without("model.embed_tokens.weight"), r"nothing for model\.embed_tokens\.weight \(shape \(128, 32\)\)"),
        (without("model.layers.0.self_attn.q_norm.weight"), r"nothing for model\.layers\.0\.self_attn\.q_norm\.weight"),
        (
            without(f"{EXPERT}.up_proj.weight"),
            r"model\.layers\.1\.mlp\.experts\.gate_up_proj takes 4 of each; the checkpoint has 4 of .*, 3 of .*up_",
        ),
        (
            without(f"{EXPERT}.down_proj.weight"),
            r"experts\.down_proj takes 4 of each; the checkpoint has 3 of .*down_proj",
        ),
        (cut("model.layers.0.self_attn.k_proj.weight"), r"k_proj\.weight is \(15, 32\) .* calls for \(16, 32\)"),
        (cut(f"{EXPERT}.down_proj.weight"), r"experts\.2\.down_proj\.weight is \(31, 16\) .* calls for \(32, 16\)"),
        (cut(f"{EXPERT}.up_proj.weight"), r"experts\.2\.up_proj\.weight is \(15, 32\) .* calls for \(16, 32\)"),
    ],
)
def test_tensors_that_are_missing_or_of_another_shape(single, tmp_path, how, said):
    folder = shutil.copytree(single, tmp_path / "model")
    change(folder, how)
    with pytest.raises(ValueError, match=f"--model {folder}: .*{said}"):
        calibrated(folder)


def test_a_missing_buffer(tmp_path):
    """The bias that DeepSeek-V3 routes by is no parameter, and zero until it is loaded."""
    folder = save_random(DEEPSEEK, tmp_path)
    change(folder, without("model.layers.1.mlp.gate.e_score_correction_bias"))
    with pytest.raises(ValueError, match=r"nothing for model\.layers\.1\.mlp\.gate\.e_score_correction_bias"):
        calibrated(folder)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"lm_head.weight": 5}}'])
def test_a_damaged_index(sharded, tmp_path, index):
    folder = shutil.copytree(sharded, tmp_path / "model")
    (folder / INDEX).write_text(index)
    with pytest.raises(ValueError, match=rf"--model {folder}: {INDEX} is damaged, fetch it again: "):
        calibrated(folder)


def test_an_index_that_names_what_its_file_does_not_have(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    files = index["weight_map"]
    files["model.embed_tokens.weight"] = files["lm_head.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{files['lm_head.weight']}, as {INDEX} says: .*model\.embed_tokens"):
        calibrated(folder)


def test_missing_and_truncated_files(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "model")
    shard = folder / Checkpoint(str(folder)).files["model.embed_tokens.weight"]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"{shard} is damaged or not whole, fetch it again"):
        calibrated(folder)
    shard.unlink()
    with pytest.raises(OSError, match=rf"--model {folder}: the folder has no {shard.name}"):
        calibrated(folder)
    with pytest.raises(OSError, match=rf"--model {folder}: the folder has no {shard.name}"):
        _ = Checkpoint(str(folder)).fingerprint


def test_a_checkpoint_in_the_old_format(single, tmp_path):
    torch.save(load_file(single / "model.safetensors"), tmp_path / "pytorch_model.bin")
    shutil.copy(single / "config.json", tmp_path)
    with pytest.raises(ValueError, match=rf"has neither {INDEX} nor model\.safetensors; save it as safetensors"):
        calibrated(tmp_path)


def test_fingerprint_tells_of_changes(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "model")
    before = Checkpoint(str(folder)).fingerprint
    assert before == Checkpoint(str(folder)).fingerprint
    assert before.keys() == {"config.json", *(file.name for file in folder.glob("*.safetensors"))}
    for name in before:
        os.utime(folder / name, ns=(0, 0))
        assert {file for file, state in Checkpoint(str(folder)).fingerprint.items() if state != before[file]} == {name}
        os.utime(folder / name, ns=(0, int(before[name].split()[-1])))


def test_stored_bytes(single, sharded, tmp_path):
    parameters = Checkpoint(str(single)).empty_model().num_parameters()
    for folder in (single, sharded):
        assert Checkpoint(str(folder)).stored_bytes(parameters) == pytest.approx(4, rel=0.1)
    half = save_random(SMALL, tmp_path, torch.bfloat16)
    assert Checkpoint(str(half)).stored_bytes(parameters) == pytest.approx(2, rel=0.2)
    (half / "model.safetensors").unlink()  # nor is there one before a model on the Hub is fetched
    assert Checkpoint(str(half)).stored_bytes(parameters) == 2
    (half / INDEX).write_text('{"weight_map": {}}')
    assert Checkpoint(str(half)).stored_bytes(parameters) == 2


def test_large_models_take_no_memory_while_empty(tmp_path):
    """An expert parameter of a terabyte, which no allocator would promise."""
    config = Qwen3MoeConfig(num_experts=4096, hidden_size=2**14, moe_intermediate_size=2**11, num_hidden_layers=2)
    model = Checkpoint(write_config(tmp_path / "large", config.to_dict())).empty_model()
    assert model.model.layers[0].mlp.experts.gate_up_proj.nbytes == 2**40
    assert not model.model.rotary_emb.inv_freq.is_meta


def anonymous_memory() -> int:
    """Returns the bytes of memory that this process has and that are no file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def test_experts_are_loaded_in_little_more_than_their_own_memory(tmp_path):
    sizes = {"num_hidden_layers": 1, "hidden_size": 1024, "moe_intermediate_size": 1024}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**COMMON | sizes, num_experts=32), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    del model
    checkpoint = Checkpoint(str(tmp_path))
    empty = checkpoint.empty_model()
    needed = sum(4 * tensor.numel() for tensor in routed_experts(empty)[0][1].parameters())
    before, taken, done = anonymous_memory(), [], Event()

    def watch() -> None:
        while not done.wait(0.001):
            taken.append(anonymous_memory() - before)

    watcher = Thread(target=watch)
    watcher.start()
    checkpoint.load(empty, lambda name: ".experts." in name, "cpu")
    done.set()
    watcher.join()
    assert 0.8 * needed < max(taken) < 1.25 * needed


def test_a_revision_is_for_the_hub_alone(single):
    with pytest.raises(ValueError, match=f"--revision is for models on the Hub: leave it out, --model {single} is a"):
        Checkpoint(str(single), "main")
    assert Checkpoint(str(single)).revision is None


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """The Hub's cache on this machine with one model, `someone/some-moe`, in it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--someone--some-moe"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    save_random(SMALL, model / "snapshots" / COMMIT, max_shard_size="20KB")
    return model / "snapshots" / COMMIT


def test_a_cached_model_of_the_hub(hub_cache):
    checkpoint = Checkpoint("someone/some-moe")
    assert checkpoint.revision == COMMIT
    assert checkpoint.fingerprint == {"commit": COMMIT}
    expected = calibrated(hub_cache)
    for revision in (None, "main", COMMIT):
        found = calibrated("someone/some-moe", revision)
        assert all(torch.equal(found[layer], expected[layer]) for layer in expected)
    with pytest.raises(
        ValueError,
        match=r"--model someone/some-moe .*must be .*config\.json of revision v2 is not in this machine's cache",
    ):
        Checkpoint("someone/some-moe", "v2")


def test_what_is_not_cached_of_a_model_of_the_hub(hub_cache):
    shard = Checkpoint("someone/some-moe").files["model.embed_tokens.weight"]
    (hub_cache / shard).unlink()
    with pytest.raises(OSError, match=f"{shard} of revision {COMMIT} is not in this machine's cache of the Hub"):
        calibrated("someone/some-moe")
    (hub_cache / INDEX).unlink()
    with pytest.raises(ValueError, match=rf"neither .* of revision {COMMIT} is not in this machine's cache of the Hub"):
        calibrated("someone/some-moe")


class Hub(BaseHTTPRequestHandler):
    """Serves the files of one model as the Hub does, and notes what was fetched."""

    folder: Path
    fetched: list[str]

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        file = self.folder / self.path.rsplit("/", 1)[-1]
        there = self.path.startswith("/someone/some-moe/resolve/") and file.is_file()
        content = file.read_bytes() if there else b""
        self.send_response(200 if there else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{file.name}"')
        self.send_header("Content-Length", str(len(content)))
        if not there:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if send:
            self.fetched += [self.path] if there else []
            self.wfile.write(content)

    def log_message(self, *_arguments) -> None:
        pass


SCORE = """
import sys
from sere_dist.calibration.layers import score_layer
from sere_dist.calibration.checkpoint import Checkpoint
print(score_layer(Checkpoint("someone/some-moe"), 1, [], "weights").similarity_EE.tolist())
"""


@pytest.mark.long
def test_only_the_shards_of_a_step_are_fetched_from_the_hub(single, tmp_path):
    Hub.folder, Hub.fetched = split(single, r"model\.layers\.1\.mlp\.experts\.", tmp_path), []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever).start()
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", SCORE], env=environment, capture_output=True, text=True, timeout=120
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    expected_EE = score_layer(Checkpoint(str(single)), 1, [], "weights").similarity_EE
    assert json.loads(done.stdout.splitlines()[-1]) == expected_EE.tolist()
    assert {Path(path).name for path in Hub.fetched} == {"config.json", INDEX, "wanted.safetensors"}
    assert all(COMMIT in path for path in Hub.fetched if "safetensors" in path)

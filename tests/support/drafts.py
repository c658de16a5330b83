"""Random drafting heads of a shape that vLLM loads: an EAGLE-3 head for a model, and a model that brings MTP layers."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Glm4MoeConfig, LlamaConfig

from tests.support.families import COMMON, EXPERTS

LM_HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def save_eagle3_head(model: str, folder: Path) -> None:
    """Writes a one-layer head that reads the hidden states of three of the model's layers."""
    target = AutoConfig.from_pretrained(model)
    hidden, layers = target.hidden_size, target.num_hidden_layers
    config = LlamaConfig(
        architectures=["Eagle3LlamaForCausalLM"],
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=target.head_dim,
        max_position_embeddings=target.max_position_embeddings,
        eagle_aux_hidden_state_layer_ids=[1, layers // 2, layers - 1],
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    layer = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    tensors = {name.replace("model.layers.0", "midlayer").removeprefix("model."): of for name, of in layer.items()}
    for name in ("q_proj", "k_proj", "v_proj"):  # they read a token's embedding, too
        weight = tensors[f"midlayer.self_attn.{name}.weight"]
        tensors[f"midlayer.self_attn.{name}.weight"] = torch.cat((weight, weight), 1)
    tensors["midlayer.hidden_norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors["fc.weight"] = torch.randn(hidden, 3 * hidden, dtype=torch.bfloat16) / hidden**0.5
    config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def save_mtp_model(folder: Path) -> None:
    """Writes a model of family GLM-4.5 with MoE layers 1 and 2, and an MTP layer behind them that has experts, too."""
    sizes = COMMON | {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4}
    config = Glm4MoeConfig(**sizes, n_routed_experts=EXPERTS, n_group=1, topk_group=1, head_dim=32)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    hidden, mtp = config.hidden_size, "model.layers.3"
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{mtp}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors[f"{mtp}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden, dtype=torch.bfloat16) / hidden**0.5
    tensors[f"{mtp}.embed_tokens.weight"] = tensors[EMBEDDINGS].clone()
    tensors[f"{mtp}.shared_head.head.weight"] = tensors[LM_HEAD].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.num_hidden_layers, config.num_nextn_predict_layers = 3, 1
    config.save_pretrained(folder)

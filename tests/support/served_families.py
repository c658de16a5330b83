"""The families of models that people serve, as small random checkpoints of shapes that vLLM's engine takes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import transformers
from transformers import PretrainedConfig

EXPERTS, TOP_K = 8, 2
COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Multi-head latent attention. vLLM's kernels are made for the real models' head sizes.
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
DEEPSEEK = LATENT | {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}
GROUPED = DEEPSEEK | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True}
SPARSE = {"index_topk": 64, "index_head_dim": 128, "index_n_heads": 4}
LINEAR = {
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
FIRST_DENSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}


class Family(NamedTuple):
    """`models` are released ones of this family."""

    models: str
    config: Callable[[], PretrainedConfig]
    moe_layers: tuple[int, ...] = (0, 1, 2)


def family(models: str, config: str, moe_layers: tuple[int, ...] = (0, 1, 2), **changes: Any) -> Family:
    return Family(models, lambda: getattr(transformers, config)(**COMMON | changes), moe_layers)


FAMILIES = {
    "qwen2_moe": family("Qwen1.5-MoE", "Qwen2MoeConfig", num_experts=EXPERTS, shared_expert_intermediate_size=64),
    "qwen3_moe": family("Qwen3-30B-A3B, Qwen3-235B-A22B", "Qwen3MoeConfig", num_experts=EXPERTS, head_dim=32),
    "qwen3_next": family(
        "Qwen3-Next", "Qwen3NextConfig", num_experts=EXPERTS, shared_expert_intermediate_size=64, **LINEAR
    ),
    "qwen3_5_moe": family(
        "Qwen3.5 MoE, Qwen3.6 MoE",
        "Qwen3_5MoeTextConfig",
        num_experts=EXPERTS,
        shared_expert_intermediate_size=64,
        **LINEAR,
    ),
    "glm4_moe": family(
        "GLM-4.5, GLM-4.6, GLM-4.7", "Glm4MoeConfig", (1, 2), n_routed_experts=EXPERTS, head_dim=32, use_qk_norm=True
    ),
    "glm4_moe_lite": family(
        "GLM-4.7-Flash",
        "Glm4MoeLiteConfig",
        (1, 2),
        n_routed_experts=EXPERTS,
        first_k_dense_replace=1,  # vLLM reads it, and released checkpoints have it
        q_lora_rank=64,
        **LATENT,
        **FIRST_DENSE,
    ),
    "glm_moe_dsa": family("GLM-5", "GlmMoeDsaConfig", (1, 2), q_lora_rank=64, **DEEPSEEK, **SPARSE, **FIRST_DENSE),
    "deepseek_v2": family(
        "DeepSeek-V2, V2-Lite",
        "DeepseekV2Config",
        (1, 2),
        topk_method="group_limited_greedy",
        q_lora_rank=None,
        **GROUPED | {"topk_group": 1},
    ),
    "deepseek_v3": family(
        "DeepSeek-V3, R1; Kimi-K2",
        "DeepseekV3Config",
        (1, 2),
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        q_lora_rank=64,
        **GROUPED,
    ),
    "deepseek_v32": family(
        "DeepSeek-V3.2", "DeepseekV32Config", (1, 2), q_lora_rank=64, **GROUPED, **SPARSE, **FIRST_DENSE
    ),
    "deepseek_v4": family(
        "DeepSeek-V4",
        "DeepseekV4Config",
        n_routed_experts=EXPERTS,
        head_dim=64,
        num_key_value_heads=1,
        q_lora_rank=64,
        o_lora_rank=64,
        o_groups=2,
        **SPARSE,
    ),
    "kimi_linear": family(
        "Kimi-Linear",
        "KimiLinearConfig",
        (1, 2),
        num_local_experts=EXPERTS,
        linear_head_dim=32,
        linear_num_heads=4,
        **LATENT,
        **FIRST_DENSE,
    ),
    "minimax_m2": family(
        "MiniMax-M2", "MiniMaxM2Config", num_local_experts=EXPERTS, head_dim=32, rotary_dim=32, scoring_func="sigmoid"
    ),
    "gemma4": family(
        "Gemma-4 26B-A4B",
        "Gemma4TextConfig",
        head_dim=32,
        global_head_dim=32,
        enable_moe_block=True,
        hidden_size_per_layer_input=0,
        num_experts=EXPERTS,
        top_k_experts=TOP_K,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "nemotron_h": family(
        "Nemotron-3",
        "NemotronHConfig",
        (1,),
        layers_block_type=["mamba", "moe", "attention"],
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        moe_shared_expert_intermediate_size=64,
        n_group=1,
        topk_group=1,
        head_dim=32,
        mamba_num_heads=4,
        mamba_head_dim=64,
        ssm_state_size=16,
        n_groups=1,
    ),
    "granitemoe": family("Granite-3 MoE", "GraniteMoeConfig", num_local_experts=EXPERTS),
    "granitemoehybrid": family(
        "Granite-4 hybrid",
        "GraniteMoeHybridConfig",
        num_local_experts=EXPERTS,
        shared_intermediate_size=64,
        layer_types=["mamba", "mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_head=64,
        mamba_d_state=16,
    ),
    "llama4": family(
        "Llama-4",
        "Llama4TextConfig",
        num_local_experts=EXPERTS,
        head_dim=32,
        intermediate_size_mlp=96,
        interleave_moe_layer_step=1,
        attention_chunk_size=128,
    ),
    "ernie4_5_moe": family(
        "ERNIE-4.5",
        "Ernie4_5_MoeConfig",
        (1, 2),
        moe_num_experts=EXPERTS,
        moe_k=TOP_K,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        head_dim=32,
    ),
    "gpt_oss": family(
        "gpt-oss",
        "GptOssConfig",
        num_local_experts=EXPERTS,
        head_dim=64,
        max_position_embeddings=131072,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=32,
    ),
    "mixtral": family("Mixtral", "MixtralConfig", num_local_experts=EXPERTS),
    "olmoe": family("OLMoE", "OlmoeConfig", num_experts=EXPERTS),
    "lfm2_moe": family(
        "LFM2 MoE",
        "Lfm2MoeConfig",
        (1, 2),
        num_experts=EXPERTS,
        num_dense_layers=1,
        layer_types=["conv", "conv", "full_attention"],
    ),
}

"""Families of models other than the example's, at the sizes of small random checkpoints."""

from typing import NamedTuple

from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

EXPERTS = 8
COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
GPT_OSS = {
    "max_position_embeddings": 131072,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 8,
}


class Family(NamedTuple):
    config: PretrainedConfig
    moe_layers: tuple[int, ...] = (0, 1, 2)


FAMILIES = {
    "qwen2_moe": Family(
        Qwen2MoeConfig(**COMMON, num_experts=EXPERTS, shared_expert_intermediate_size=32, mlp_only_layers=[1]), (0, 2)
    ),
    "qwen3_moe": Family(Qwen3MoeConfig(**COMMON, num_experts=EXPERTS, head_dim=24, norm_topk_prob=True)),
    "deepseek_v2": Family(
        DeepseekV2Config(**COMMON | DEEPSEEK, topk_method="group_limited_greedy", q_lora_rank=None), (1, 2)
    ),
    "deepseek_v3": Family(DeepseekV3Config(**COMMON | DEEPSEEK, q_lora_rank=24), (1, 2)),
    "glm4_moe": Family(
        Glm4MoeConfig(**COMMON, n_routed_experts=EXPERTS, n_group=2, topk_group=1, head_dim=16, use_qk_norm=True),
        (1, 2),
    ),
    "gpt_oss": Family(GptOssConfig(**COMMON | GPT_OSS, num_local_experts=EXPERTS, head_dim=16)),
    "mixtral": Family(MixtralConfig(**COMMON, num_local_experts=EXPERTS)),
    "olmoe": Family(OlmoeConfig(**COMMON, num_experts=EXPERTS)),
}

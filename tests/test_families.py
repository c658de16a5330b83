"""Other families than the example's, as small random checkpoints: calibrated by our functions, re-routed in vLLM."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV2Config, MixtralConfig, Qwen2MoeConfig
from vllm import LLM, SamplingParams

from sere_dist.artifact import Artifact
from sere_dist.calibration import capture_expert_inputs, score_layer
from sere_dist.moe import MoeShape, routed_experts
from tests.conftest import small_artifact

COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "group_limited_greedy",
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
FAMILIES = {
    "mixtral": MixtralConfig(**COMMON, num_key_value_heads=2, num_local_experts=8),
    "qwen2_moe": Qwen2MoeConfig(**COMMON, num_key_value_heads=2, num_experts=8, shared_expert_intermediate_size=64),
    "deepseek_v2": DeepseekV2Config(**COMMON, **DEEPSEEK, n_routed_experts=8),
}
MOE_LAYERS = {"mixtral": (0, 1, 2), "qwen2_moe": (0, 1, 2), "deepseek_v2": (1, 2)}  # DeepSeek-V2's first is dense


@pytest.mark.parametrize("family", FAMILIES)
def test_calibrated_and_rerouted(family, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    layers = MOE_LAYERS[family]
    assert tuple(sorted(routed_experts(model))) == layers

    inputs = capture_expert_inputs(model.float().eval(), torch.randint(2, 512, (4, 32)))
    artifact = small_artifact(layers=layers, **vars(MoeShape.from_config(config)))
    for layer in layers:
        artifact.similarity[layer], _ = score_layer(config, layer, inputs[layer], "frobenius", "linear", "cpu")
    artifact.save(tmp_path / "artifact")

    llm = LLM(
        str(tmp_path / "model"),
        enforce_eager=True,
        max_model_len=128,
        skip_tokenizer_init=True,
        additional_config={"sere": {"artifact": str(tmp_path / "artifact"), "select_top_k": 1}},
    )
    prompts = [{"prompt_token_ids": list(range(start, start + 10))} for start in range(100, 180, 10)]
    llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False), use_tqdm=False)
    (worker,) = llm.collective_rpc("sere_counters")
    llm.llm_engine.engine_core.shutdown()
    assert tuple(worker["layers"]) == layers
    for layer in worker["layers"].values():
        assert layer["rerouted_slots"] > 0
        assert layer["active_experts_after"] < layer["active_experts_before"]


def test_two_sets_of_experts_in_one_layer_are_refused():
    """As in models with experts of their own for text and images."""
    model = AutoModelForCausalLM.from_config(FAMILIES["mixtral"])
    model.model.layers[1].more = copy.deepcopy(routed_experts(model)[0][1])
    with pytest.raises(ValueError, match=r"layer 1 has several sets of routed experts: .*layers\.1\.mlp\.experts and "):
        routed_experts(model)


def test_the_artifact_of_one_family_is_not_for_another():
    artifact: Artifact = small_artifact()
    shape = MoeShape.from_config(FAMILIES["mixtral"])
    with pytest.raises(ValueError, match="architecture: artifact Qwen3MoeForCausalLM"):
        artifact.check_serves(shape, "some/mixtral")

"""Families other than the example's, as small random checkpoints: calibrated by our functions, re-routed in vLLM."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, MixtralConfig, Qwen2MoeConfig
from vllm import LLM, SamplingParams

from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import expert_inputs, score_layer, text_blocks
from sere_dist.moe import MoeShape
from tests.support.artifacts import small_artifact
from tests.support.families import COMMON, DEEPSEEK, EXPERTS, Family

SERVED_COMMON = {**COMMON, "vocab_size": 512, "hidden_size": 128}
SERVED_DEEPSEEK = DEEPSEEK | {
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    # vLLM's attention is made for the real models' head sizes.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
SERVED = {
    "mixtral": Family(MixtralConfig(**SERVED_COMMON, num_local_experts=EXPERTS)),
    "qwen2_moe": Family(Qwen2MoeConfig(**SERVED_COMMON, num_experts=EXPERTS, shared_expert_intermediate_size=64)),
    "deepseek_v2": Family(
        DeepseekV2Config(**SERVED_COMMON | SERVED_DEEPSEEK, topk_method="group_limited_greedy", q_lora_rank=None),
        (1, 2),
    ),
}


@pytest.mark.parametrize(
    "family", ["deepseek_v2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("mixtral", "qwen2_moe"))]
)
def test_calibrated_and_rerouted(family, tmp_path):
    config, layers = SERVED[family]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")

    checkpoint = Checkpoint(str(tmp_path / "model"))
    inputs = dict(expert_inputs(checkpoint, text_blocks(torch.randint(2, 512, (4, 32)).tolist())))
    assert tuple(inputs) == layers
    artifact = small_artifact(layers=layers, **vars(MoeShape.from_config(checkpoint.config)))
    for layer in layers:
        artifact.layers[layer].similarity_EE = score_layer(checkpoint, layer, inputs[layer], "frobenius").similarity_EE
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

"""A pipeline of two stages: each re-routes the layers that it has."""

import pytest

from examples.tiny_moe.data import MODEL
from tests.support import engines

LAYERS, BATCH, PROMPT, NEW = 6, 8, 24, 16


@pytest.mark.slow
def test_every_stage_reroutes_its_layers(heldout_ids, artifact_path):
    """Compiled: vLLM 0.32 itself does not run eager pipelines on CPUs."""
    prompts = heldout_ids[:BATCH, :PROMPT].tolist()
    options = {
        "model": str(MODEL),
        "max_model_len": 256,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "mp",
    }
    (stock,) = engines.run(options, prompts, NEW, [{}], env={"VLLM_PLUGINS": ""})
    sere = {"additional_config": {"sere": {"artifact": str(artifact_path), "select_top_k": 2}}}
    off, on = engines.run(
        options | sere | {"pipeline_parallel_size": 2}, prompts, NEW, [{"enabled": False}, {"enabled": True}]
    )
    assert off["tokens"] == stock["tokens"] != on["tokens"]
    assert [(stage["rank"], list(stage["layers"])) for stage in on["counters"]] == [(0, list("012")), (1, list("345"))]
    for stage in on["counters"]:
        for layer in stage["layers"].values():
            assert layer["rows"] == BATCH * (NEW - 1)
            assert 0 < layer["active_experts_after"] < layer["active_experts_before"]

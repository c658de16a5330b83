"""INT8 experts in vLLM's CPU engine, re-routed by the artifact of the model before it was quantised."""

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe.experts import cpu_moe

from examples.tiny_moe.data import MODEL
from tests.support.quantised import save_int8_experts

TOP_K, NEW = 8, 16
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def any_x86(monkeypatch):
    """vLLM picks these kernels where AMX is. They compute the same without, and this machine may have none."""
    monkeypatch.setattr(cpu_moe.CPUExpertsInt8, "_supports_current_device", staticmethod(lambda: True))


@pytest.fixture
def model(tmp_path) -> str:
    save_int8_experts(MODEL, tmp_path / "int8")
    return str(tmp_path / "int8")


def start(model: str, **options) -> LLM:
    return LLM(model, enforce_eager=True, max_model_len=128, enable_prefix_caching=False, **options)


def test_quantised_experts_are_rerouted(model, artifact_path, heldout_ids):
    prompts = [{"prompt_token_ids": ids} for ids in heldout_ids[:8, :24].tolist()]
    parameters = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)

    def tokens(llm: LLM) -> list[list[int]]:
        return [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, parameters, use_tqdm=False)]

    llm = start(model)
    stock = tokens(llm)
    llm.llm_engine.engine_core.shutdown()
    llm = start(model, additional_config={"sere": {"artifact": str(artifact_path), "select_top_k": TOP_K}})
    assert tokens(llm) == stock
    llm.collective_rpc("sere_settings", kwargs={"select_top_k": 2})
    llm.collective_rpc("sere_counters", kwargs={"reset": True})
    assert tokens(llm) != stock
    (worker,) = llm.collective_rpc("sere_counters")
    kernels = {type(runner.routed_experts.quant_method.moe_kernel.fused_experts) for runner in runners_of(llm)}
    llm.llm_engine.engine_core.shutdown()
    assert kernels == {cpu_moe.CPUExpertsInt8}
    for layer in worker["layers"].values():
        assert layer["rerouted_slots"] > 0
        assert layer["active_experts_after"] < 0.75 * layer["active_experts_before"]


def runners_of(llm: LLM) -> list:
    return llm.llm_engine.model_executor.driver_worker.worker.sere_runners.values()


def test_a_repeated_slot_is_computed_as_often_as_it_stands():
    """Of the kernel itself: two slots of one expert give what one with the sum of their weights does."""
    torch.manual_seed(0)
    experts, hidden, inner, rows = 4, 64, 32, 3
    w13 = torch.ops._C.convert_weight_packed(torch.randint(-127, 128, (experts, 2 * inner, hidden), dtype=torch.int8))
    w2 = torch.ops._C.convert_weight_packed(torch.randint(-127, 128, (experts, hidden, inner), dtype=torch.int8))
    scales = torch.rand(experts, 2 * inner, 1) / 100, torch.rand(experts, hidden, 1) / 100
    x = torch.randn(rows, hidden, dtype=torch.bfloat16)

    def run(weights: list[float], ids: list[int]) -> torch.Tensor:
        output = torch.empty_like(x)
        cpu_moe.fused_experts_cpu(
            output,
            x,
            w13,
            w2,
            torch.tensor([weights] * rows),
            torch.tensor([ids] * rows, dtype=torch.int32),
            cpu_moe.CPUQuantMethod.INT8_W8A8,
            *scales,
            *[None] * 7,
            True,
        )
        return output.float()

    repeated = run([0.5, 0.3, 0.2], [1, 1, 3])
    scale = float(repeated.abs().max())
    assert (repeated - run([0.8, 0.2, 0.0], [1, 3, 2])).abs().max() < 0.02 * scale
    assert (repeated - run([0.5, 0.2, 0.0], [1, 3, 2])).abs().max() > 0.1 * scale

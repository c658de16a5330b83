"""Speculative decoding in real engines: the target is re-routed, the draft model is left alone."""

import pytest
from vllm import LLM, SamplingParams

from examples.tiny_moe.data import MODEL
from tests.support import engine_spy, engines

LAYERS, TOP_K, BATCH, PROMPT, NEW, DRAFT = 6, 8, 8, 24, 24, 3
NGRAM = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
ITSELF = {"method": "draft_model", "model": str(MODEL)}  # a draft model that has MoE layers, too
slow = pytest.mark.slow


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((ITSELF, True), id="itself-eager"),
        pytest.param((ITSELF, False), id="itself-compiled", marks=slow),
        pytest.param((NGRAM, True), id="ngram-eager", marks=slow),
        pytest.param((NGRAM, False), id="ngram-compiled", marks=slow),
    ],
)
def options(request) -> dict:
    speculation, is_eager = request.param
    return {
        "model": str(MODEL),
        "enforce_eager": is_eager,
        "max_model_len": 256,
        "max_num_batched_tokens": BATCH * PROMPT,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "mp",
        "speculative_config": {**speculation, "num_speculative_tokens": DRAFT},
    }


@pytest.fixture(scope="module")
def prompts(heldout_ids) -> list[list[int]]:
    return heldout_ids[:BATCH, :PROMPT].tolist()


@pytest.fixture(scope="module")
def stock_tokens(options, prompts) -> list[list[int]]:
    """Greedy tokens of the same engine without any plugin."""
    (answer,) = engines.run(options, prompts, NEW, [{}], env={"VLLM_PLUGINS": ""})
    return answer["tokens"]


@pytest.fixture(scope="module")
def llm(options, stock_tokens, artifact_path):
    llm = LLM(**options, additional_config={"sere": {"artifact": str(artifact_path), "select_top_k": 2}})
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture
def fresh(llm) -> LLM:
    llm.collective_rpc("sere_settings", kwargs={"select_top_k": 2, "enabled": True})
    llm.collective_rpc("sere_counters", kwargs={"reset": True})
    return llm


def greedy(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    parameters = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


@pytest.mark.parametrize("off", [{"enabled": False}, {"select_top_k": TOP_K}])
def test_off_gives_the_stock_engines_tokens(fresh, prompts, stock_tokens, off):
    fresh.collective_rpc("sere_settings", kwargs=off)
    assert greedy(fresh, prompts) == stock_tokens


def test_rows_that_verify_drafts_are_rerouted_and_counted(fresh, prompts, stock_tokens):
    assert greedy(fresh, prompts) != stock_tokens
    (worker,) = fresh.collective_rpc("sere_counters")
    drafted, accepted = worker["drafted_tokens"], worker["accepted_tokens"]
    assert len(drafted) == len(accepted) == DRAFT and sum(drafted) > 0
    assert all(0 <= of_accepted <= of_drafted for of_accepted, of_drafted in zip(accepted, drafted, strict=True))
    assert drafted == sorted(drafted, reverse=True) and accepted == sorted(accepted, reverse=True)
    for layer in worker["layers"].values():
        assert layer["rerouted_slots"] > 0 and layer["active_experts_after"] < layer["active_experts_before"]
        # Of the tokens after the first, which is the prompt's: one of a request's is the model's own in each step.
        assert layer["rows"] >= sum(drafted) + BATCH * (NEW - 1) - sum(accepted) - BATCH * DRAFT


def test_a_draft_model_is_left_alone(fresh, prompts, options):
    fresh.collective_rpc(engine_spy.watch)
    greedy(fresh, prompts)
    ((kernel_ids, rerouted),) = fresh.collective_rpc(engine_spy.take)
    (worker,) = fresh.collective_rpc("sere_counters")
    assert len(rerouted) == sum(layer["steps"] for layer in worker["layers"].values())
    drafts_have_experts = options["speculative_config"].get("model") == str(MODEL)  # they run in the same kernel
    assert (len(kernel_ids) > 2 * len(rerouted)) == drafts_have_experts

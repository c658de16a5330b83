"""Speculative decoding in real engines: the target is re-routed, the draft model only where it is asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoConfig
from vllm import LLM, SamplingParams

from examples.tiny_moe.data import MODEL
from sere_dist.moe import MoeShape
from tests.support import engine_spy, engines
from tests.support.artifacts import small_artifact
from tests.support.drafts import save_eagle3_head, save_mtp_model

BATCH, PROMPT, NEW, DRAFT = 8, 24, 24, 3
slow, matrix = pytest.mark.slow, pytest.mark.matrix


class Case(NamedTuple):
    """A model and what drafts for it."""

    model: str
    artifact: str
    speculation: dict
    drafts_have_experts: bool
    top_k: int = 8
    select_top_k: int = 2


def itself(_folder, artifact) -> Case:
    """A draft model that has MoE layers, too, and whose drafts are mostly accepted."""
    return Case(str(MODEL), artifact, {"method": "draft_model", "model": str(MODEL)}, True)


def ngram(_folder, artifact) -> Case:
    speculation = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    return Case(str(MODEL), artifact, speculation, False)


def eagle3(folder, artifact) -> Case:
    save_eagle3_head(str(MODEL), folder / "head")
    return Case(str(MODEL), artifact, {"method": "eagle3", "model": str(folder / "head")}, False)


def mtp(folder, _artifact) -> Case:
    """GLM-4.5's MTP layer, which has experts."""
    save_mtp_model(folder / "model")
    model, artifact = str(folder / "model"), str(folder / "artifact")
    shape = MoeShape.from_config(AutoConfig.from_pretrained(model))
    small_artifact(layers=(1, 2), **vars(shape)).save(Path(artifact))
    return Case(model, artifact, {"method": "mtp"}, True, top_k=2, select_top_k=1)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((itself, True), id="itself-eager"),
        pytest.param((itself, False), id="itself-compiled", marks=slow),
        *(pytest.param((case, True), id=f"{case.__name__}-eager", marks=slow) for case in (ngram, eagle3, mtp)),
        *(
            pytest.param((case, False), id=f"{case.__name__}-compiled", marks=(slow, matrix))
            for case in (ngram, eagle3, mtp)
        ),
    ],
)
def case_and_options(request, tmp_path_factory, artifact_path) -> tuple[Case, dict]:
    make_case, is_eager = request.param
    case = make_case(tmp_path_factory.mktemp("drafts"), str(artifact_path))
    return case, options_of(case, is_eager)


def options_of(case: Case, is_eager: bool) -> dict:
    return {
        "model": case.model,
        "skip_tokenizer_init": True,
        "enforce_eager": is_eager,
        "max_model_len": 256,
        "max_num_batched_tokens": BATCH * PROMPT,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "mp",
        "speculative_config": {**case.speculation, "num_speculative_tokens": DRAFT},
    }


@pytest.fixture(scope="module")
def case(case_and_options) -> Case:
    return case_and_options[0]


@pytest.fixture(scope="module")
def options(case_and_options) -> dict:
    return case_and_options[1]


@pytest.fixture(scope="module")
def prompts(heldout_ids) -> list[list[int]]:
    return heldout_ids[:BATCH, :PROMPT].tolist()


@pytest.fixture(scope="module")
def run_stock(prompts) -> Callable[[dict], list[list[int]]]:
    """Returns the greedy tokens of an engine with these options, without any plugin. It is started once."""
    known: dict[str, list[list[int]]] = {}

    def run(options: dict) -> list[list[int]]:
        key = json.dumps(options)
        if key not in known:
            (answer,) = engines.run(options, prompts, NEW, [{}], env={"VLLM_PLUGINS": ""})
            known[key] = answer["tokens"]
        return known[key]

    return run


@pytest.fixture(scope="module")
def stock_tokens(options, run_stock) -> list[list[int]]:
    return run_stock(options)


@pytest.fixture(scope="module")
def llm(case, options, stock_tokens):
    llm = LLM(**options, additional_config={"sere": {"artifact": case.artifact, "select_top_k": case.select_top_k}})
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture
def fresh(case, llm) -> LLM:
    llm.collective_rpc("sere_settings", kwargs={"select_top_k": case.select_top_k, "enabled": True})
    llm.collective_rpc("sere_counters", kwargs={"reset": True})
    return llm


def greedy(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    parameters = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


@pytest.mark.parametrize("off", ["enabled", "select_top_k"])
def test_off_gives_the_stock_engines_tokens(case, fresh, prompts, stock_tokens, off):
    fresh.collective_rpc("sere_settings", kwargs={off: case.top_k if off == "select_top_k" else False})
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
        verifying = layer["verifying"]
        assert verifying.keys() < layer.keys() and all(0 <= verifying[name] <= layer[name] for name in verifying)
        assert verifying["rows"] >= verifying["steps"] + sum(drafted), "a step has a row besides the drafts"


def test_what_drafts_is_left_alone(case, fresh, prompts):
    fresh.collective_rpc(engine_spy.watch)
    greedy(fresh, prompts)
    ((kernel_ids, rerouted),) = fresh.collective_rpc(engine_spy.take)
    (worker,) = fresh.collective_rpc("sere_counters")
    assert len(rerouted) == sum(layer["steps"] for layer in worker["layers"].values())
    assert (len(kernel_ids) > 2 * len(rerouted)) == case.drafts_have_experts  # which run in the same kernel


@pytest.mark.slow
@pytest.mark.parametrize("is_eager", [True, pytest.param(False, marks=matrix)], ids=["eager", "compiled"])
def test_a_draft_model_is_rerouted_by_settings_of_its_own(tmp_path, prompts, artifact_path, run_stock, is_eager):
    """It only proposes: while the served model keeps its experts, the answers are the stock engine's."""
    options = options_of(itself(tmp_path, str(artifact_path)), is_eager)
    stock_tokens = run_stock(options)
    draft = {"artifact": str(artifact_path), "select_top_k": 2}
    llm = LLM(**options, additional_config={"sere": {**draft, "select_top_k": 8, "draft": draft}})
    try:
        assert greedy(llm, prompts) == stock_tokens
        (worker,) = llm.collective_rpc("sere_counters", kwargs={"reset": True})
        assert all(layer["rerouted_slots"] == 0 and layer["rows"] > 0 for layer in worker["layers"].values())
        drafting = worker["draft_layers"]
        assert drafting.keys() == worker["layers"].keys()
        for layer in drafting.values():
            assert layer["rerouted_slots"] > 0 and layer["active_experts_after"] < layer["active_experts_before"]
            assert layer["steps"] >= DRAFT * (NEW - 1) / (DRAFT + 1), "a pass for every drafted token"
        rejected = sum(worker["drafted_tokens"]) - sum(worker["accepted_tokens"])

        llm.collective_rpc("sere_settings", kwargs={"enabled": False})
        assert greedy(llm, prompts) == stock_tokens
        (worker,) = llm.collective_rpc("sere_counters")
        assert all(layer["rerouted_slots"] == 0 for layer in worker["draft_layers"].values())
        assert sum(worker["drafted_tokens"]) - sum(worker["accepted_tokens"]) < rejected
    finally:
        llm.llm_engine.engine_core.shutdown()

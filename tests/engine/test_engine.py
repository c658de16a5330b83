"""Re-routing inside vLLM, compiled (vLLM's default on CPU) and eager, in its real worker processes."""

import os
import re

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from examples.tiny_moe.data import HELDOUT, MODEL
from sere_dist.artifact.folder import Artifact
from tests.support import engine_spy, engines

LAYERS, TOP_K, BATCH, PROMPT, NEW = 6, 8, 8, 24, 16


@pytest.fixture(scope="module", params=["compiled", pytest.param("eager", marks=pytest.mark.slow)])
def eager(request) -> bool:
    return request.param == "eager"


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = pq.read_table(HELDOUT).to_pylist()[:BATCH]
    return [{"prompt_token_ids": tokenizer(row["text"])["input_ids"][:PROMPT]} for row in rows]


def options(eager: bool) -> dict:
    return {
        "model": str(MODEL),
        "enforce_eager": eager,
        "max_model_len": 256,
        "max_num_batched_tokens": BATCH * PROMPT,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "mp",  # workers are processes of their own
    }


def start(eager: bool, **sere) -> LLM:
    return LLM(**options(eager), additional_config={"sere": sere})


def greedy(llm: LLM, prompts: list[dict]) -> list[list[int]]:
    parameters = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    return [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, parameters, use_tqdm=False)]


@pytest.fixture(scope="module")
def stock_tokens(eager, prompts) -> list[list[int]]:
    """Greedy tokens without any plugin."""
    ids = [prompt["prompt_token_ids"] for prompt in prompts]
    (answer,) = engines.run(options(eager), ids, NEW, [{}], env={"VLLM_PLUGINS": ""})
    return answer["tokens"]


@pytest.fixture(scope="module")
def llm(eager, stock_tokens, artifact_path):
    llm = start(eager, artifact=str(artifact_path), select_top_k=2)
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture
def fresh(llm):
    """The engine with its policy and counters as at the start."""
    as_started = {
        "select_top_k": 2,
        "threshold": 0.0,
        "enabled": True,
        "rows": "decode",
        "min_rows": 1,
        "max_rows": None,
    }
    llm.collective_rpc("sere_settings", kwargs=as_started)
    llm.collective_rpc("sere_counters", kwargs={"reset": True})
    return llm


def counters(llm: LLM) -> list[dict[str, int]]:
    (worker,) = llm.collective_rpc("sere_counters", kwargs={"reset": True})
    assert list(worker["layers"]) == list(range(LAYERS)), "a layer is not re-routed"
    return list(worker["layers"].values())


def test_keeping_all_experts_gives_the_stock_engines_tokens(fresh, prompts, stock_tokens):
    fresh.collective_rpc("sere_settings", kwargs={"select_top_k": TOP_K})
    assert greedy(fresh, prompts) == stock_tokens
    assert all(layer["rerouted_slots"] == 0 and layer["rows"] > 0 for layer in counters(fresh))


def test_switched_off_gives_the_stock_engines_tokens(fresh, prompts, stock_tokens):
    rerouted_tokens = greedy(fresh, prompts)
    fresh.collective_rpc("sere_settings", kwargs={"enabled": False})
    assert greedy(fresh, prompts) == stock_tokens
    fresh.collective_rpc("sere_settings", kwargs={"enabled": True})
    assert greedy(fresh, prompts) == rerouted_tokens
    assert rerouted_tokens != stock_tokens


def test_the_effect_is_counted_in_every_layer(fresh, prompts):
    greedy(fresh, prompts)
    for layer in counters(fresh):
        # The first token of an answer comes from the prefill step; each later one is a decode row.
        assert layer["steps"] == NEW - 1 and layer["rows"] == BATCH * (NEW - 1)
        assert layer["critical_slots"] == 0 < layer["rerouted_slots"]
        assert 2 * layer["steps"] <= layer["active_experts_after"] < layer["active_experts_before"]


def test_a_threshold_keeps_critical_experts(fresh, prompts, stock_tokens):
    fresh.collective_rpc("sere_settings", kwargs={"threshold": 1.0})
    assert greedy(fresh, prompts) == stock_tokens
    assert all(layer["critical_slots"] > 0 == layer["rerouted_slots"] for layer in counters(fresh))


def test_settings_out_of_range_change_nothing(fresh):
    before = fresh.collective_rpc("sere_settings")
    for change in (
        {"select_top_k": 0},
        {"select_top_k": TOP_K + 1},
        {"threshold": -1.0},
        {"artifact": "x"},
        {"max_rows": -1},
    ):
        with pytest.raises(Exception, match=next(iter(change))):
            fresh.collective_rpc("sere_settings", kwargs=change)
        assert fresh.collective_rpc("sere_settings") == before


@pytest.mark.parametrize("gate", [{"min_rows": BATCH + 1}, {"max_rows": BATCH - 1}])
def test_steps_outside_the_gates_are_left_alone(fresh, prompts, stock_tokens, gate):
    fresh.collective_rpc("sere_settings", kwargs=gate)
    assert greedy(fresh, prompts) == stock_tokens
    assert all(layer["rerouted_slots"] == 0 < layer["rows"] for layer in counters(fresh))
    fresh.collective_rpc("sere_settings", kwargs={"min_rows": BATCH, "max_rows": BATCH})
    assert greedy(fresh, prompts) != stock_tokens


def test_a_request_can_opt_out(fresh, prompts, stock_tokens):
    """Its rows neither change nor vote: the others are re-routed as if they were alone."""
    opted_out = [i % 2 == 0 for i in range(BATCH)]
    parameters = [
        SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, extra_args={"sere": "off"} if out else None)
        for out in opted_out
    ]
    mixed = [list(answer.outputs[0].token_ids) for answer in fresh.generate(prompts, parameters, use_tqdm=False)]
    assert all(layer["rows"] == BATCH // 2 * (NEW - 1) for layer in counters(fresh))
    assert [t for t, out in zip(mixed, opted_out, strict=True) if out] == stock_tokens[::2]
    assert [t for t, out in zip(mixed, opted_out, strict=True) if not out] == greedy(fresh, prompts[1::2])


# From here on the workers are watched: keep these last.


def test_no_layer_of_a_decode_step_runs_an_expert_outside_the_primary_union(fresh, prompts):
    (pid,) = fresh.collective_rpc(engine_spy.watch)
    assert pid != os.getpid(), "the worker is a process of its own"
    greedy(fresh, prompts)
    ((kernel_ids, rerouted),) = fresh.collective_rpc(engine_spy.take)
    assert len(kernel_ids) == NEW * LAYERS, "the kernel runs once a layer and step"
    assert len(rerouted) == (NEW - 1) * LAYERS, "the prefill step is not re-routed"
    changed = 0
    for ids_TK, (weights, before, valid) in zip(kernel_ids[LAYERS:], rerouted, strict=True):
        assert valid == [True] * BATCH
        primary = set()
        for row, experts in zip(weights, before, strict=True):
            heaviest = sorted(range(TOP_K), key=lambda k, row=row: (-row[k], k))[:2]
            primary |= {experts[k] for k in heaviest}
        assert {expert for row in ids_TK for expert in row} == primary
        changed += ids_TK != before
    assert changed > 0


def test_prefill_rows_of_a_mixed_step_are_not_rerouted(fresh, prompts):
    """A prompt of two and a half steps' tokens is computed in chunks beside another request's decoding."""
    fresh.collective_rpc(engine_spy.take)
    engine, step_tokens = fresh.llm_engine, BATCH * PROMPT
    sampling = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (NEW, 4)]
    engine.add_request("decoding", {"prompt_token_ids": prompts[0]["prompt_token_ids"]}, sampling[0])
    engine.step()
    engine.step()
    long_prompt = [100 + i % 1000 for i in range(250)]
    engine.add_request("prefilling", {"prompt_token_ids": long_prompt}, sampling[1])
    while engine.has_unfinished_requests():
        engine.step()
    ((kernel_ids, rerouted),) = fresh.collective_rpc(engine_spy.take)
    mixed = [(before, valid) for _, before, valid in rerouted if len(valid) > 2]
    # The decoding request came first, so its row is the first; the rest is prompt, the last chunk's too.
    sizes = [len(valid) for _, valid in mixed[::LAYERS]]
    assert sizes == [step_tokens, 1 + len(long_prompt) - (step_tokens - 1)]
    assert all(valid == [True] + [False] * (len(valid) - 1) for _, valid in mixed)
    ran = [ids for ids in kernel_ids if len(ids) in sizes]
    assert len(ran) == len(mixed)
    for ids, (before, _) in zip(ran, mixed, strict=True):
        assert ids[1:] == before[1:], "a prefill row was re-routed"
        assert len(set(ids[0])) == 2 and set(ids[0]) <= set(before[0])


def test_prefill_can_be_rerouted_too(fresh, prompts):
    fresh.collective_rpc("sere_settings", kwargs={"rows": "all"})
    greedy(fresh, prompts)
    assert all(layer["rows"] == BATCH * (PROMPT + NEW - 1) for layer in counters(fresh))


def test_structured_output_keeps_its_structure(fresh, prompts):
    """vLLM masks the logits that re-routed experts lead to: what it promises of an answer's form holds."""
    pattern = r"(yes|no)( and (yes|no)){2}"
    parameters = SamplingParams(temperature=0, max_tokens=48, structured_outputs=StructuredOutputsParams(regex=pattern))
    answers = [answer.outputs[0].text for answer in fresh.generate(prompts, parameters, use_tqdm=False)]
    assert all(re.fullmatch(pattern, answer) for answer in answers), answers
    assert all(layer["rerouted_slots"] > 0 for layer in counters(fresh))


@pytest.mark.slow
def test_a_restart_follows_the_settings(llm, eager, artifact_path, prompts, stock_tokens):
    """Compiled: the graph comes from the cache of the first start, and must not have the policy baked in."""
    again = start(eager, artifact=str(artifact_path), select_top_k=2)
    rerouted_tokens = greedy(again, prompts)
    again.collective_rpc("sere_settings", kwargs={"select_top_k": TOP_K})
    kept_tokens = greedy(again, prompts)
    again.llm_engine.engine_core.shutdown()
    assert kept_tokens == stock_tokens != rerouted_tokens


@pytest.mark.slow
def test_every_rank_of_a_tensor_parallel_group_reroutes_alike(artifact_path, prompts, host_kernels):
    """And so does the backend of GPUs, with the kernel's build for this CPU and prompts from the prefix cache. A layer
    that slips away stops the engine."""
    sere = {"artifact": str(artifact_path), "select_top_k": 2}
    cached = {"enable_prefix_caching": True, "block_size": 32}
    llm = LLM(**options(eager=True) | cached, tensor_parallel_size=2, additional_config={"sere": sere})
    ids = [prompt["prompt_token_ids"] for prompt in prompts]
    longer = [{"prompt_token_ids": first + second} for first, second in zip(ids[::2], ids[1::2], strict=True)]

    def run() -> tuple[list, list, list]:
        answers = llm.generate(longer, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True), use_tqdm=False)
        counted = llm.collective_rpc("sere_counters", kwargs={"reset": True})
        return [list(a.outputs[0].token_ids) for a in answers], counted, [a.num_cached_tokens for a in answers]

    tokens, (first, second), of_cache = run()
    library = host_kernels[torch.int32].library._name
    llm.collective_rpc(engine_spy.kernel, args=(library,))
    by_kernel = run()
    llm.collective_rpc(engine_spy.forget_a_layer)
    with pytest.raises(Exception, match="layer 2 chose its experts without asking sere_dist"):
        run()
    llm.llm_engine.engine_core.shutdown()
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["layers"] == second["layers"]
    assert all(layer["rerouted_slots"] > 0 for layer in first["layers"].values())
    assert set(of_cache) == {0}
    assert by_kernel == (tokens, [first, second], [32] * len(longer))


def test_a_layer_that_is_not_rerouted_stops_the_start(artifact_path, tmp_path, capfd):
    """The artifact lacks a layer that the model has; only the loaded model tells."""
    artifact = Artifact.load(artifact_path)
    del artifact.layers[5], artifact.config.layer_names[5]
    artifact.save(tmp_path / "five-layers")
    with pytest.raises(Exception, match="WorkerProc initialization failed"):
        start(True, artifact=str(tmp_path / "five-layers"), select_top_k=2)
    output = "".join(capfd.readouterr())
    assert "the model's MoE layers are [0, 1, 2, 3, 4, 5], the artifact has [0, 1, 2, 3, 4]" in output

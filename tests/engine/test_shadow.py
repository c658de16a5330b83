"""The shadow check in a real engine: it measures the right number, and changes nothing else."""

import pytest
import torch
import torch.nn.functional as F
from vllm import LLM, SamplingParams

from examples.tiny_moe.data import MODEL
from sere_dist.artifact.folder import Artifact
from sere_dist.evaluation.lockstep import decode_logits
from sere_dist.evaluation.rerouters import paper_rerouter
from sere_dist.method.records import Settings
from tests.support import engine_spy

LAYERS, TOP_K, KEEP = 6, 8, 2
BATCH, PROMPT, NEW = 8, 24, 17
STEPS = NEW - 1  # the first token of an answer comes from its prompt's step
STEP_TOKENS = BATCH * PROMPT


@pytest.fixture(scope="module", params=["compiled", pytest.param("eager", marks=pytest.mark.slow)])
def llm(request, artifact_path):
    llm = start(artifact_path, enforce_eager=request.param == "eager")
    yield llm
    llm.llm_engine.engine_core.shutdown()


def start(artifact_path, **options) -> LLM:
    sere = {"artifact": str(artifact_path), "select_top_k": KEEP, "shadow_share": 0}
    return LLM(
        str(MODEL),
        dtype="float32",
        max_model_len=256,
        max_num_batched_tokens=STEP_TOKENS,
        enable_prefix_caching=False,
        distributed_executor_backend="mp",  # workers are processes of their own
        additional_config={"sere": sere},
        **options,
    )


@pytest.fixture
def fresh(llm):
    """The engine with its settings and counters as at the start."""
    as_started = {"select_top_k": KEEP, "enabled": True, "min_rows": 1, "max_rows": None, "share": 1.0}
    llm.collective_rpc("sere_settings", kwargs={**as_started, "shadow_share": 0})
    llm.collective_rpc("sere_counters", kwargs={"reset": True})
    return llm


@pytest.fixture(scope="module")
def prompts(heldout_ids) -> list[dict]:
    return [{"prompt_token_ids": ids} for ids in heldout_ids[:BATCH, :PROMPT].tolist()]


def greedy(llm: LLM, prompts: list[dict], **sampling) -> list[list[int]]:
    parameters = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, **sampling)
    return [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, parameters, use_tqdm=False)]


def checked(llm: LLM) -> dict[str, float]:
    """What the checks have counted since they were last asked."""
    (worker,) = llm.collective_rpc("sere_counters", kwargs={"reset": True})
    return worker["shadow"]


def answer_mixed_steps(llm: LLM, prompts: list[dict]) -> list[tuple]:
    """Samples answers of several lengths, with a long prompt that is computed in chunks beside them, and returns all
    tokens and log-probabilities in the order in which they came."""
    engine, seen = llm.llm_engine, []

    def ask(name: str, prompt: dict, tokens: int, **sampling) -> None:
        parameters = SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=3, **sampling)
        engine.add_request(name, prompt, parameters)

    for i, prompt in enumerate(prompts):
        ask(str(i), prompt, NEW + i, temperature=1, seed=i)
    for step in range(200):
        if step == 5:
            ask("late", {"prompt_token_ids": [100 + i % 1000 for i in range(STEP_TOKENS + 40)]}, 6, temperature=0)
        for output in engine.step():
            (answer,) = output.outputs
            logprobs = [{token: of.logprob for token, of in place.items()} for place in answer.logprobs]
            seen.append((output.request_id, list(answer.token_ids), logprobs))
        if not engine.has_unfinished_requests():
            return seen
    raise AssertionError("the engine does not come to an end")


def test_nothing_else_changes(fresh, prompts):
    """To the bit: every token, log-probability and counter of re-routing, whatever the share."""
    seen, counted, rows = [], [], []
    for share in (0, 1.0, 0.4):
        fresh.collective_rpc("sere_settings", kwargs={"shadow_share": share})
        fresh.collective_rpc("sere_counters", kwargs={"reset": True})
        seen.append(answer_mixed_steps(fresh, prompts))
        (worker,) = fresh.collective_rpc("sere_counters", kwargs={"reset": True})
        counted.append(worker["layers"])
        rows.append(worker["shadow"]["rows"])
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) > BATCH * STEPS
    assert counted[0] == counted[1] == counted[2]
    assert all(layer["rerouted_slots"] > 0 for layer in counted[0].values())
    assert rows[0] == 0 < rows[2] < rows[1] < counted[0][0]["rows"], "the prompt's two steps are not checked"


def test_it_measures_what_rerouting_changes_in_a_step(fresh, prompts, model, artifact_path):
    """The same KL divergence as transformers', of each step re-routed against that step alone not re-routed."""
    fresh.collective_rpc("sere_settings", kwargs={"shadow_share": 1.0})
    answers = greedy(fresh, prompts)
    measured = checked(fresh)
    assert measured["rows"] == BATCH * STEPS
    texts = [prompt["prompt_token_ids"] + answer for prompt, answer in zip(prompts, answers, strict=True)]
    rerouter = paper_rerouter(Artifact.load(artifact_path).tables, Settings(KEEP))

    def logits_BDV(step: int | None = None) -> torch.Tensor:
        """Those of all steps, of which one is not re-routed."""

        def but_one(layer, weights_DBK, ids_DBK, scores_DBE):
            rerouted = rerouter(layer, weights_DBK, ids_DBK, scores_DBE)
            if step is not None:
                for mine, given in zip(rerouted, (weights_DBK, ids_DBK), strict=True):
                    mine[step] = given[step]
            return rerouted

        return decode_logits(model, torch.tensor(texts), prompt_length=PROMPT, rerouter=but_one)

    on_BDV, off_BDV = logits_BDV(), torch.stack([logits_BDV(step)[:, step] for step in range(STEPS)], dim=1)

    def kl(off: torch.Tensor, on: torch.Tensor) -> float:
        log_p, log_q = off.double().log_softmax(-1), on.double().log_softmax(-1)
        return float(F.kl_div(log_q, log_p, reduction="sum", log_target=True)) / measured["rows"]

    expected = kl(off_BDV, on_BDV)
    assert measured["kl"] / measured["rows"] == pytest.approx(expected, rel=1e-3)
    assert expected > 0.01
    # Neither the other direction nor a history without re-routing would pass.
    everywhere = decode_logits(model, torch.tensor(texts), prompt_length=PROMPT)
    assert kl(on_BDV, off_BDV) != pytest.approx(expected, rel=0.02)
    assert kl(everywhere, on_BDV) != pytest.approx(expected, rel=0.02)


def test_keeping_all_experts_measures_nothing(fresh, prompts):
    fresh.collective_rpc("sere_settings", kwargs={"shadow_share": 1.0, "select_top_k": TOP_K})
    greedy(fresh, prompts)
    assert checked(fresh) == {"kl": 0.0, "rows": BATCH * STEPS}


def test_a_share_of_the_rerouted_steps_is_checked(fresh, prompts):
    fresh.collective_rpc("sere_settings", kwargs={"shadow_share": 0.25})
    greedy(fresh, prompts)
    assert checked(fresh)["rows"] == BATCH * STEPS / 4
    fresh.collective_rpc("sere_settings", kwargs={"shadow_share": 1.0})
    for left_alone in ({"min_rows": BATCH + 1}, {"min_rows": 1, "max_rows": BATCH - 1}, {"enabled": False}):
        fresh.collective_rpc("sere_settings", kwargs=left_alone)
        greedy(fresh, prompts)
        assert checked(fresh) == {"kl": 0.0, "rows": 0}, left_alone


def test_rows_that_opt_out_are_not_counted(fresh, prompts):
    fresh.collective_rpc("sere_settings", kwargs={"shadow_share": 1.0})
    greedy(fresh, prompts, extra_args={"sere": "off"})
    assert checked(fresh) == {"kl": 0.0, "rows": 0}
    parameters = [
        SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, extra_args={"sere": "off"} if i % 2 else None)
        for i in range(BATCH)
    ]
    fresh.generate(prompts, parameters, use_tqdm=False)
    assert checked(fresh)["rows"] == BATCH // 2 * STEPS


@pytest.mark.slow
def test_ranks_of_a_tensor_parallel_group_check_the_same_steps(artifact_path, prompts, host_kernels):
    """And so do those that re-route by the kernel of GPUs, in its build for this CPU."""
    llm = start(artifact_path, enforce_eager=True, tensor_parallel_size=2)

    def answer(share: float) -> tuple[list, list]:
        llm.collective_rpc("sere_settings", kwargs={"shadow_share": share})
        llm.collective_rpc("sere_counters", kwargs={"reset": True})
        return greedy(llm, prompts), llm.collective_rpc("sere_counters")

    (plain, counted), (tokens, workers) = answer(0), answer(0.5)
    llm.collective_rpc(engine_spy.kernel, args=(host_kernels[torch.int32].library._name,))
    by_kernel = answer(0.5)
    llm.llm_engine.engine_core.shutdown()
    assert tokens == plain
    assert [worker["layers"] for worker in workers] == [worker["layers"] for worker in counted]
    assert workers[0]["shadow"] == workers[1]["shadow"]
    assert workers[0]["shadow"]["rows"] == BATCH * STEPS / 2 and workers[0]["shadow"]["kl"] > 1
    assert by_kernel == (tokens, workers)

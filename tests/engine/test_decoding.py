"""What `lockstep` computes in one forward pass is what a vLLM engine that re-routes decodes, step by step."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from vllm import LLM, SamplingParams

from examples.tiny_moe.data import MODEL
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.recommendation import LayerSetting
from sere_dist.evaluation.lockstep import Rerouter, decode_logits, unchanged
from sere_dist.evaluation.rerouters import paper_rerouter, projection_rerouter
from sere_dist.evaluation.tuning import rerouter_of
from sere_dist.method.records import Settings
from sere_dist.method.similarity import random_similarity
from sere_dist.moe import MoeShape
from tests.support import engine_spy
from tests.support.artifacts import change_layers, recommend, small_artifact

BATCH, PROMPT, NEW, KEEP, LIKELIEST = 8, 24, 24, 2, 5
TOLERANCE = 1e-3  # nats; float32 sums in another order cost about 1e-5
# An engine each. The last has an S and a price for every layer.
POLICIES = [
    "sere",
    *(pytest.param(policy, marks=pytest.mark.slow) for policy in ("projection", "recommended: sere")),
    "recommended: projection",
]
# Every layer does something else, the last nothing.
S_OF_LAYERS, PRICE_OF_LAYERS = (1, 2, 3, 1, 2, 8), (0.0, 0.0, 0.0, 0.03, 0.01, 0.0)


@pytest.fixture(scope="module")
def artifact(model) -> Artifact:
    """Random matrices: substitutes that are nothing like the expert show most of what re-routing does."""
    torch.manual_seed(0)
    shape, layers = MoeShape.from_config(model.config), tuple(range(6))
    artifact = small_artifact(layers=layers, method="projection", **vars(shape))
    similarity = {layer: random_similarity(shape.num_experts, seed=layer) for layer in layers}
    return change_layers(
        artifact,
        similarity_EE=similarity,
        coefficient_EE={layer: 0.2 + matrix for layer, matrix in similarity.items()},
        size_E={layer: 0.5 + torch.rand(shape.num_experts) for layer in layers},
        tokens_E=dict.fromkeys(layers, torch.ones(shape.num_experts, dtype=torch.int64)),
    )


def settings(kind: str) -> dict[int, LayerSetting]:
    """What each layer does by policy `recommended`; only projection has prices."""
    prices = PRICE_OF_LAYERS if kind == "projection" else (0.0,) * 6
    each = zip(S_OF_LAYERS, prices, strict=True)
    return {layer: LayerSetting(select_top_k=s, expert_price=price) for layer, (s, price) in enumerate(each)}


class Served(NamedTuple):
    """`logprobs` has the likeliest tokens of each answer and step; `routed_DBK` the experts that ran, by layer.
    `beside_twin` has what re-routing did to a request beside one with the same prompt that kept its experts, and beside
    one that opted out."""

    policy: str
    ids_BL: torch.Tensor  # prompts and greedy answers
    logprobs: list[list[dict[int, float]]]
    routed_DBK: dict[int, torch.Tensor]
    beside_twin: dict[str, dict[int, dict[str, float]]]


@pytest.fixture(scope="module", params=POLICIES)
def served(request, artifact, heldout_ids, tmp_path_factory) -> Served:
    """All prompts fit into one step, so that every later step decodes all rows."""
    path: Path = tmp_path_factory.mktemp("artifact") / "artifact"
    artifact.save(path)
    sere = {"artifact": str(path), "select_top_k": KEEP, "policy": request.param}
    if request.param.startswith("recommended"):
        sere = {"artifact": str(path), "policy": "recommended"}
        kind = request.param.removeprefix("recommended: ")
        saved = Artifact.load(path)
        replace(saved, recommended=recommend(saved, kind, settings(kind))).save(path, overwrite=True)
    llm = LLM(
        str(MODEL),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_batched_tokens=BATCH * PROMPT,
        enable_prefix_caching=False,
        additional_config={"sere": sere},
    )
    llm.collective_rpc(engine_spy.capture)
    prompts_BL = heldout_ids[:BATCH, :PROMPT]
    parameters = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=LIKELIEST)
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts_BL.tolist()]
    answers = [answer.outputs[0] for answer in llm.generate(prompts, parameters, use_tqdm=False)]
    (worker,) = llm.collective_rpc("sere_counters")
    (routed,) = llm.collective_rpc(engine_spy.captured)
    beside = {}
    for kind in ("keep", "off"):
        llm.collective_rpc("sere_counters", kwargs={"reset": True})
        twins = [
            SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, extra_args=arguments)
            for arguments in (None, {"sere": kind})
        ]
        llm.generate([prompts[0]] * 2, twins, use_tqdm=False)
        (counted,) = llm.collective_rpc("sere_counters")
        beside[kind] = counted["layers"]
    llm.llm_engine.engine_core.shutdown()
    rows = {layer: (counters["rows"], counters["steps"] * BATCH) for layer, counters in worker["layers"].items()}
    assert rows == dict.fromkeys(range(6), (BATCH * (NEW - 1),) * 2)
    ids_BL = torch.cat([prompts_BL, torch.tensor([list(answer.token_ids) for answer in answers])], dim=1)
    found = [[{token: of.logprob for token, of in step.items()} for step in answer.logprobs] for answer in answers]
    routed_DBK = {int(layer): torch.tensor(steps[1:]) for layer, steps in routed.items()}
    return Served(request.param, ids_BL, found, routed_DBK, beside)


def largest_error(model, rerouter: Rerouter, ids_BL: torch.Tensor, found: list[list[dict[int, float]]]) -> float:
    """Returns by how much log-probabilities in lockstep differ at most from those that an engine reported."""
    logits_BDV = decode_logits(model, ids_BL, prompt_length=PROMPT, rerouter=rerouter)
    assert logits_BDV.shape[1] == NEW - 1  # the first new token is the prompt's, which is not re-routed
    return max(
        abs(float(logprobs_V[token]) - logprob)
        for logprobs_DV, steps in zip(logits_BDV.log_softmax(dim=2), found, strict=True)
        for logprobs_V, step in zip(logprobs_DV, steps[1:], strict=True)
        for token, logprob in step.items()
    )


def test_lockstep_equals_decoding_in_vllm(model, artifact, served):
    name, ids_BL, found, *_ = served
    rerouters = {
        "sere": paper_rerouter(artifact.tables, Settings(KEEP)),
        "projection": projection_rerouter(artifact.tables, Settings(KEEP)),
    }
    rerouters |= {
        f"recommended: {kind}": rerouter_of(artifact.tables, kind, settings(kind)) for kind in list(rerouters)
    }
    errors = {other: largest_error(model, rerouter, ids_BL, found) for other, rerouter in rerouters.items()}
    assert errors.pop(name) < TOLERANCE
    # The same check without re-routing, with another policy, and with half of the batch, fails by far.
    errors["off"] = largest_error(model, unchanged, ids_BL, found)
    errors["half"] = largest_error(model, rerouters[name], ids_BL[: BATCH // 2], found[: BATCH // 2])
    assert min(errors.values()) > 100 * TOLERANCE, errors


def test_routed_experts_replay_a_policy_that_keeps_the_routers_weights(model, served):
    """A trainer that recomputes the answers takes the ids of each slot from the engine, and the weights from its own
    router. Policy projection scales weights, so ids do not tell what it did."""
    name, ids_BL, found, routed_DBK, _ = served

    def replay(layer: int, weights_DBK: torch.Tensor, _ids: torch.Tensor, _scores: torch.Tensor | None):
        return weights_DBK, routed_DBK[layer]

    error = largest_error(model, replay, ids_BL, found)
    assert error < TOLERANCE if name.endswith("sere") else error > 10 * TOLERANCE


def test_a_request_turns_to_what_others_run_that_keep_their_experts(served):
    """A twin runs the experts that the request chose itself, but one that opted out does not count. The paper's policy
    has no eye for what others run."""
    for kind, layers in served.beside_twin.items():
        rerouted = [counted for layer, counted in layers.items() if S_OF_LAYERS[int(layer)] < 8]
        assert all(counted["rows"] == NEW - 1 and not counted["dropped_slots"] for counted in rerouted)
        stays = kind == "keep" and served.policy.endswith("projection")
        assert all((counted["rerouted_slots"] == 0) == stays for counted in rerouted)

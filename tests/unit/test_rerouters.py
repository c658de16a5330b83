"""The field's policies against loops over the tokens of a step that say what they are."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from sere_dist.evaluation.lockstep import Rerouter, Routed, decode_logits
from sere_dist.evaluation.rerouters import of_each_rank, of_layers
from sere_dist.evaluation.rivals import (
    oea_rerouter,
    reap_rerouter,
    top_k_rerouter,
    xshare_rerouter,
)
from sere_dist.moe import hooked_routing, router_scores
from tests.support.families import FAMILIES

STEPS, BATCH, TOP_K, EXPERTS = 20, 5, 4, 12


@pytest.fixture(params=[0, 1, 2])
def routing(request) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and ids [D, B, K], the slots in any order, and scores [D, B, E], many of them equal.

    Weights are a multiple of the scores, another for every token.
    """
    torch.manual_seed(request.param)
    scores = (1 + torch.randint(9, (STEPS, BATCH, EXPERTS))).float()
    ids = scores.topk(TOP_K, dim=2).indices[:, :, torch.randperm(TOP_K)]
    return scores.gather(2, ids) * (0.5 + torch.rand(STEPS, BATCH, 1)), ids, scores


def heaviest(weights: list[float], count: int) -> list[int]:
    """Returns a token's slots by weight, the lower slot first where weights are equal."""
    return sorted(range(len(weights)), key=lambda slot: (-weights[slot], slot))[:count]


def loop(step, routing) -> dict[tuple[int, int], dict[int, float]]:
    """Returns what `step` lets each token run as {(step, token): {expert: weight}}.

    `step` gets lists of weights, ids and scores of all tokens of a step and returns the experts of each. A token's
    weights keep their sum and are in proportion to the scores.
    """
    expected = {}
    for d, tokens in enumerate(zip(*(tensor.tolist() for tensor in routing), strict=True)):
        for b, experts in enumerate(step(*tokens)):
            weights, _, scores = (of_tokens[b] for of_tokens in tokens)
            total = sum(scores[expert] for expert in experts)
            expected[d, b] = {expert: scores[expert] / total * sum(weights) for expert in experts}
    return expected


def by_token(routed: Routed) -> dict[tuple[int, int], dict[int, float]]:
    weights_DBK, ids_DBK = routed
    found = {}
    for d, b in [(d, b) for d in range(STEPS) for b in range(BATCH)]:
        slots = list(zip(ids_DBK[d, b].tolist(), weights_DBK[d, b].tolist(), strict=True))
        assert all(weight == 0 for expert, weight in slots if expert == -1)
        kept = [(expert, weight) for expert, weight in slots if expert != -1]
        found[d, b] = dict(kept)
        assert len(found[d, b]) == len(kept), "an expert twice"
    return found


def check(rerouter: Rerouter, step, routing) -> None:
    weights, ids, scores = routing
    found, expected = by_token(rerouter(0, weights, ids, scores)), loop(step, routing)
    assert found.keys() == expected.keys()
    for token, experts in expected.items():
        assert found[token] == pytest.approx(experts)


@pytest.mark.parametrize("keep", [1, 3, TOP_K])
def test_top_k(routing, keep):
    def step(weights, ids, _scores):
        return [[ids[b][slot] for slot in heaviest(weights[b], keep)] for b in range(BATCH)]

    check(top_k_rerouter(keep, renormalise=True), step, routing)
    weights, ids, _ = routing
    new_weights, new_ids = top_k_rerouter(keep)(0, weights, ids, None)
    assert ((new_ids >= 0).sum(dim=2) == keep).all()
    assert new_weights[new_ids >= 0].equal(weights[new_ids >= 0])
    assert new_ids[new_ids >= 0].equal(ids[new_ids >= 0])


@pytest.mark.parametrize("keep", [1, 2, TOP_K])
def test_oea(routing, keep):
    def step(weights, ids, scores):
        kept = [[ids[b][slot] for slot in heaviest(weights[b], keep)] for b in range(BATCH)]
        loaded = {expert for experts in kept for expert in experts}
        for b, experts in enumerate(kept):
            by_score = sorted(loaded - set(experts), key=lambda expert: (-scores[b][expert], expert))
            experts += by_score[: TOP_K - keep]
        return kept

    check(oea_rerouter(keep), step, routing)


def test_oea_of_one_token_is_top_k(routing):
    weights, ids, scores = (tensor[:, :1] for tensor in routing)
    ours, theirs = oea_rerouter(2)(0, weights, ids, scores), top_k_rerouter(2, renormalise=True)(0, weights, ids, None)
    for slots in (ours, theirs):
        assert (slots[1] >= 0).sum() == 2 * STEPS
    assert ours[1].sort(dim=2).values.equal(theirs[1].sort(dim=2).values)
    assert torch.allclose(ours[0].sort(dim=2).values, theirs[0].sort(dim=2).values)


@pytest.mark.parametrize("warm_up", [0, 1, 2])
@pytest.mark.parametrize("budget", [2, 6, EXPERTS])
def test_xshare(routing, budget, warm_up):
    def step(weights, ids, scores):
        runs = {ids[b][slot] for b in range(BATCH) for slot in heaviest(weights[b], warm_up)}
        demand = [sum(scores[b][expert] for b in range(BATCH)) for expert in range(EXPERTS)]
        others = sorted(set(range(EXPERTS)) - runs, key=lambda expert: (-demand[expert], expert))
        runs |= set(others[: max(0, budget - len(runs))])
        return [sorted(runs, key=lambda expert: (-scores[b][expert], expert))[:TOP_K] for b in range(BATCH)]

    check(xshare_rerouter(budget, warm_up=warm_up), step, routing)


def test_a_budget_of_all_experts_changes_nothing(routing):
    weights, ids, scores = routing
    new_weights, _ = xshare_rerouter(EXPERTS)(0, weights, ids, scores)
    assert torch.allclose(new_weights.sort(dim=2).values, weights.sort(dim=2).values)


@pytest.mark.parametrize("kept", [1, 2, 6, EXPERTS])
def test_reap(routing, kept):
    saliency = torch.randint(4, (EXPERTS,))
    runs = sorted(range(EXPERTS), key=lambda expert: (-saliency[expert], expert))[:kept]

    def step(_weights, _ids, scores):
        return [sorted(runs, key=lambda expert: (-scores[b][expert], expert))[:TOP_K] for b in range(BATCH)]

    check(reap_rerouter({0: saliency}, kept), step, routing)


def test_each_rank_by_itself(routing):
    weights, ids, scores = routing
    new_weights, new_ids = of_each_rank(oea_rerouter(1), 2)(0, weights, ids, scores)
    for rank in range(2):
        rows = slice(rank, None, 2)
        alone = oea_rerouter(1)(0, weights[:, rows], ids[:, rows], scores[:, rows])
        assert new_weights[:, rows].equal(alone[0])
        assert new_ids[:, rows].equal(alone[1])


@pytest.mark.parametrize("rerouter_of", [partial(oea_rerouter, 2), partial(xshare_rerouter, 5, warm_up=1)])
def test_without_renormalising_chosen_experts_keep_their_weights(routing, rerouter_of):
    renormalised, own = rerouter_of()(0, *routing), rerouter_of(renormalise=False)(0, *routing)
    assert own[1].equal(renormalised[1])
    router, new = by_token(routing[:2]), by_token(own)
    kept = [(token, expert) for token, experts in new.items() for expert in experts if expert in router[token]]
    assert 0 < len(kept) < sum(map(len, new.values()))
    assert [new[token][expert] for token, expert in kept] == pytest.approx([router[t][e] for t, e in kept])


def test_layers_with_policies_of_their_own(routing):
    rerouter = of_layers({1: top_k_rerouter(1), 2: top_k_rerouter(2)})
    for layer, kept in ((0, TOP_K), (1, 1), (2, 2)):
        assert ((rerouter(layer, *routing)[1] >= 0).sum(dim=2) == kept).all()


@pytest.mark.parametrize("rerouter", [oea_rerouter(1), xshare_rerouter(3), reap_rerouter({3: torch.ones(12)}, 6)])
def test_a_router_that_cant_be_read(routing, rerouter):
    weights, ids, _ = routing
    with pytest.raises(ValueError, match="that of layer 3 can't be read"):
        rerouter(3, weights, ids, None)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_scores_of_every_family(family):
    torch.manual_seed(0)
    config, layers = FAMILIES[family]
    model, seen = AutoModelForCausalLM.from_config(config).eval(), {}
    for tensor in model.state_dict().values():
        tensor.normal_(std=0.3)

    def look(layer, routing, scores):
        _, ids, weights = routing
        seen[layer] = float((weights / scores.gather(1, ids)).std(dim=1).max())
        assert scores.shape == (len(ids), 8)

    with hooked_routing(model, look):
        model(torch.randint(256, (2, 20)))
    assert tuple(seen) == layers
    assert max(seen.values()) < 1e-4


def test_scores_are_softmax_or_sigmoid_or_unknown():
    logits = torch.randn(7, 5)
    chosen = logits.topk(2, dim=1)
    assert router_scores(logits, chosen.indices, 3 * chosen.values.exp()).equal(logits.softmax(dim=1))
    assert router_scores(logits, chosen.indices, chosen.values.sigmoid()).equal(logits.sigmoid())
    assert router_scores(logits, chosen.indices, torch.rand(7, 2)) is None


def test_a_model_whose_router_has_another_name(model, heldout_ids, monkeypatch):
    monkeypatch.setattr("sere_dist.moe.ROUTER_NAMES", ("elsewhere",))
    ids = heldout_ids[:2, :20]
    assert decode_logits(model, ids, prompt_length=10, rerouter=top_k_rerouter(2)).shape[:2] == (2, 9)
    with pytest.raises(ValueError, match="that of layer 0 can't be read"):
        decode_logits(model, ids, prompt_length=10, rerouter=oea_rerouter(2))

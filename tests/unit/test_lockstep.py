import math
from functools import partial

import pytest
import torch
from transformers import DynamicCache

from sere_dist.artifact.folder import Artifact
from sere_dist.evaluation.lockstep import Rerouter, active_by_step, decode_logits, lockstep, unchanged
from sere_dist.evaluation.rerouters import paper_rerouter, projection_rerouter
from sere_dist.evaluation.rivals import dropping_rerouter, oea_rerouter, top_k_rerouter, xshare_rerouter
from sere_dist.evaluation.traffic import Layout
from sere_dist.method.placement import linear_ranks
from sere_dist.method.projection import reroute_projection
from sere_dist.method.records import ExpertPlaces, LayerTables, Settings, Step
from sere_dist.method.rerouting import active_experts, reroute
from sere_dist.method.similarity import random_similarity
from sere_dist.moe import hooked_routing

PROMPT, EXPERTS, LAYERS = 40, 64, range(6)
LAYOUT = Layout(8, dict.fromkeys(LAYERS, linear_ranks(EXPERTS, 8)))


@pytest.fixture
def texts(heldout_ids) -> torch.Tensor:
    """Token ids [8, 60]."""
    return heldout_ids[:8, :60]


@pytest.fixture(scope="module")
def tables() -> dict[int, LayerTables]:
    """Random ones: what they say does not matter here."""
    torch.manual_seed(0)
    similarity = {layer: random_similarity(EXPERTS, seed=layer) for layer in LAYERS}
    return {
        layer: LayerTables(matrix, matrix.sqrt(), 0.5 + torch.rand(EXPERTS)) for layer, matrix in similarity.items()
    }


@torch.inference_mode()
def stepwise_loss(model, ids_BL: torch.Tensor, rerouter: Rerouter) -> tuple[float, float]:
    """Returns loss and active experts of decoding for real: a prefill, then a token of each sequence a step."""
    cache, loss, active, rerouting = DynamicCache(config=model.config), 0.0, [], False

    def route(layer, routing, scores_BE):
        hidden_states, ids_BK, weights_BK = routing
        if not rerouting:
            return None
        new_weights_1BK, new_ids_1BK = rerouter(layer, weights_BK[None], ids_BK[None], scores_BE[None])
        active.append(len(set(new_ids_1BK.flatten().tolist()) - {-1}))
        # A dropped slot, of weight 0, may name any expert here.
        return hidden_states, new_ids_1BK[0].clamp(min=0), new_weights_1BK[0]

    with hooked_routing(model, route):
        model(ids_BL[:, :PROMPT], past_key_values=cache)
        rerouting = True
        for step in range(PROMPT, ids_BL.shape[1] - 1):
            logits = model(ids_BL[:, step : step + 1], past_key_values=cache).logits[:, 0]
            loss += float(torch.nn.functional.cross_entropy(logits, ids_BL[:, step + 1], reduction="sum"))
    return loss, sum(active) / len(active)


REROUTERS = {
    "off": lambda _tables: unchanged,
    "paper, S = 1": lambda tables: paper_rerouter(tables, Settings(1)),
    "paper, S = 2": lambda tables: paper_rerouter(tables, Settings(2)),
    "dropping": lambda _tables: dropping_rerouter(EXPERTS, 2),
    "top-k": lambda _tables: top_k_rerouter(2, renormalise=True),
    "OEA": lambda _tables: oea_rerouter(2),
    "XShare": lambda _tables: xshare_rerouter(12, warm_up=1),
    "projection": lambda tables: projection_rerouter(tables, Settings(2, traffic_price=0.01), LAYOUT),
}


@pytest.mark.parametrize("name", REROUTERS)
def test_equals_stepwise_decoding(model, texts, tables, name):
    rerouter = REROUTERS[name](tables)
    result = lockstep(model, texts, prompt_length=PROMPT, rerouter=rerouter)
    loss, active = stepwise_loss(model, texts, rerouter)
    assert result.tokens == 8 * (60 - PROMPT - 1)
    assert math.isclose(math.fsum(result.losses), loss, rel_tol=1e-4)
    # A near tie between two experts may fall either way; it moves the mean by far less than this.
    assert math.isclose(result.active_experts, active, rel_tol=2e-3)


def test_divergence(model, texts, tables):
    run = partial(lockstep, model, texts, prompt_length=PROMPT)
    reference = decode_logits(model, texts, prompt_length=PROMPT)
    off = run(reference_BDV=reference)
    kept_all = run(reference_BDV=reference, rerouter=paper_rerouter(tables, Settings(8)))
    on = run(reference_BDV=reference, rerouter=paper_rerouter(tables, Settings(2)))
    assert off == kept_all
    assert off.divergences == (0.0,) * 8
    assert off.agreement == 1
    assert run().divergences == run().agreements == ()
    assert min(on.divergences) > 0
    assert on.active_experts < 0.7 * off.active_experts

    p_BDV = reference.softmax(dim=2)
    logits = decode_logits(model, texts, prompt_length=PROMPT, rerouter=paper_rerouter(tables, Settings(2)))
    by_hand = (p_BDV * (p_BDV.log() - logits.softmax(dim=2).log())).sum(dim=(1, 2))
    assert torch.allclose(torch.tensor(on.divergences), by_hand, rtol=1e-3)
    same_BD = logits.argmax(dim=2) == p_BDV.argmax(dim=2)
    assert on.agreement_of_texts == same_BD.double().mean(dim=1).tolist()
    assert on.agreement == pytest.approx(float(same_BD.double().mean()))
    assert 0.5 < on.agreement < 1


def test_where_quality_collapses_and_what_brings_it_back(model, texts, artifact_path):
    """With few experts kept, or few rows to share them: a larger S, a threshold, or leaving small steps alone."""
    tables = Artifact.load(artifact_path).tables

    def divergence(batch: int, select_top_k: int, threshold: float = 0.0) -> float:
        rerouter = paper_rerouter(tables, Settings(select_top_k, threshold))
        references = [decode_logits(model, ids, prompt_length=PROMPT) for ids in texts.split(batch)]
        results = [
            lockstep(model, ids, prompt_length=PROMPT, rerouter=rerouter, reference_BDV=reference)
            for ids, reference in zip(texts.split(batch), references, strict=True)
        ]
        return sum(results[1:], results[0]).divergence

    collapsed, alone = divergence(8, 1), divergence(1, 2)
    assert collapsed > 3 * divergence(8, 2) > 3 * divergence(8, 4)
    assert alone > 1.5 * divergence(8, 2)
    assert divergence(8, 1, threshold=0.5) < 0.5 * collapsed


def test_results_of_batches_add_up(model, texts):
    parts = [lockstep(model, part, prompt_length=PROMPT) for part in texts.split(4)]
    both, whole = sum(parts[1:], parts[0]), lockstep(model, texts, prompt_length=PROMPT)
    assert both.tokens == whole.tokens
    assert both.losses == pytest.approx(whole.losses, rel=1e-4)
    assert both.perplexity == pytest.approx(whole.perplexity, rel=1e-4)
    assert both.active_experts < whole.active_experts  # a smaller batch, a smaller union


@pytest.fixture
def steps():
    torch.manual_seed(0)
    weights, ids = torch.rand(5, 6, EXPERTS).topk(8, dim=2)
    return weights.flip(2), ids.flip(2)


def test_rerouters_do_to_each_step_what_the_functions_do(steps, tables):
    _, moved = paper_rerouter(tables, Settings(2, threshold=0.9))(3, *steps, None)
    new_weights, new_ids = projection_rerouter(tables, Settings(2, traffic_price=0.1), LAYOUT)(3, *steps, None)
    places = ExpertPlaces(domain_E=LAYOUT.rank[3])
    for step, (weights, ids) in enumerate(zip(*steps, strict=True)):
        assert moved[step].equal(reroute(weights, ids, tables[3].similarity_EE, select_top_k=2, threshold=0.9))
        routed = Step(weights, ids, home_T=torch.arange(6))
        expected = reroute_projection(routed, tables[3], Settings(2, traffic_price=0.1), places)
        assert new_weights[step].equal(expected[0])
        assert new_ids[step].equal(expected[1])


@pytest.mark.parametrize("renormalise", [False, True])
def test_dropping(steps, renormalise):
    weights, ids = steps
    new_weights, new_ids = dropping_rerouter(EXPERTS, 2, renormalise=renormalise)(0, weights, ids, None)
    for step in range(len(ids)):
        primary = set(ids[step].gather(1, weights[step].topk(2).indices).flatten().tolist())
        expected = torch.tensor([[expert if expert in primary else -1 for expert in row] for row in ids[step].tolist()])
        assert new_ids[step].equal(expected)
    assert (new_weights[new_ids < 0] == 0).all()
    if renormalise:
        assert torch.allclose(new_weights.sum(dim=2), weights.sum(dim=2))
    else:
        assert new_weights[new_ids >= 0].equal(weights[new_ids >= 0])


def test_active_by_step(steps):
    ids = steps[1].clone()
    ids[:, 0] = -1
    expected = [active_experts(step, torch.ones_like(step, dtype=torch.bool), EXPERTS) for step in ids]
    assert active_by_step(ids, EXPERTS).equal(torch.stack(expected))


def test_a_prompt_that_leaves_no_step(model, texts):
    with pytest.raises(ValueError, match="must leave a decode step"):
        lockstep(model, texts, prompt_length=59)

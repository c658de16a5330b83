"""What the study of groups computes beside the simulator."""

import pytest
import torch

from sere_dist.evaluation.traffic import Layout
from sere_dist.method.fixed_point import FIXED_POINT_ONE
from sere_dist.method.placement import linear_ranks
from sere_dist.method.projection import (
    estimated_error,
    losses_without_each_expert,
    primary_by_price,
    reroute_projection,
    worth_running,
)
from sere_dist.method.records import ExpertPlaces, LayerTables, Settings, Step
from studies import simulation as study
from studies.large_models import MODELS

LAYOUT = Layout(4, {0: linear_ranks(16, 4)})


def drawn(steps=3, rows=6, top_k=4):
    random = torch.Generator().manual_seed(0)
    weights = torch.rand(steps, rows, top_k, generator=random)
    ids = torch.rand(steps, rows, 16, generator=random).topk(top_k, dim=2).indices
    size = torch.rand(16, generator=random)
    tables = LayerTables(torch.rand(16, 16, generator=random), torch.rand(16, 16, generator=random), size)
    return {0: tables}, weights, ids


@pytest.mark.parametrize("policy", study.OURS)
def test_what_is_simulated_is_the_methods(policy):
    """At every price of the grid the study does to a step what `reroute_projection` does, and runs its experts."""
    tables, weights, ids = drawn(rows=3)
    prices = study.price_grid({0: (weights, ids)}, tables, LAYOUT, policy, (0.2, 0.5, 1.0))
    assert len(prices) == 3
    for price in prices:
        found = study.Priced(tables, LAYOUT, policy, price)(0, weights, ids)
        by = "expert_price" if policy.startswith("expert price") else "balance_price"
        settings, places = Settings(int(policy[-1]), **{by: price}), ExpertPlaces(LAYOUT.rank[0], 4)
        for step, of_step in zip(map(Step, weights, ids), zip(*found, strict=True), strict=True):
            known = reroute_projection(step, tables[0], settings, places)
            assert all(map(torch.equal, of_step, known))
            primary_E = primary_by_price(step, tables[0], settings, places)
            assert set(known[1].flatten().tolist()) - {-1} <= set(primary_E.nonzero().flatten().tolist())


@pytest.mark.parametrize("policy", study.OURS)
def test_a_higher_price_of_the_grid_runs_fewer_experts(policy):
    tables, weights, ids = drawn(rows=3)
    routing = {0: (weights, ids)}
    prices = study.price_grid(routing, tables, LAYOUT, policy, (0.1, 0.5, 1.0))
    rerouted = [study.Priced(tables, LAYOUT, policy, price)(0, weights, ids) for price in prices]
    active = [study.spread_of({0: after[1]}, LAYOUT)["active_experts"] for after in (routing[0], *rerouted)]
    assert active == sorted(active, reverse=True) and active[0] > active[2] > active[3]


def test_without_safe_slots_only_what_is_worth_its_place_runs():
    tables, weights, ids = drawn()
    _, found = study.Priced(tables, LAYOUT, study.BALANCED_ALL, 1.0)(0, weights, ids)
    for weights_BK, ids_BK, found_BK in zip(weights, ids, found, strict=True):
        losses_E = losses_without_each_expert(Step(weights_BK, ids_BK), tables[0].size_E)
        places = ExpertPlaces(LAYOUT.rank[0], 4)
        primary_E = worth_running(losses_E, tables[0], Settings(1, balance_price=1.0), places)
        assert set(found_BK.flatten().tolist()) - {-1} <= set(primary_E.nonzero().flatten().tolist())
        assert primary_E.any() and not primary_E.all()


def test_without_safe_slots_one_expert_runs_at_any_price():
    tables, weights, ids = drawn()
    _, found = study.Priced(tables, LAYOUT, study.PRICED_ALL, 100.0)(0, weights, ids)
    assert all(len(set(found_BK.flatten().tolist()) - {-1}) == 1 for found_BK in found)


def test_the_error_is_the_methods_estimate_and_the_papers_policy_has_one():
    tables, weights, ids = drawn()
    after = study.Priced(tables, LAYOUT, study.PRICED, 0.2)(0, weights, ids)
    step = Step(weights.flatten(0, 1), ids.flatten(0, 1))
    known = float(estimated_error(step, after[1].flatten(0, 1), tables[0])) / FIXED_POINT_ONE
    assert study.estimated_error((weights, ids), after, tables[0]) == pytest.approx(known / 18, rel=1e-4)
    # One slot goes from expert 0 to 1 with its weight: w² (n_0 (1 - s) + n_1 (c - 1)²).
    one = torch.tensor([[[0.5]]])
    moved = study.estimated_error((one, torch.tensor([[[0]]])), (one, torch.tensor([[[1]]])), tables[0])
    size, similarity, coefficient = tables[0].size_E, tables[0].similarity_EE[0, 1], tables[0].coefficient_EE[0, 1]
    assert moved == pytest.approx(float(0.25 * (size[0] * (1 - similarity) + size[1] * (coefficient - 1) ** 2)))


def test_steps_at_an_error():
    def row(error, ms):
        parts = dict.fromkeys(study.PARTS, ms / len(study.PARTS))
        return {"kl": error, "ms": {"here": {"seconds": ms} | parts}}

    rows = [row(0.0, 12.0), row(0.01, 8.0), row(0.04, 6.0)]
    assert study.at_error(rows, "here", 0.02, "kl")["seconds"] == pytest.approx(7.0)  # half way between the logarithms
    assert study.at_error(rows, "here", 1.0, "kl")["seconds"] == 6.0
    assert study.at_error(rows[1:], "here", 0.001, "kl") is None
    share, least, most = study.saving(rows[0]["ms"]["here"], rows[2]["ms"]["here"])
    assert (share, least, most) == (0.5, 0.5, 0.5)  # all parts are halved alike


def test_large_shapes_have_the_published_numbers_of_parameters():
    totals = {"Qwen3-235B-A22B": 235e9, "DeepSeek-V3": 671e9, "Kimi-K2": 1.04e12, "Kimi-K3": 2.78e12}
    for name, model in MODELS.items():
        others = model.others * (8 if name == "Kimi-K3" else 1)
        assert model.experts * model.expert * model.moe_layers + others == pytest.approx(totals[name], rel=0.02)

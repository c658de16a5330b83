"""Choices of what runs beside all sets of experts, and ways to settle a slot beside the policy and a loop."""

import json
from functools import partial
from itertools import product

import pytest
import torch

from sere_dist.evaluation.rerouters import primary_by_step, projection_rerouter
from sere_dist.method.fixed_point import FIXED_POINT_ONE
from sere_dist.method.projection import losses_without_each_expert
from sere_dist.method.records import LayerTables, Settings, Step
from studies import selection as study
from studies.selection import (
    ALWAYS,
    Fill,
    errors_left,
    exact,
    greedy,
    in_order,
    losses,
    one_at_a_time,
    selecting_rerouter,
    threshold,
)

STEPS, BATCH, TOP_K, EXPERTS = 30, 3, 3, 6
PRICE = 0.1


@pytest.fixture(params=[0, 1, 2])
def of_layer(request) -> LayerTables:
    torch.manual_seed(request.param)
    similarity, coefficient = torch.rand(2, EXPERTS, EXPERTS) * torch.rand(EXPERTS, EXPERTS)
    return LayerTables(similarity.fill_diagonal_(1), coefficient.fill_diagonal_(1), 0.5 + torch.rand(EXPERTS))


@pytest.fixture
def routing(of_layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and ids [D, B, K], the slots in any order, and scores [D, B, E]."""
    scores = torch.randn(STEPS, BATCH, EXPERTS).softmax(dim=2)
    ids = scores.topk(TOP_K, dim=2).indices[:, :, torch.randperm(TOP_K)]
    weights = scores.gather(2, ids)
    return weights / weights.sum(dim=2, keepdim=True), ids, scores


def objective(step, runs_E: torch.Tensor, price: float = PRICE) -> float:
    losses_E, _, similarity_EE = step
    return float(errors_left(losses_E[None], runs_E[None], similarity_EE)) + price * int(runs_E.sum())


@pytest.fixture
def steps(routing, of_layer) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Losses, the experts that must run, and similarities of each step."""
    weights, ids, _ = routing
    losses_DE, must_DE = losses(weights, ids, of_layer.size_E), primary_by_step(weights, ids, 1, EXPERTS)
    return [(losses_DE[d], must_DE[d], of_layer.similarity_EE) for d in range(STEPS)]


def test_losses_are_those_of_the_policy(routing, of_layer):
    weights, ids, _ = routing
    for losses_E, *step in zip(losses(weights, ids, of_layer.size_E), weights, ids, strict=True):
        theirs = losses_without_each_expert(Step(*step), of_layer.size_E) / FIXED_POINT_ONE
        assert losses_E.tolist() == pytest.approx(theirs.tolist(), abs=1e-6)


def test_error_is_that_of_the_best_that_runs(steps):
    for losses_E, must_E, similarity_EE in steps:
        best = [max(float(similarity_EE[e, p]) for p in range(EXPERTS) if must_E[p]) for e in range(EXPERTS)]
        expected = sum(float(loss) * (1 - share) for loss, share in zip(losses_E, best, strict=True))
        assert float(errors_left(losses_E[None], must_E[None], similarity_EE)) == pytest.approx(expected)
    assert errors_left(losses_E[None], torch.zeros(1, EXPERTS, dtype=torch.bool), similarity_EE) == losses_E.sum()


@pytest.mark.parametrize("free", [False, True])
def test_exact_is_the_best_of_all_sets(steps, free):
    sets = torch.tensor(list(product([False, True], repeat=EXPERTS)))
    for step in steps:
        step = (step[0], step[1] & (not free), step[2])
        allowed = [runs_E for runs_E in sets if (runs_E | ~step[1]).all()]
        assert objective(step, exact(*step, price=PRICE)) == pytest.approx(min(objective(step, s) for s in allowed))
        count = max(2, int(step[1].sum()))
        found = exact(*step, count=count)
        assert int(found.sum()) == count and (found | ~step[1]).all()
        best = min(objective(step, s) for s in allowed if int(s.sum()) == count)
        assert objective(step, found) == pytest.approx(best)


def test_greedy_lies_between_threshold_and_exact(steps):
    """Together over all steps: in a single one the threshold may be lucky. So may the policy."""
    sums = dict.fromkeys(("threshold", "in order", "greedy", "exact"), 0.0)
    for step in steps:
        one = step[0][None], step[1][None], step[2]
        found = {"threshold": threshold(*one, price=PRICE)[0], "greedy": greedy(*one, price=PRICE)[0]}
        found |= {"in order": in_order(*one, price=PRICE)[0], "exact": exact(*step, price=PRICE)}
        of_step = {name: objective(step, runs_E) for name, runs_E in found.items()}
        assert of_step["exact"] <= min(of_step["threshold"], of_step["greedy"]) + 1e-9
        assert all((runs_E | ~step[1]).all() for runs_E in found.values())
        for name, value in of_step.items():
            sums[name] += value
    assert sums["exact"] <= sums["greedy"] + 1e-9 < sums["threshold"]
    assert sums["exact"] <= sums["in order"] + 1e-9 < sums["threshold"]


def test_greedy_may_be_worse_than_the_threshold():
    """An expert that half stands in for two others is taken first, and then neither of them is worth the price."""
    similarity_EE = torch.eye(3)
    similarity_EE[0, 2] = similarity_EE[1, 2] = 0.55
    step = torch.tensor([1.0, 1.0, 0.2]).double(), torch.zeros(3, dtype=torch.bool), similarity_EE
    one = step[0][None], step[1][None], step[2]
    taken, own = greedy(*one, price=0.5)[0], threshold(*one, price=0.5)[0]
    assert (taken.tolist(), own.tolist()) == ([False, False, True], [True, True, False])
    assert objective(step, taken, 0.5) == pytest.approx(1.4)
    assert objective(step, own, 0.5) == objective(step, exact(*step, price=0.5), 0.5) == pytest.approx(1.2)


def test_one_at_a_time(steps):
    """Beside a loop; without similarities it is the threshold."""
    for losses_E, must_E, similarity_EE in steps:
        runs = {p for p in range(EXPERTS) if must_E[p]}
        while len(runs) < EXPERTS:
            left = {
                e: float(losses_E[e]) * (1 - max(float(similarity_EE[e, p]) for p in runs))
                for e in set(range(EXPERTS)) - runs
            }
            if max(left.values()) < PRICE / 2:
                break
            runs.add(max(left, key=lambda e, left=left: left[e]))
        one = losses_E[None], must_E[None]
        assert set(one_at_a_time(*one, similarity_EE, price=PRICE / 2)[0].nonzero().flatten().tolist()) == runs
        unlike = one[0], one[1], torch.eye(EXPERTS)
        assert one_at_a_time(*unlike, price=PRICE).equal(threshold(*unlike, price=PRICE))


def test_greedy_by_steps_and_counts(steps):
    """Steps side by side are what each is alone, and as many experts run as each step is asked for."""
    side_by_side = (torch.stack([step[i] for step in steps]) for i in (0, 1))
    losses_DE, must_DE = side_by_side
    together = greedy(losses_DE, must_DE, steps[0][2], price=PRICE)
    count_D = torch.arange(STEPS) % EXPERTS
    counted = greedy(losses_DE, must_DE, steps[0][2], count_D=count_D)
    for d, (losses_E, must_E, similarity_EE) in enumerate(steps):
        assert together[d].equal(greedy(losses_E[None], must_E[None], similarity_EE, price=PRICE)[0])
        assert int(counted[d].sum()) == max(int(must_E.sum()), int(count_D[d]))


def weight_by_expert(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns [D, B, E]: what each token gives each expert, whatever slots it does it with."""
    dropped = torch.zeros(*ids.shape[:2], EXPERTS + 1)
    return dropped.scatter_add(2, torch.where(ids < 0, EXPERTS, ids), weights)[:, :, :EXPERTS]


def test_in_order_without_fills_is_the_policy(routing, of_layer):
    for price in (0.02, PRICE, 0.5):
        theirs = projection_rerouter({0: of_layer}, Settings(1, expert_price=price))(0, *routing)
        for fill in (None, Fill(0.0)):
            rerouter = selecting_rerouter({0: of_layer}, partial(in_order, price=price), fill=fill)
            assert torch.allclose(weight_by_expert(*rerouter(0, *routing)), weight_by_expert(*theirs))


@pytest.mark.parametrize("fill", [Fill(0.4), Fill(1.0, scale=0.5), Fill(ALWAYS), Fill(ALWAYS, renormalise=True)])
def test_fills(routing, of_layer, fill):
    """Beside a loop over the slots of every token."""
    price, (weights, ids, scores) = 0.3, routing
    runs_DE = threshold(
        losses(weights, ids, of_layer.size_E), primary_by_step(weights, ids, 1, EXPERTS), None, price=price
    )
    expected, filled = torch.zeros(STEPS, BATCH, EXPERTS), 0
    for d, b in product(range(STEPS), range(BATCH)):
        runs, own = [p for p in range(EXPERTS) if runs_DE[d, p]], scores[d, b].tolist()
        beyond, any_filled = [p for p in runs if p not in ids[d, b]], False
        for weight, e in sorted(zip(weights[d, b].tolist(), ids[d, b].tolist(), strict=True), reverse=True):
            best = max(runs, key=lambda p, e=e: float(of_layer.similarity_EE[e, p]))
            following = max(beyond, key=lambda p: own[p], default=None)
            if e in runs:
                expected[d, b, e] += weight
            elif following is not None and fill.trust * own[following] / own[e] > of_layer.similarity_EE[e, best]:
                expected[d, b, following] += fill.scale * weight * own[following] / own[e]
                beyond.remove(following)
                filled, any_filled = filled + 1, True
            else:
                expected[d, b, best] += weight * of_layer.coefficient_EE[e, best]
        if fill.renormalise and any_filled:
            expected[d, b] *= weights[d, b].sum() / expected[d, b].sum()
    rerouter = selecting_rerouter({0: of_layer}, partial(threshold, price=price), fill=fill)
    assert torch.allclose(weight_by_expert(*rerouter(0, *routing)), expected, atol=1e-6)
    assert filled > 5


def test_a_free_choice_may_run_nothing(routing, of_layer):
    rerouter = selecting_rerouter({0: of_layer}, partial(greedy, price=100.0), keeps=0)
    weights, ids = rerouter(0, *routing)
    assert (ids == -1).all() and (weights == 0).all()


@pytest.mark.slow
def test_study(tmp_path, capsys, monkeypatch):
    small = {"BATCH": 2, "PRICES_OF_PARTS": (0.02,), "FILLS": (Fill(0.1), Fill(1.0)), "SHARES": (0.5,)}
    for name, value in small.items():
        monkeypatch.setattr(study, name, value)
    study.main(
        "tiny-moe", texts=2, samples=8, steps=3, batches=[2], prices=[0.01, 0.1], results=tmp_path / "found.json"
    )
    found = json.loads((tmp_path / "found.json").read_text())
    least = {row["choice"]: row["objective"] for row in found["choices"]}
    assert least["exact, free"] <= least["exact"] <= least["greedy"] * (1 + 1e-3)
    assert {row["policy"] for row in found["at_equal_experts"]} == {study.TODAY, study.FILLED, *study.CHOICES}
    assert [row["ratio"] for row in found["at_equal_experts"] if row["policy"] == study.TODAY] == [1]
    assert len(found["points"]) == 1 + 6 * 2
    assert "beside exact" in capsys.readouterr().out

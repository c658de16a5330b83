"""The balance price, against every set of experts that could run."""

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from sere_dist.method.balance import balanced_primary
from sere_dist.method.fixed_point import ALWAYS_PRIMARY, FIXED_POINT_ONE, to_fixed_point

NUM_RANKS = 3


def balanced(losses_E, rank_E, *, expert_price, balance_price):
    prices = {"expert_price": to_fixed_point(expert_price), "balance_price": to_fixed_point(balance_price)}
    return balanced_primary(losses_E, rank_E, **prices)


def objective(runs, losses, ranks, expert_price, balance_price):
    """What a set of experts costs, in fixed point. The first place is free, so it costs no less than none."""
    lost = sum(loss for loss, keeps in zip(losses, runs, strict=True) if not keeps)
    on_rank = [sum(keeps and of == rank for keeps, of in zip(runs, ranks, strict=True)) for rank in range(NUM_RANKS)]
    expert, place = (round(price * FIXED_POINT_ONE) for price in (expert_price, balance_price))
    return lost + expert * sum(runs) + place * max(1, *on_rank)


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 2.0, None]), st.integers(0, NUM_RANKS - 1)),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([0.0, 0.125, 0.25, 0.5]),
    st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.5, 1e9]),
)
def test_no_set_of_experts_costs_less(experts, expert_price, balance_price):
    losses = [ALWAYS_PRIMARY if loss is None else round(loss * FIXED_POINT_ONE) for loss, _ in experts]
    ranks = [rank for _, rank in experts]
    runs = balanced(
        torch.tensor(losses),
        torch.tensor(ranks),
        expert_price=expert_price,
        balance_price=balance_price,
    ).tolist()
    always = [loss == ALWAYS_PRIMARY for loss in losses]
    sets = product(*([True] if keeps else [False, True] for keeps in always))
    least = min(objective(each, losses, ranks, expert_price, balance_price) for each in sets)
    assert objective(runs, losses, ranks, expert_price, balance_price) == least
    assert all(keeps >= must for keeps, must in zip(runs, always, strict=True))
    assert not any(keeps for keeps, loss in zip(runs, losses, strict=True) if loss == 0)


def test_a_place_that_one_rank_needs_is_free_for_the_others():
    """Rank 0 has two experts that always run. Two places are there then, so rank 1 runs two, and its third waits."""
    small = round(0.01 * FIXED_POINT_ONE)
    losses_E = torch.tensor([ALWAYS_PRIMARY, small, ALWAYS_PRIMARY, small, small + 1, small])
    rank_E = torch.tensor([0, 0, 0, 1, 1, 1])
    runs_E = balanced(losses_E, rank_E, expert_price=0, balance_price=1.0)
    assert runs_E.tolist() == [True, False, True, True, True, False]  # of equal losses the lower id
    third_pays = balanced(losses_E, rank_E, expert_price=0, balance_price=0.015)
    assert third_pays.all()  # 2 x 0.01 for one place


def test_without_a_balance_price_the_experts_price_decides():
    losses_E = torch.randint(0, FIXED_POINT_ONE, (64,), generator=torch.Generator().manual_seed(0))
    rank_E = torch.arange(64) % NUM_RANKS
    runs_E = balanced(losses_E, rank_E, expert_price=0.3, balance_price=0)
    assert torch.equal(runs_E, losses_E >= to_fixed_point(0.3))
    assert torch.equal(balanced(losses_E, rank_E, expert_price=0, balance_price=0), losses_E > 0)


def test_steps_can_be_mapped():
    losses_DE = torch.randint(0, FIXED_POINT_ONE, (5, 16), generator=torch.Generator().manual_seed(0))
    rank_E = torch.arange(16) % NUM_RANKS
    mapped = torch.vmap(lambda losses_E: balanced(losses_E, rank_E, expert_price=0.1, balance_price=1.0))
    each = [balanced(losses_E, rank_E, expert_price=0.1, balance_price=1.0) for losses_E in losses_DE]
    assert torch.equal(mapped(losses_DE), torch.stack(each))

"""Synthetic routers have the statistics that they are fitted to."""

import pytest
import torch

from sere_dist.evaluation.synthetic import Statistics, SyntheticRouter, fit, statistics


def test_statistics_of_three_tokens():
    """Of 4 experts, 0 serves all tokens, 1 two and 2 one."""
    ids_NK = torch.tensor([[0, 1], [1, 0], [0, 2]])
    weights_NK = torch.tensor([[0.75, 0.25], [1.0, 1.0], [2.0, 2.0]])
    found = statistics(weights_NK, ids_NK, 4)
    uses = [1, 2 / 3, 1 / 3, 0]
    assert found.skew == pytest.approx(sum((share / 2) ** 2 for share in uses) * 4)
    # The pairs that go together are 0 and 1, and 0 and 2. If experts were chosen alone, so would 1 and 2.
    assert found.coactivation == pytest.approx((4 / 9 + 1 / 9) / (4 / 9 + 1 / 9 + 4 / 81))
    assert found.heaviest == pytest.approx((0.75 + 0.5 + 0.5) / 3)


def test_a_router_without_bias_and_topic_is_uniform():
    random = torch.Generator().manual_seed(0)
    weights_DBK, ids_DBK = SyntheticRouter(0.0, 0.0, 0.0).route(50, 40, 16, 4, random)
    assert ids_DBK.shape == (50, 40, 4)
    assert all(len(set(row)) == 4 for row in ids_DBK.flatten(0, 1).tolist())
    assert weights_DBK.unique().tolist() == [0.25]
    found = statistics(weights_DBK.flatten(0, 1), ids_DBK.flatten(0, 1), 16)
    assert found.skew == pytest.approx(1, abs=0.01)
    # Four of 16 without putting back: pairs are a little rarer than 1/4 of 1/4.
    assert found.coactivation == pytest.approx((3 / 15 / (4 / 16)) ** 2, rel=0.03)


def test_a_fit_finds_the_numbers_again():
    hidden = SyntheticRouter(0.6, 2.0, 0.8)
    weights, ids = hidden.route(1, 4096, 32, 4, torch.Generator().manual_seed(5))
    target = statistics(weights[0], ids[0], 32)
    weights, ids = fit(target, 32, 4).route(1, 4096, 32, 4, torch.Generator().manual_seed(7))
    assert statistics(weights[0], ids[0], 32) == pytest.approx(target, rel=0.1)
    assert isinstance(target, Statistics)


def test_grouped_routers_stay_in_half_of_the_groups():
    random = torch.Generator().manual_seed(0)
    weights_DBK, ids_DBK = SyntheticRouter(0.5, 1.0, 1.0).route(4, 30, 64, 8, random, groups=8)
    groups = [set((row // 8).tolist()) for row in ids_DBK.flatten(0, 1)]
    assert max(map(len, groups)) <= 4
    assert (weights_DBK.diff(dim=2) <= 0).all(), "slots by weight"
    assert weights_DBK.sum(dim=2).allclose(torch.ones(4, 30))

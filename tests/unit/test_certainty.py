"""How surely similarities are known, where the truth is: from made-up similarities of groups of texts."""

from collections.abc import Sequence

import pytest
import torch

from sere_dist.method.certainty import certainty_of
from sere_dist.method.similarity import OfGroups


def mean_of(similarity_GEE: torch.Tensor) -> OfGroups:
    """What any groups give, where the similarity is a mean over texts."""

    def of(chosen: Sequence[int]) -> torch.Tensor:
        return similarity_GEE[list(chosen)].mean(dim=0)

    return of


def steady() -> torch.Tensor:
    """[E, E] of six experts in three pairs, by which each has one substitute that is far ahead of the others."""
    pair_E = torch.arange(6) // 2
    return torch.where(pair_E[:, None] == pair_E, 0.9, 0.2).fill_diagonal_(1)


def test_the_standard_error_of_a_mean():
    torch.manual_seed(0)
    similarity_GEE = torch.rand(8, 12, 12).double()
    errors_EE = similarity_GEE.std(dim=0, correction=1) / 8**0.5
    nearest_E1 = similarity_GEE.mean(dim=0).fill_diagonal_(0).argmax(dim=1, keepdim=True)
    expected = errors_EE.gather(1, nearest_E1).median()
    assert certainty_of(mean_of(similarity_GEE), 8).similarity_error == pytest.approx(float(expected))


def test_substitutes_that_are_far_ahead_are_sure():
    torch.manual_seed(0)
    similarity_GEE = steady() + 0.05 * torch.randn(8, 6, 6)
    found = certainty_of(mean_of(similarity_GEE), 8)
    assert found.same_substitute == 1 and found.substitute_kept == pytest.approx(1)
    assert found.similarity_error == pytest.approx(0.05 / 8**0.5, rel=0.5)


def test_twins_that_change_with_the_texts_are_not():
    """Experts 2 and 3 replace expert 0 equally well. Each half of the texts takes one, and the rest the other."""
    ahead_G = torch.tensor([4, 1, -2, -3]) / 10
    similarity_GEE = steady().double().repeat(4, 1, 1)
    similarity_GEE[:, 0, 1] = 0.2
    similarity_GEE[:, 0, 2], similarity_GEE[:, 0, 3] = 0.9 + ahead_G, 0.9 - ahead_G
    found = certainty_of(mean_of(similarity_GEE), 4)
    assert found.same_substitute == pytest.approx(5 / 6)
    # Of expert 0, by half (a multiple m of ahead): the best is worth 0.9 + m, and what the other half chose 0.9 - m.
    ahead = torch.tensor([(4 + 1) / 2, (4 - 2) / 2, (4 - 3) / 2]) / 10
    mean = similarity_GEE.mean(dim=0)[~torch.eye(6, dtype=torch.bool)].mean()
    chosen, best = ((5 * 0.9 + 0.9 + sign * ahead.mean()) / 6 - mean for sign in (-1, 1))
    assert found.substitute_kept == pytest.approx(float(chosen / best))


def test_noise_alone_keeps_nothing():
    torch.manual_seed(0)
    found = certainty_of(mean_of(torch.randn(8, 64, 64)), 8)
    assert abs(found.substitute_kept) < 0.1 and found.same_substitute < 0.1


def test_experts_that_are_all_alike():
    found = certainty_of(mean_of(torch.ones(2, 5, 5)), 2)
    assert found == (0, 1, 1)


def test_one_group_says_nothing():
    assert certainty_of(mean_of(torch.ones(1, 5, 5)), 1) is None

import math

import pytest
import torch

from sere_dist.standard_errors import difference_with_error, ratio_with_error, with_error


def test_with_error():
    assert with_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))


def test_what_both_share_has_no_part_in_a_difference():
    ours = [1.0, 20.0, 300.0]
    assert difference_with_error(ours, [number - 0.5 for number in ours]) == (0.5, 0.0)
    with pytest.raises(ValueError):
        difference_with_error(ours, ours[:2])


def test_ratio_with_error():
    assert ratio_with_error([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == (0.5, 0.0)
    ratio, error = ratio_with_error([1.0, 3.0], [2.0, 2.0])
    assert ratio == 1
    assert error == pytest.approx(0.5)


def test_the_error_of_a_ratio_is_how_far_it_strays():
    torch.manual_seed(0)
    theirs = 1 + torch.rand(2000, 50)
    ours = theirs * (0.7 + 0.1 * torch.randn(2000, 50))
    found = [ratio_with_error(a, b) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    ratios, errors = torch.tensor(found).T
    assert ratios.mean() == pytest.approx(0.7, rel=0.01)
    assert errors.mean() == pytest.approx(float(ratios.std()), rel=0.1)

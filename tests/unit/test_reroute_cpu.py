"""Re-routing compiled for CPUs against the torch functions: every policy, price and place, merged and not."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from sere_dist.testing.random_steps import CHOICES, RandomStep, assert_equal, random_steps

steps = st.builds(
    RandomStep, seed=st.integers(0, 2**31), **{name: st.sampled_from(values) for name, values in CHOICES.items()}
)


@given(step=steps)
def test_equals_torch(step):
    before = [tensor.clone() for tensor in (step.weights_TK, step.ids_TK)]
    assert_equal(step.by_cpu(), step.by_torch(), step)
    assert all(map(torch.equal, before, (step.weights_TK, step.ids_TK))), "inputs were changed"


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_many_steps_equal_torch(count):
    for step in random_steps(count, seed=1):
        assert_equal(step.by_cpu(), step.by_torch(), step)

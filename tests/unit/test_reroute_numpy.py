"""The re-routing in numpy against the torch functions."""

import hypothesis.strategies as st
import torch
from hypothesis import given

from sere_dist.testing.random_steps import CHOICES, RandomStep, assert_equal

steps = st.builds(
    RandomStep,
    seed=st.integers(0, 2**31),
    **{name: st.sampled_from(values) for name, values in CHOICES.items()}
    | {"projection": st.just(False), "merges": st.just(False)}
    | {"domains": st.none(), "ranks": st.just(0), "elsewhere_share": st.none()},
)


@given(step=steps)
def test_equals_torch(step):
    before = [tensor.clone() for tensor in (step.weights_TK, step.ids_TK)]
    assert_equal(step.by_numpy(), step.by_torch(), step)
    assert all(map(torch.equal, before, (step.weights_TK, step.ids_TK))), "inputs were changed"

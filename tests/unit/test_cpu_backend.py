"""The custom op that re-routes on CPUs, against the functions of the method: every policy, merged and not."""

import hypothesis.strategies as st
import torch
from hypothesis import given

import sere_dist.vllm_plugin.cpu_backend  # noqa: F401  registers the op
from sere_dist.method.counters import COUNTERS
from sere_dist.testing.random_steps import CHOICES, RandomStep, assert_equal

steps = st.builds(
    RandomStep,
    seed=st.integers(0, 2**31),
    **{name: st.sampled_from(values) for name, values in CHOICES.items()}
    | {"elsewhere_share": st.none(), "weight_dtype": st.just(torch.float32)},
)


def by_op(step: RandomStep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns weights, ids and counts, as a router in an engine gets them."""
    valid_T = torch.ones(step.rows, dtype=torch.bool) if step.valid_T is None else step.valid_T
    most = torch.inf if step.max_rows is None else step.max_rows
    numbers = step.settings if step.enabled else step.settings._replace(select_top_k=0)
    counters = torch.zeros(len(COUNTERS) + step.ranks, dtype=torch.int64)
    weights_TK, ids_TK = torch.ops.sere_dist.reroute_any(
        step.weights_TK,
        step.ids_TK,
        step.similarity_EE,
        step.coefficient_EE if step.projection else None,
        step.size_E if step.projection else None,
        step.rank_E,
        step.domain_E,
        step.home_T,
        torch.tensor([*numbers, step.min_rows, most], dtype=torch.float64),
        valid_T,
        torch.tensor([step.rows, int(valid_T[: step.rows].sum())]),
        counters,
        False,
        step.merges,
    )
    return weights_TK, ids_TK, counters


@given(step=steps)
def test_equals_the_method(step):
    before = [tensor.clone() for tensor in (step.weights_TK, step.ids_TK)]
    assert_equal(by_op(step), step.by_torch(), step)
    assert all(map(torch.equal, before, (step.weights_TK, step.ids_TK))), "inputs were changed"


def test_the_op_is_torchs_operator_of_its_kind():
    """No output is an input, and nothing but the counters changes: compiled code relies on that."""
    schema = torch.ops.sere_dist.reroute_any.default._schema
    written = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    assert written == ["counters"]

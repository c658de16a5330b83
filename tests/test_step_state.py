"""Which rows decode, from the model runner's batch: no engine needed."""

from types import SimpleNamespace

import numpy as np
import pytest

from sere_dist.config import ReroutingConfig
from sere_dist.vllm_plugin.worker import StepState


@pytest.fixture
def runner():
    """Four requests: decoding, within its prompt, at its beginning, and one prompt token before decoding."""
    batch = SimpleNamespace(
        num_reqs=4,
        num_computed_tokens_cpu=np.array([30, 20, 0, 9, 77]),
        num_prompt_tokens=np.array([30, 24, 6, 10, 5]),
    )
    return SimpleNamespace(input_batch=batch, _prepare_inputs=lambda *_: "prepared", _dummy_run=lambda *_: "dummy")


def follow(runner, **settings) -> StepState:
    state = StepState(32, ReroutingConfig(artifact="a", select_top_k=2, **settings))
    state.follow(runner)
    return state


def test_only_rows_of_computed_prompts_decode(runner):
    state = follow(runner)
    state.valid_rows.fill_(True)  # as if left over from a larger step
    assert runner._prepare_inputs(None, np.array([1, 4, 6, 1])) == "prepared"
    assert state.num_rows.item() == 12
    assert state.valid_rows.nonzero().flatten().tolist() == [0]


def test_rows_that_verify_speculated_tokens_decode(runner):
    state = follow(runner)
    runner._prepare_inputs(None, np.array([3, 4, 6, 1]))
    assert state.valid_rows.nonzero().flatten().tolist() == [0, 1, 2]


def test_all_rows(runner):
    state = follow(runner, rows="all")
    runner._prepare_inputs(None, np.array([1, 4, 6, 1]))
    assert state.valid_rows.nonzero().flatten().tolist() == list(range(12))


def test_dummy_runs_have_no_rows(runner):
    state = follow(runner)
    runner._prepare_inputs(None, np.array([1, 4, 6, 1]))
    assert runner._dummy_run(8) == "dummy"
    assert state.num_rows.item() == 0 and not state.valid_rows.any()

"""Drafted and accepted tokens are counted by their place in a draft: no engine needed."""

from types import SimpleNamespace

import pytest
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from sere_dist.vllm_plugin.speculation import Speculation

# `a` drafted 3 tokens and 2 were accepted, `b` 1 and none was; `c` had no draft, and `d` is in its prompt.
DRAFTS = {"a": [5, 6, 7], "b": [8]}
OUTPUT = ModelRunnerOutput(list("abcd"), dict(zip("abcd", range(4), strict=True)), [[5, 6, 9], [3], [1], []])


class Later(AsyncModelRunnerOutput):
    def get_output(self) -> ModelRunnerOutput:
        return OUTPUT


@pytest.fixture
def speculation() -> Speculation:
    speculation = Speculation(4)
    speculation.start_step(SimpleNamespace(scheduled_spec_decode_tokens=DRAFTS))
    return speculation


def test_tokens_that_are_there(speculation):
    assert speculation.watch(OUTPUT) is OUTPUT
    assert speculation.drafted.tolist() == [2, 1, 1, 0]
    assert speculation.accepted.tolist() == [1, 1, 0, 0]


def test_tokens_that_come_after_the_next_step_has_started(speculation):
    output = speculation.watch(Later())
    speculation.start_step(SimpleNamespace(scheduled_spec_decode_tokens={}))
    assert speculation.drafted.sum() == 0
    assert output.get_output() is OUTPUT
    assert speculation.drafted.tolist() == [2, 1, 1, 0]
    assert speculation.accepted.tolist() == [1, 1, 0, 0]


def test_a_step_without_drafts_is_not_watched(speculation):
    speculation.start_step(SimpleNamespace(scheduled_spec_decode_tokens={}))
    later = Later()
    assert speculation.watch(later) is later and speculation.watch(None) is None

"""Which rows may be re-routed, from the batch of the model runner (V1 and V2): no engine needed."""

from types import SimpleNamespace

import numpy as np
import pytest
from vllm import SamplingParams

from sere_dist.config import ReroutingConfig
from sere_dist.vllm_plugin.draft_model import DraftRows
from sere_dist.vllm_plugin.rows import Rows, is_in_share, opts_out, places_in_drafts
from sere_dist.vllm_plugin.speculation import Speculation

# Four requests: decoding, within its prompt, at its beginning, and one prompt token before decoding.
REQUESTS, PROMPT, COMPUTED = ["a", "b", "c", "d"], [30, 24, 6, 10], [30, 20, 0, 9]


class Runner:
    """What `Rows` reads of a model runner; buffers are longer than the batch, and hold leftovers."""

    def __init__(self, version: int):
        self.dummies = 0
        if version == 1:
            self.input_batch = SimpleNamespace(
                req_ids=[*REQUESTS, None],
                num_prompt_tokens=np.array([*PROMPT, 5]),
                num_computed_tokens_cpu=np.array([*COMPUTED, 77]),
            )
            self.requests = dict.fromkeys(REQUESTS)
            self._prepare_inputs = lambda _scheduled, _tokens: "prepared"
        else:
            in_states = [3, 0, 4, 1]  # where each request's state lies
            prompts = np.zeros(6, dtype=np.int32)
            prompts[in_states] = PROMPT
            self.req_states = SimpleNamespace(
                prompt_len=SimpleNamespace(np=prompts), req_id_to_index=dict(zip(REQUESTS, in_states, strict=True))
            )
            self.prepare_inputs = lambda _scheduled, tokens: SimpleNamespace(
                req_ids=REQUESTS,
                idx_mapping_np=np.array(in_states),
                num_computed_tokens_np=np.array(COMPUTED),
                num_scheduled_tokens=tokens,
            )

    def _dummy_run(self, _tokens: int) -> str:
        return "dummy"

    def step(self, tokens: list[int], drafts: dict[str, list[int]] | None = None, **of_new_requests):
        new = [SimpleNamespace(req_id=name, sampling_params=given) for name, given in of_new_requests.items()]
        scheduled = SimpleNamespace(
            scheduled_new_reqs=new,
            num_scheduled_tokens=dict(zip(REQUESTS, tokens, strict=True)),
            scheduled_spec_decode_tokens=drafts or {},
            scheduled_cached_reqs=SimpleNamespace(req_ids=REQUESTS, num_computed_tokens=COMPUTED, resumed_req_ids=()),
            finished_req_ids=(),
        )
        prepare = self.prepare_inputs if hasattr(self, "req_states") else self._prepare_inputs
        return prepare(scheduled, np.array(tokens))


@pytest.fixture(params=[1, 2])
def runner(request) -> Runner:
    return Runner(request.param)


def follow(runner: Runner, speculation: Speculation | None = None, **settings) -> Rows:
    rows = Rows(32, speculation=speculation)
    rows.set_settings(ReroutingConfig(artifact="a", select_top_k=2, **settings))
    rows.valid.fill_(True)  # as if left over from a larger step
    rows.runs.fill_(True)
    rows.follow(runner)
    return rows


def valid(rows: Rows) -> list[int]:
    return rows.valid.nonzero().flatten().tolist()


def running(rows: Rows) -> list[int]:
    return rows.runs.nonzero().flatten().tolist()


def test_only_rows_of_computed_prompts_decode(runner):
    rows = follow(runner)
    assert runner.step([1, 4, 6, 1])
    assert rows.count.tolist() == [12, 1]
    assert valid(rows) == [0] and running(rows) == list(range(1, 12)), "what the others run, it may turn to"


def test_rows_that_verify_speculated_tokens_decode(runner):
    rows = follow(runner)
    runner.step([3, 4, 6, 1], drafts={"a": [7, 8]})
    assert rows.count.tolist() == [14, 3]
    assert valid(rows) == [0, 1, 2]


def test_a_row_has_the_chance_of_its_place_in_the_draft(runner):
    speculation = Speculation(2, is_async=False)
    speculation.chances[:] = 1, 0.5, 0.25
    rows = follow(runner, speculation)
    runner.step([3, 4, 6, 2], drafts={"a": [7, 8], "d": [9]})
    assert rows.chance is not None
    assert rows.chance[:15].tolist() == [1, 0.5, 0.25, *[1] * 10, 1, 0.5]
    assert follow(runner).chance is None


def test_places_in_drafts():
    assert places_in_drafts(np.array([4, 1, 3, 2]), np.array([3, 0, 0, 1])).tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 0, 1]
    assert places_in_drafts(np.array([], dtype=int), np.array([], dtype=int)).tolist() == []


def test_rows_that_a_preempted_request_computes_again_do_not_decode(runner):
    """`a` had written 3 tokens, which are computed again behind its prompt; only the last is a new one."""
    rows = follow(runner)
    runner.step([3, 4, 6, 1])
    assert rows.count.tolist() == [14, 0]


def test_all_rows(runner):
    rows = follow(runner, rows="all")
    runner.step([1, 4, 6, 1])
    assert rows.count.tolist() == [12, 12]
    assert valid(rows) == list(range(12)) and not running(rows)


def test_dummy_runs_have_no_rows(runner):
    rows = follow(runner)
    runner.step([1, 4, 6, 1])
    assert runner._dummy_run(8) == "dummy"
    assert rows.count.tolist() == [0, 0] and not valid(rows) and not running(rows)


def test_rows_of_a_request_that_opts_out(runner):
    rows = follow(runner, rows="all")
    out = {"b": SamplingParams(extra_args={"sere": "off"}), "c": SamplingParams(), "d": None}  # d: a pooling request
    for new in (out, {}):  # in later steps it is no new request
        runner.step([1, 4, 6, 1], **new)
        assert rows.count.tolist() == [12, 8]
        assert valid(rows) == [0, *range(5, 12)] and not running(rows), "others learn nothing of it"
    del (runner.requests if hasattr(runner, "requests") else runner.req_states.req_id_to_index)["b"]
    runner.step([1, 4, 6, 1])
    assert not rows.opted_out, "a finished request is forgotten"


def test_rows_of_a_request_that_keeps_its_experts(runner):
    """Others may turn to what it runs, and to a prompt's; never to those of a request that opted out."""
    rows = follow(runner)
    asked = {"a": SamplingParams(extra_args={"sere": "keep"}), "b": SamplingParams(extra_args={"sere": "off"})}
    for new in (asked, {}):
        runner.step([1, 4, 6, 1], **new)
        assert not valid(rows) and running(rows) == [0, *range(5, 12)]
    del (runner.requests if hasattr(runner, "requests") else runner.req_states.req_id_to_index)["a"]
    runner.step([1, 4, 6, 1])
    assert not rows.keeps, "a finished request is forgotten"


def test_a_draft_models_rows_are_those_of_the_same_requests(runner):
    """Its first pass has one row more for every request, each further pass has one row for every request."""
    served = follow(runner)
    rows = DraftRows(served)
    rows.follow_proposer(proposer := SimpleNamespace(_determine_batch_execution_and_padding=lambda n: ("graph", n + 3)))
    runner.step([3, 4, 6, 2], drafts={"a": [7, 8]})
    assert proposer._determine_batch_execution_and_padding(19) == ("graph", 22)
    assert rows.count.tolist() == [22, 4] and valid(rows) == [0, 1, 2, 3]
    proposer._determine_batch_execution_and_padding(4)
    assert rows.count.tolist() == [7, 1] and valid(rows) == [0]
    proposer._determine_batch_execution_and_padding(11)
    assert rows.count.tolist() == [14, 0] and not valid(rows), "no pass of this step's has 11 rows"
    runner.step([1, 4, 6, 1], d=SamplingParams(), a=SamplingParams(extra_args={"sere": "off"}))
    proposer._determine_batch_execution_and_padding(4)
    assert not valid(rows), "who opts out is answered by stock experts alone"
    runner._dummy_run(8)
    proposer._determine_batch_execution_and_padding(8)
    assert rows.count.tolist() == [11, 0] and not valid(rows)


def test_a_share_of_the_requests(runner):
    """The same requests in every step, and more of them the larger the share; all rows of a request, or none."""
    by_share = {}
    for share in (0.0, 0.3, 0.6, 1.0):
        rows = follow(runner, rows="all", share=share)
        runner.step([1, 4, 6, 1])
        by_share[share] = set(valid(rows))
        assert all(by_share[share] >= fewer for fewer in by_share.values())
        for request in ({0}, set(range(1, 5)), set(range(5, 11)), {11}):
            assert request <= by_share[share] or not request & by_share[share]
        assert not running(rows), "what others of a trial run is not for its requests"
    assert by_share[0.0] == set() and by_share[1.0] == set(range(12))


def test_prompts_outside_the_share(runner):
    """Their requests are answered as if they opted out, so others may not turn to what their prompts run."""
    by_share = {}
    for share in (0.0, 0.3, 1.0):
        rows = follow(runner, share=share)
        runner.step([1, 4, 6, 1])
        by_share[share] = set(running(rows))
    assert by_share[0.0] == set() and by_share[1.0] == set(range(1, 12))
    prompts = {"b": set(range(1, 5)), "c": set(range(5, 11)), "d": {11}}
    assert by_share[0.3] == set().union(*(its for request, its in prompts.items() if is_in_share(request, 0.3)))


def test_a_share_has_that_many():
    requests = [f"cmpl-{number:032x}" for number in range(10_000)]
    for share in (0.1, 0.5, 0.9):
        assert sum(is_in_share(request, share) for request in requests) == pytest.approx(share * 10_000, abs=200)


def test_a_step_that_is_too_long_is_an_error(runner):
    follow(runner)
    with pytest.raises(RuntimeError, match="a step has 33 rows, re-routing expected 32 at most"):
        runner.step([20, 6, 6, 1])


@pytest.mark.parametrize(
    ("extra_args", "out"),
    [(None, False), ({}, False), ({"sere": "on"}, False), ({"other": 0}, False)]
    + [({"sere": value}, True) for value in ("off", "OFF", False, 0, "0", "false")],
)
def test_what_opts_out(extra_args, out):
    assert opts_out(extra_args) is out

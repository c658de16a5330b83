"""Which drafts were accepted, from what vLLM's scheduler hands to the workers: no engine needed."""

import random
from types import SimpleNamespace

import pytest
import torch

from sere_dist.vllm_plugin.speculation import PRIOR, Speculation, VerifyingSteps

DRAFT = 3


class Scheduler:
    """vLLM's bookkeeping: a step counts whole drafts as computed, until the rejected tokens are known."""

    def __init__(self, is_async: bool):
        self.delay = 2 if is_async else 1
        self.computed, self.rejected, self.new = {}, {}, {}

    def add(self, request: str, prompt: int) -> None:
        self.computed[request], self.rejected[request], self.new[request] = 0, [], prompt

    def step(self, accepted: dict[str, int], drafts: dict[str, int], finished=(), resumed=()) -> SimpleNamespace:
        """`accepted`: what the model will accept of the requests' drafts; a request's first step is its prompt."""
        for request in finished:
            del self.computed[request]
        for request in resumed:
            self.computed[request], self.rejected[request] = 0, []
        new = [name for name in accepted if name in self.new]
        scheduled, cached = {}, [name for name in accepted if name not in self.new]
        for request in cached:
            if len(self.rejected[request]) == self.delay:
                self.computed[request] -= self.rejected[request].pop(0)
        before = dict(self.computed)
        for request, of_draft in accepted.items():
            scheduled[request] = self.new.pop(request, drafts[request] + 1)
            self.rejected[request].append(drafts[request] - of_draft)
            self.computed[request] += scheduled[request]
        return SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=0) for name in new],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=cached, num_computed_tokens=[before[name] for name in cached], resumed_req_ids=set(resumed)
            ),
            num_scheduled_tokens=scheduled,
            scheduled_spec_decode_tokens={name: [-1] * count for name, count in drafts.items() if count},
            finished_req_ids=set(finished),
        )


@pytest.mark.parametrize("is_async", [False, True])
def test_drafts_are_counted_once_their_outcome_is_known(is_async):
    scheduler, speculation = Scheduler(is_async), Speculation(DRAFT, is_async)
    draw = random.Random(0)
    for name in "ab":
        scheduler.add(name, prompt=7)
    speculation.start_step(scheduler.step({"a": 0, "b": 0}, {"a": 0, "b": 0}))
    outcomes = []
    for _ in range(200):
        drafts = {name: draw.randint(0, DRAFT) for name in "ab"}
        outcomes.append({name: (count, draw.randint(0, count)) for name, count in drafts.items()})
        speculation.start_step(scheduler.step({name: outcomes[-1][name][1] for name in "ab"}, drafts))
    known = [pair for step in outcomes[: -scheduler.delay] for pair in step.values()]
    assert speculation.drafted.tolist() == [sum(drafted > place for drafted, _ in known) for place in range(DRAFT)]
    assert speculation.accepted.tolist() == [sum(accepted > place for _, accepted in known) for place in range(DRAFT)]


@pytest.mark.parametrize("is_async", [False, True])
def test_chances_follow_what_is_accepted(is_async):
    scheduler, speculation = Scheduler(is_async), Speculation(DRAFT, is_async)
    assert speculation.chances.tolist() == [1] * (DRAFT + 1), "until something is known, a draft is taken for accepted"
    scheduler.add("a", prompt=7)
    speculation.start_step(scheduler.step({"a": 0}, {"a": 0}))
    for step in range(4000):
        speculation.start_step(scheduler.step({"a": step % 3}, {"a": DRAFT}))  # 0, 1, 2, 0, ...
    assert speculation.chances == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=0.03)
    for _ in range(4000):
        speculation.start_step(scheduler.step({"a": DRAFT}, {"a": DRAFT}))
    assert speculation.chances == pytest.approx([1] * (DRAFT + 1), abs=0.03)
    speculation.clear()
    assert not speculation.drafted.any() and not speculation.accepted.any()
    assert speculation.chances == pytest.approx([1] * (DRAFT + 1), abs=0.03)


def test_requests_that_end_or_come_again_are_forgotten():
    scheduler, speculation = Scheduler(False), Speculation(DRAFT, False)
    for name in "ab":
        scheduler.add(name, prompt=7)
    speculation.start_step(scheduler.step({"a": 0, "b": 0}, {"a": 0, "b": 0}))
    speculation.start_step(scheduler.step({"a": 1, "b": 1}, {"a": 3, "b": 3}))
    speculation.start_step(scheduler.step({"b": 0}, {"b": 0}, finished="a", resumed="b"))
    assert not speculation.drafted.any()
    assert speculation.chances.tolist() == [1] * (DRAFT + 1)
    assert PRIOR > 0 and set(speculation._drafts) == set(speculation._expected) == {"b"}


def test_what_verifying_steps_count_is_told_apart():
    layers = [torch.zeros(2, dtype=torch.int64) for _ in range(3)]
    verifying, expected = VerifyingSteps(layers), torch.zeros(3, 2, dtype=torch.int64)
    for step, verifies in enumerate((False, True, True, False, True, False, False, True)):
        verifying.start_step(verifies)
        for place, counters in enumerate(layers):
            counters += torch.tensor([1, 10 * step + place])
            expected[place] += counters.new_tensor([1, 10 * step + place]) * verifies
        assert verifying.totals().equal(expected)
    for counters in layers:
        counters.zero_()
    verifying.clear()
    assert not verifying.totals().any()
    layers[1] += 5
    assert verifying.totals().tolist() == [[0, 0], [5, 5], [0, 0]], "the steps that verify go on"
    verifying.start_step(False)
    layers[1] += 7
    assert verifying.totals().tolist() == [[0, 0], [5, 5], [0, 0]]

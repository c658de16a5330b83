"""Speculative decoding: how many drafted tokens were accepted so far, and so the chance that a row's output is used.

A step verifies a request's draft by one row for its last token, whose output is always used, and one row for every
drafted token, whose output is used if that token and those before it are accepted.

Everything is read from what vLLM's scheduler hands to the workers, which is the same on all of them. So the ranks of a
tensor-parallel group, which must re-route alike, agree about the chances.
"""

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

PRIOR = 16  # accepted drafts that a start is taken for: a row counts in full until something is known
MEMORY = 1024  # drafts after which one counts 1 / e


class Speculation:
    """Follows the drafts of all requests.

    Attributes:
        drafted, accepted: int64 [most tokens of a draft], counted by their place in it. The last draft of a request is
            not in it: the scheduler says nothing of a request that has finished.
        chances: float32 [1 + most tokens of a draft], that a row's output is used, by its place in the step; a running
            mean.
    """

    def __init__(self, most_tokens: int, is_async: bool):
        """`is_async`: with asynchronous scheduling a step is scheduled before the last one's tokens are known."""
        self.drafted, self.accepted = np.zeros((2, most_tokens), dtype=np.int64)
        self._sums = np.full((2, most_tokens), float(PRIOR))  # recent ones of accepted and drafted tokens
        self.chances = np.ones(1 + most_tokens, dtype=np.float32)
        self._delay = 2 if is_async else 1  # steps of a request until its draft is settled
        self._drafts: dict[str, deque[int]] = defaultdict(deque)  # of each request: drafts that are not settled yet
        self._expected: dict[str, int] = {}  # tokens that are computed if the whole draft is accepted

    def start_step(self, scheduler_output: Any) -> None:
        """Settles the drafts that the scheduler knows the outcome of, and takes over those of this step."""
        cached = scheduler_output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        for request in (*scheduler_output.finished_req_ids, *cached.resumed_req_ids, *computed):
            self._drafts.pop(request, None)
            self._expected.pop(request, None)
        computed |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        for request, tokens in scheduler_output.num_scheduled_tokens.items():
            drafts = self._drafts[request]
            if len(drafts) == self._delay:
                rejected = self._expected[request] - computed[request]
                self._settle(drafts.popleft(), rejected)
            drafts.append(len(scheduler_output.scheduled_spec_decode_tokens.get(request, ())))
            self._expected[request] = computed[request] + tokens

    def _settle(self, drafted: int, rejected: int) -> None:
        if not drafted:
            return
        accepted = min(max(drafted - rejected, 0), drafted)
        self.drafted[:drafted] += 1
        self.accepted[:accepted] += 1
        self._sums *= 1 - 1 / MEMORY
        self._sums[0, :accepted] += 1
        self._sums[1, :drafted] += 1
        self.chances[1:] = self._sums[0] / self._sums[1]

    def clear(self) -> None:
        """Sets the counts to 0; the chances stay."""
        self.drafted[:] = 0
        self.accepted[:] = 0


class VerifyingSteps:
    """What those steps add to counters that verify drafts: by the counters' difference between two steps.

    Steps of one kind in a row cost nothing. Nothing here waits for the device.
    """

    def __init__(self, counters: Iterable[torch.Tensor]):
        """`counters`: int64 [N] for each layer, on one device."""
        self._counters = list(counters)
        self._before: torch.Tensor | None = None  # the counters when the steps that run now began to verify drafts
        self._ended = torch.zeros_like(self._now())

    def start_step(self, verifies: bool) -> None:
        if verifies and self._before is None:
            self._before = self._now()
        elif not verifies and self._before is not None:
            self._ended, self._before = self.totals(), None

    def totals(self) -> torch.Tensor:
        """Returns int64 [layers, N], on the counters' device."""
        return self._ended if self._before is None else self._ended + (self._now() - self._before)

    def clear(self) -> None:
        """Sets the totals to 0; call it where the counters are set to 0."""
        self._ended.zero_()
        self._before = None if self._before is None else torch.zeros_like(self._before)

    def _now(self) -> torch.Tensor:
        return torch.stack(self._counters)

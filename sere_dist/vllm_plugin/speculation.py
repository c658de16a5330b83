"""Speculative decoding: how many drafted tokens a worker verified, and how many of them it accepted."""

from typing import Any

import numpy as np
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput


class Speculation:
    """Counts, by a token's place in its draft, the drafted tokens and the accepted ones.

    Attributes:
        drafted, accepted: int64 [most tokens of a draft].
    """

    def __init__(self, most_tokens: int):
        self.drafted, self.accepted = np.zeros((2, most_tokens), dtype=np.int64)
        self._of_step: dict[str, int] = {}  # tokens of each request's draft

    def start_step(self, scheduler_output: Any) -> None:
        drafts = scheduler_output.scheduled_spec_decode_tokens
        self._of_step = {request: len(tokens) for request, tokens in drafts.items()}

    def watch(self, output: Any) -> Any:
        """Returns what the worker answers with, and counts it: at once, or when its tokens have come."""
        if not self._of_step:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _Watched(output, self, self._of_step)
        if isinstance(output, ModelRunnerOutput):
            self.count(output, self._of_step)
        return output

    def count(self, output: ModelRunnerOutput, drafts: dict[str, int]) -> None:
        for request, tokens in zip(output.req_ids, output.sampled_token_ids, strict=True):
            if tokens:  # the last one comes from the model itself
                self.drafted[: drafts.get(request, 0)] += 1
                self.accepted[: min(len(tokens) - 1, drafts.get(request, 0))] += 1

    def clear(self) -> None:
        self.drafted[:] = 0
        self.accepted[:] = 0


class _Watched(AsyncModelRunnerOutput):
    """An output whose tokens are not there yet."""

    def __init__(self, output: AsyncModelRunnerOutput, speculation: Speculation, drafts: dict[str, int]):
        self.output, self.speculation, self.drafts = output, speculation, drafts

    def get_output(self) -> ModelRunnerOutput:
        output = self.output.get_output()
        self.speculation.count(output, self.drafts)
        return output

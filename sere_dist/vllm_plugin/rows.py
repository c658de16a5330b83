"""Which rows of a step may be re-routed, read from vLLM's model runner before each step."""

import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from sere_dist.config import ReroutingConfig
from sere_dist.vllm_plugin.speculation import Speculation

OPT_OUT = "sere"  # The key of a request's own `extra_args` (`vllm_xargs` over HTTP).
OFF, KEEP = "off", "keep"  # Its values: a request opts out; or it keeps its experts, and lets others turn to them.


class Rows:
    """The rows of the current step: a mask at one place in memory, so that captured graphs and compiled code see it.

    Attributes:
        valid: bool [most tokens of a step] on the model's device: rows that re-routing may change and that vote. Rows
            behind those of the step are padding, and False.
        runs: bool, as long: rows that keep their experts, to which others may turn: those of a prompt, and of a request
            that asked for it. Rows of a request that opted out are not among them: others learn nothing of it.
        chance: float32 [most tokens of a step], that a row's output is used. None: no step verifies drafts.
        count: int64 [2] on the CPU: rows of the step, and valid ones; 0 in profiling and dummy runs.
        requests: bool, for each request of the step, in the order of its rows, whether its rows are valid.
        scheduled_tokens: int, for each of them, how many rows it has.
        is_of_this_step: set with every step's batch.
    """

    def __init__(self, max_tokens: int, device: torch.device | str = "cpu", speculation: Speculation | None = None):
        self.valid = torch.zeros(max_tokens, dtype=torch.bool, device=device)
        self.runs = torch.zeros_like(self.valid)
        self.speculation = speculation
        self.chance = None if speculation is None else torch.ones(max_tokens, device=device)
        self.count = torch.zeros(2, dtype=torch.int64)
        self.requests, self.scheduled_tokens = np.zeros(0, dtype=bool), np.zeros(0, dtype=int)
        self.is_of_this_step = False
        self.which: str = "decode"
        self.share = 1.0
        self.opted_out: set[str] = set()
        self.keeps: set[str] = set()

    def set_settings(self, settings: ReroutingConfig) -> None:
        self.which, self.share = settings.rows, settings.share

    def follow(self, runner: Any) -> None:
        """Keeps up with the batch of vLLM's model runner, V1 or V2, from now on."""
        is_v2 = hasattr(runner, "req_states")
        hook = "prepare_inputs" if is_v2 else "_prepare_inputs"
        prepare_inputs, dummy_run = getattr(runner, hook), runner._dummy_run

        def prepare(scheduler_output, *args, **kwargs):
            prepared = prepare_inputs(scheduler_output, *args, **kwargs)
            for request in scheduler_output.scheduled_new_reqs:
                asked = None if request.sampling_params is None else request.sampling_params.extra_args
                if opts_out(asked):
                    self.opted_out.add(request.req_id)
                elif keeps_experts(asked):
                    self.keeps.add(request.req_id)
            if is_v2:
                prompts = runner.req_states.prompt_len.np[prepared.idx_mapping_np]
                batch = (prepared.req_ids, prompts, prepared.num_computed_tokens_np, prepared.num_scheduled_tokens)
                live = runner.req_states.req_id_to_index
            else:
                of = runner.input_batch
                batch = (of.req_ids, of.num_prompt_tokens, of.num_computed_tokens_cpu, args[0])
                live = runner.requests
            if self.speculation is not None:
                self.speculation.start_step(scheduler_output)
            requests, *numbers = (each[: len(scheduler_output.num_scheduled_tokens)] for each in batch)
            drafted = scheduler_output.scheduled_spec_decode_tokens
            self.start_step(requests, *numbers, np.array([len(drafted.get(name, ())) for name in requests]), live)
            return prepared

        def dummy(*args, **kwargs):
            self.clear()
            return dummy_run(*args, **kwargs)

        setattr(runner, hook, prepare)
        runner._dummy_run = dummy

    def clear(self) -> None:
        """Marks no row: what runs next is no step of requests."""
        self.count.zero_()
        self.valid.zero_()
        self.runs.zero_()
        self.requests, self.scheduled_tokens = self.requests[:0], self.scheduled_tokens[:0]

    @contextmanager
    def none_valid(self) -> Generator[None]:
        """Within it no row is valid, so nothing is re-routed or counted; afterwards those that were."""
        valid, count = self.valid.clone(), self.count.clone()
        self.valid.zero_()
        self.count[1] = 0
        yield
        self.valid.copy_(valid)
        self.count.copy_(count)

    def start_step(
        self,
        requests: Sequence[str],
        prompt_tokens: np.ndarray,
        computed_tokens: np.ndarray,
        scheduled_tokens: np.ndarray,
        drafted_tokens: np.ndarray,
        live: Mapping[str, Any],
    ) -> None:
        """Takes over a batch: for each request, in the order of its rows, prompt tokens, tokens computed before this
        step, tokens of this step, and how many of these are drafts to verify.

        A row decodes if its request's whole prompt was computed before, and the step holds one token of the request
        besides its drafts. A preempted request has more, until its own output is computed again.
        """
        decodes = (computed_tokens >= prompt_tokens) & (scheduled_tokens - drafted_tokens <= 1)
        valid = np.ones(len(requests), dtype=bool) if self.which == "all" else decodes
        if self.keeps:
            self.keeps.intersection_update(live)
            valid = valid & [request not in self.keeps for request in requests]
        runs = ~valid
        if self.opted_out:
            self.opted_out.intersection_update(live)
            takes_part = np.array([request not in self.opted_out for request in requests])
            valid, runs = valid & takes_part, runs & takes_part
        if self.share < 1:  # what a trial on few requests costs is not to depend on what all others run
            in_share = np.array([is_in_share(request, self.share) for request in requests], dtype=bool)
            valid, runs = valid & in_share, runs & in_share
        self.requests, self.scheduled_tokens = valid, scheduled_tokens.copy()
        rows = np.repeat(valid, scheduled_tokens)
        self.mark(rows, len(rows))
        self.mark_runs(np.repeat(runs, scheduled_tokens))
        if self.speculation is not None and self.chance is not None:
            places = places_in_drafts(scheduled_tokens, drafted_tokens)
            _copy(self.speculation.chances[places], self.chance)
        self.is_of_this_step = True

    def mark(self, valid: np.ndarray, num_rows: int) -> None:
        """Sets which of a step's rows are valid; `num_rows` counts padding, too, where the step comes with it."""
        if len(valid) > len(self.valid):
            raise RuntimeError(f"a step has {len(valid)} rows, re-routing expected {len(self.valid)} at most")
        _copy(valid, self.valid)
        self.valid[len(valid) :] = False
        self.count[0], self.count[1] = num_rows, int(valid.sum())

    def mark_runs(self, runs: np.ndarray) -> None:
        """Sets which of a step's rows run their experts although they are not valid."""
        _copy(runs, self.runs)
        self.runs[len(runs) :] = False


def is_in_share(request: str, share: float) -> bool:
    """Returns whether a request, by its id, is in a share of all of them: the same on every rank, and in every larger
    share as well. vLLM's ids have a random part, so no client can choose."""
    return zlib.crc32(request.encode()) < share * 2**32


def places_in_drafts(scheduled_tokens: np.ndarray, drafted_tokens: np.ndarray) -> np.ndarray:
    """Returns the place of each row in its request's draft, from 1 on; 0 for tokens that are no drafts.

    Drafts are the last of a request's rows. Both arguments have an entry for each request.
    """
    ends = np.cumsum(scheduled_tokens)
    behind = np.repeat(ends, scheduled_tokens) - np.arange(ends[-1] if len(ends) else 0)  # rows until the request's end
    return np.maximum(np.repeat(drafted_tokens, scheduled_tokens) + 1 - behind, 0)


def _copy(values: np.ndarray, buffer: torch.Tensor) -> None:
    """Puts values to the beginning of a buffer on the model's device."""
    tensor = torch.from_numpy(values)
    if buffer.is_cuda:
        # Pinned memory is handed back to torch's allocator, which keeps it until this copy is done.
        buffer[: len(tensor)].copy_(tensor.pin_memory(), non_blocking=True)
    else:
        buffer[: len(tensor)] = tensor


def opts_out(extra_args: Mapping[str, Any] | None) -> bool:
    """Returns whether a request's extra arguments switch `sere` off: its rows then neither change nor count for others.

    "off", "false", 0 and False switch it off. Any other value changes nothing: a request can't switch re-routing on.
    """
    return bool(extra_args) and str(extra_args.get(OPT_OUT, "")).lower() in (OFF, "false", "0")


def keeps_experts(extra_args: Mapping[str, Any] | None) -> bool:
    """Returns whether a request's extra arguments keep its experts: its rows do not change, but count for others."""
    return bool(extra_args) and str(extra_args.get(OPT_OUT, "")).lower() == KEEP

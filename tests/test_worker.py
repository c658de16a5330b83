"""A step that goes past what the plugin hooked stops the worker."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sere_dist.rerouting import COUNTERS
from sere_dist.vllm_plugin.rows import Rows
from sere_dist.vllm_plugin.worker import Rerouting


class Vllms:
    """A worker of vLLM: what it does in a step is up to the test."""

    def __init__(self, on_step):
        self.on_step = on_step

    def execute_model(self, scheduler_output):
        self.on_step()
        return "output"


class Worker(Rerouting, Vllms):
    def __init__(self, prepares: bool, reroutes: bool):
        def step():
            if prepares:
                self.sere_rows.start_step(["a"], np.array([3]), np.array([3]), np.array([1]), {})
            if reroutes:
                self.sere_layers[7][COUNTERS.index("steps")] += 1

        super().__init__(step)
        self.sere_rows, self.sere_owners, self.sere_seen_rerouting = Rows(4), None, False
        self.sere_layers = {7: torch.zeros(len(COUNTERS), dtype=torch.int64)}


STEP, EMPTY = (SimpleNamespace(total_num_scheduled_tokens=tokens) for tokens in (1, 0))


def test_steps_that_are_rerouted_run():
    worker = Worker(prepares=True, reroutes=True)
    assert worker.execute_model(STEP) == worker.execute_model(STEP) == "output"


def test_a_step_without_tokens_runs():
    assert Worker(prepares=False, reroutes=False).execute_model(EMPTY) == "output"


def test_a_batch_that_was_not_seen_is_an_error():
    with pytest.raises(RuntimeError, match="without preparing its batch where sere_dist looks"):
        Worker(prepares=False, reroutes=True).execute_model(STEP)


def test_a_layer_that_was_not_rerouted_is_an_error():
    with pytest.raises(RuntimeError, match="layer 7 chose its experts without asking sere_dist"):
        Worker(prepares=True, reroutes=False).execute_model(STEP)

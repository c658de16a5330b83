"""A step that goes past what the plugin hooked stops the worker."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from sere_dist.artifact.placement import LayerPlacement, Placement
from sere_dist.config import ReroutingConfig
from sere_dist.method.counters import COUNTERS, count_step, named
from sere_dist.method.projection import in_force, reroute_projection
from sere_dist.method.records import ExpertPlaces, LayerTables, Step
from sere_dist.vllm_plugin.layers import counters_of, scaled
from sere_dist.vllm_plugin.rows import Rows
from sere_dist.vllm_plugin.worker import Rerouting


class Vllms:
    """A worker of vLLM: what it does in a step is up to the test."""

    def __init__(self, on_step):
        self.on_step = on_step

    def execute_model(self, scheduler_output):
        self.on_step()
        return "output"

    def compile_or_warm_up_model(self):
        """As with runner V2: steps that look like requests, then captures, which don't prepare a batch."""
        self.execute_model(STEP)
        self.on_capture()
        return "times"

    def reload_weights(self, weights_iterator=None):
        given = DefaultModelLoader.get_all_weights(None, None, None) if weights_iterator is None else weights_iterator
        self.reloaded = dict(given)


class Worker(Rerouting, Vllms):
    def __init__(self, prepares: bool, reroutes: bool):
        def step():
            if prepares:
                self.sere_rows.start_step(["a"], np.array([3]), np.array([3]), np.array([1]), np.array([0]), {})
            if reroutes:
                self.sere_layers[7][COUNTERS.index("steps")] += 1

        def capture():
            self.captured = self.sere_rows.valid.tolist()
            self.sere_layers[7][COUNTERS.index("steps")] += 1

        super().__init__(step)
        self.on_capture, self.sere_placement = capture, None
        self.sere_rows, self.sere_expert_map, self.sere_draft = Rows(4), None, None
        self.sere_verifying, self.sere_shadow, self.sere_seen_rerouting = None, None, False
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


def test_prices_follow_the_weights_that_the_router_gives():
    """Where vLLM scales the experts' output instead of the weights, prices are in the weights' unit all the same."""
    torch.manual_seed(0)
    weights, ids = torch.rand(6, 4), torch.stack([torch.randperm(8)[:4] for _ in range(6)])
    tables = LayerTables(torch.rand(8, 8), torch.rand(8, 8), 0.5 + torch.rand(8))
    own = ReroutingConfig(
        artifact="a", policy="projection", select_top_k=1, expert_price=1.5, traffic_price=0.25, balance_price=0.5
    )
    found = scaled(own, 2.5)
    prices = (found.expert_price, found.traffic_price, found.balance_price)
    assert prices == (pytest.approx(0.24), pytest.approx(0.04), pytest.approx(0.08))
    assert (found.select_top_k, scaled(own, 1.0)) == (1, own)
    places = ExpertPlaces(domain_E=torch.arange(8) % 2)
    whole = reroute_projection(Step(2.5 * weights, ids), tables, own.numbers, places)
    parted = reroute_projection(Step(weights, ids), tables, found.numbers, places)
    assert whole[1].equal(parted[1]) and not whole[1].equal(ids)
    assert torch.allclose(whole[0], 2.5 * parted[0])


def test_without_safe_slots_the_price_may_be_0_while_rerouting_is_off():
    """So that a controller whose first price is 0 can switch it off."""
    settings = ReroutingConfig(artifact="a", policy="projection", select_top_k=0, expert_price=0.1)
    off = settings.changed({"enabled": False, "expert_price": 0.0}, 8)
    assert in_force(settings.numbers, 8) and not in_force(off.numbers, 8)
    for refused in ({"expert_price": 0.0}, {"enabled": True}):
        with pytest.raises(ValueError, match="set expert_price or balance_price"):
            (settings if refused.keys() == {"expert_price"} else off).changed(refused, 8)


def test_the_estimated_error_is_in_the_unit_of_the_prices():
    """Where vLLM scales the experts' output, a layer counts errors of what the router gave, before that scale."""
    torch.manual_seed(0)
    weights, ids = torch.rand(6, 4), torch.stack([torch.randperm(8)[:4] for _ in range(6)])
    tables = LayerTables(torch.rand(8, 8), torch.rand(8, 8), 0.5 + torch.rand(8))
    new_ids, primary = ids.masked_fill(ids > 3, -1), torch.arange(8) < 4
    whole, parted = (
        count_step(Step(scale * weights, ids), new_ids, primary, tables=tables)[: len(COUNTERS)].tolist()
        for scale in (2.5, 1)
    )
    runner = SimpleNamespace(routed_scaling_factor=2.5)
    assert named(whole)["estimated_error"] > 1
    assert counters_of(parted, runner) == pytest.approx(named(whole), rel=1e-5)


def test_a_layer_that_was_not_rerouted_is_an_error():
    with pytest.raises(RuntimeError, match="layer 7 chose its experts without asking sere_dist"):
        Worker(prepares=True, reroutes=False).execute_model(STEP)


def test_a_warm_up_is_not_counted_as_served():
    """It runs steps like requests, and graphs are captured while these rows are still marked."""
    worker = Worker(prepares=True, reroutes=True)
    assert worker.compile_or_warm_up_model() == "times"
    assert any(worker.captured)
    assert not worker.sere_layers[7].any() and not worker.sere_rows.valid.any() and not worker.sere_rows.count.any()
    assert not worker.sere_seen_rerouting, "the first step that is served is checked"
    worker.execute_model(STEP)
    assert worker.sere_layers[7][COUNTERS.index("steps")] == 1 and worker.sere_seen_rerouting


def test_a_missing_hook_stops_the_warm_up():
    with pytest.raises(RuntimeError, match="layer 7 chose its experts without asking sere_dist"):
        Worker(prepares=True, reroutes=False).compile_or_warm_up_model()


def test_weights_that_are_no_checkpoint_are_not_placed():
    worker = Worker(prepares=True, reroutes=True)
    worker.reload_weights(weights_iterator=[("lm_head.weight", 1)])
    assert worker.reloaded.pop("lm_head.weight") == 1
    worker.sere_placement = object()
    with pytest.raises(ValueError, match="can't be placed: remove 'placement'"):
        worker.reload_weights(weights_iterator=[("lm_head.weight", 1)])
    assert not worker.reloaded


def test_weights_that_are_loaded_again_are_placed_again(monkeypatch):
    expected = dict.fromkeys(LayerPlacement.model_fields, 1)  # nobody reads it
    about = {"base_model": "nobody/small-moe", "num_experts": 4, "num_ranks": 2, "affinity": "similarity"}
    layer = LayerPlacement(**expected | {"rank_of_expert": [1, 0, 0, 1]})  # in the order 1, 2, 0, 3
    experts = [(f"model.layers.1.mlp.experts.{i}.up_proj.weight", torch.tensor(i)) for i in range(4)]
    router = ("model.layers.1.mlp.gate.weight", torch.arange(4))
    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", lambda *_: iter([*experts, router]))
    worker = Worker(prepares=True, reroutes=True)
    worker.sere_placement = Placement(**about, layers={1: layer})
    worker.reload_weights()
    assert [worker.reloaded[name].item() for name, _ in experts] == [1, 2, 0, 3]
    assert worker.reloaded[router[0]].tolist() == [1, 2, 0, 3]

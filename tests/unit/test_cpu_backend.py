"""What the CPU backend does around the compiled re-routing."""

from unittest import mock

import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.platforms.cpu import CpuPlatform

from sere_dist.config import ReroutingConfig
from sere_dist.method.rerouting import reroute
from sere_dist.method.slots import merge_repeats
from sere_dist.vllm_plugin.cpu_backend import CpuBackend
from sere_dist.vllm_plugin.rows import Rows
from tests.support.artifacts import small_artifact

WEIGHTS = torch.tensor([[0.4, 0.3, 0.3], [0.5, 0.3, 0.2]])
IDS = torch.tensor([[0, 2, 3], [1, 2, 3]], dtype=torch.int32)
CONFIG = ReroutingConfig(artifact="a", select_top_k=1)


def routed(valid: int = 2, merges: bool = False) -> tuple[CustomRoutingRouter, torch.Tensor]:
    """Returns a router whose choice is re-routed, and the similarity that it goes by."""
    artifact = small_artifact()
    layer = next(iter(artifact.layers))
    router = object.__new__(CustomRoutingRouter)
    rows = Rows(8)
    rows.valid[:valid] = True
    rows.count[:] = torch.tensor([2, valid])
    ours = CpuBackend(artifact, rows, CONFIG, None, merges=merges, shares_primary=False)
    with mock.patch.object(CustomRoutingRouter, "_compute_routing", lambda *_args, **_named: (WEIGHTS, IDS)):
        ours.attach(router, layer)
    ours.set_settings(artifact.settings_by_layer(CONFIG))
    return router, artifact.layers[layer].similarity_EE


def test_vllm_starts_beside_numba():
    """What a CPU worker does first, in a process that has started one before."""
    getattr(CpuPlatform, "register_triton_kernel_overrides", lambda: None)()  # vLLM 0.30 does not do this yet


@pytest.mark.parametrize("merges", [False, True])
def test_eager_and_compiled_code_get_the_same(merges):
    router, similarity_EE = routed(merges=merges)
    new_ids = reroute(WEIGHTS, IDS, similarity_EE, select_top_k=1)
    expected = merge_repeats(WEIGHTS, new_ids) if merges else (WEIGHTS, new_ids)
    for weights, ids in (
        router._compute_routing(None, None, None),
        torch.ops.sere_dist.reroute(WEIGHTS, IDS, router.sere_handle),
    ):
        assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])
    assert not torch.equal(new_ids, IDS)


def test_steps_without_a_valid_row_pass():
    """As they are in eager code; an op must return tensors of its own."""
    router, _ = routed(valid=0)
    assert all(a is b for a, b in zip(router._compute_routing(None, None, None), (WEIGHTS, IDS), strict=True))
    for mine, theirs in zip(torch.ops.sere_dist.reroute(WEIGHTS, IDS, router.sere_handle), (WEIGHTS, IDS), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()


def test_layers_share_compiled_code():
    """The handle is an input of the graph: one graph re-routes by whichever layer's tables it is given."""
    first, second = (routed(merges=merges)[0] for merges in (False, True))
    graph = torch.compile(
        lambda weights, ids, handle: torch.ops.sere_dist.reroute(weights, ids, handle), backend="eager"
    )
    by_first, by_second = (graph(WEIGHTS, IDS, router.sere_handle)[1] for router in (first, second))
    assert torch.equal(by_first, first._compute_routing(None, None, None)[1])
    assert torch.equal(by_second, second._compute_routing(None, None, None)[1])
    assert not torch.equal(by_first, by_second)


def test_rows_that_do_not_line_up_stop_the_step():
    router, _ = routed()
    with pytest.raises(RuntimeError, match="got 1 rows in a step of 2 tokens"):
        torch.ops.sere_dist.reroute(WEIGHTS[:1], IDS[:1], router.sere_handle)

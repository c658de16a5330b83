"""What the CPU backend does around the compiled re-routing."""

import pytest
import torch
from vllm.platforms.cpu import CpuPlatform

from sere_dist.method.rerouting import reroute
from sere_dist.method.slots import merge_repeats
from sere_dist.vllm_plugin.cpu_backend import CpuBackend
from tests.support.routers import IDS, WEIGHTS, rerouted_router


def test_vllm_starts_beside_numba():
    """What a CPU worker does first, in a process that has started one before."""
    getattr(CpuPlatform, "register_triton_kernel_overrides", lambda: None)()  # vLLM 0.30 does not do this yet


@pytest.mark.parametrize("merges", [False, True])
def test_eager_and_compiled_code_get_the_same(merges):
    router, similarity_EE = rerouted_router(CpuBackend, merges=merges)
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
    router, _ = rerouted_router(CpuBackend, valid=0)
    assert all(a is b for a, b in zip(router._compute_routing(None, None, None), (WEIGHTS, IDS), strict=True))
    for mine, theirs in zip(torch.ops.sere_dist.reroute(WEIGHTS, IDS, router.sere_handle), (WEIGHTS, IDS), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()


def test_layers_share_compiled_code():
    """The handle is an input of the graph: one graph re-routes by whichever layer's tables it is given."""
    first, second = (rerouted_router(CpuBackend, merges=merges)[0] for merges in (False, True))
    graph = torch.compile(
        lambda weights, ids, handle: torch.ops.sere_dist.reroute(weights, ids, handle), backend="eager"
    )
    by_first, by_second = (graph(WEIGHTS, IDS, router.sere_handle)[1] for router in (first, second))
    assert torch.equal(by_first, first._compute_routing(None, None, None)[1])
    assert torch.equal(by_second, second._compute_routing(None, None, None)[1])
    assert not torch.equal(by_first, by_second)


def test_rows_that_do_not_line_up_stop_the_step():
    router, _ = rerouted_router(CpuBackend)
    with pytest.raises(RuntimeError, match="got 1 rows in a step of 2 tokens"):
        torch.ops.sere_dist.reroute(WEIGHTS[:1], IDS[:1], router.sere_handle)

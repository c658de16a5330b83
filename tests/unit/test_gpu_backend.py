"""What the GPU backend does around the kernel, with the kernel's build for this CPU."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from vllm import forward_context

from sere_dist.kernels import reroute as kernel
from sere_dist.method.records import Step
from sere_dist.method.rerouting import reroute
from sere_dist.method.slots import merge_repeats
from sere_dist.testing.random_steps import RandomStep
from sere_dist.vllm_plugin import backend, gpu_backend
from tests.support.routers import CONFIG, IDS, WEIGHTS, rerouted_router


@pytest.fixture
def on_host(host_kernels, monkeypatch):
    monkeypatch.setattr(kernel, "kernels_for", host_kernels.kernels_for)


@pytest.mark.parametrize("merges", [False, True])
def test_a_router_returns_what_the_kernel_made_of_its_choice(on_host, merges):
    router, similarity_EE = rerouted_router(gpu_backend.GpuBackend, merges=merges)
    before = WEIGHTS.clone(), IDS.clone()
    weights, ids = router._compute_routing(None, None, None)
    new_ids = reroute(WEIGHTS, IDS, similarity_EE, select_top_k=1)
    expected = merge_repeats(WEIGHTS, new_ids) if merges else (WEIGHTS, new_ids)
    assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])
    assert not torch.equal(ids, IDS)
    assert torch.equal(WEIGHTS, before[0]) and torch.equal(IDS, before[1]), "tensors that the model holds were changed"


def test_rows_that_do_not_line_up_stop_the_step(on_host):
    router, _ = rerouted_router(gpu_backend.GpuBackend)
    for padding, fits in ((2, True), (3, False), (1, False)):
        context = SimpleNamespace(is_padding=torch.zeros(padding, dtype=torch.bool))
        with mock.patch.object(forward_context, "_forward_context", context):
            if fits:
                router._compute_routing(None, None, None)
                continue
            with pytest.raises(RuntimeError, match=f"got 2 rows in a step of {padding}"):
                router._compute_routing(None, None, None)


@pytest.mark.parametrize(
    "communicator",
    [None, SimpleNamespace(pynccl_comm=None), SimpleNamespace(pynccl_comm=SimpleNamespace(disabled=True))],
)
def test_a_shared_primary_set_needs_nccl(monkeypatch, communicator):
    monkeypatch.setattr(gpu_backend, "get_dp_group", lambda: SimpleNamespace(device_communicator=communicator))
    with pytest.raises(ValueError, match="unset VLLM_DISABLE_PYNCCL, or set primary_scope: rank"):
        gpu_backend.losses_all_reduce()


@pytest.mark.parametrize(
    ("scope", "data_parallel", "shares"),
    [("group", 1, False), ("group", 2, True), ("rank", 2, False)],
)
def test_only_ranks_with_other_tokens_share_a_primary_set(scope, data_parallel, shares):
    """Ranks of tensor parallelism have the same tokens: their losses would count twice."""
    parallel = SimpleNamespace(data_parallel_size=data_parallel, tensor_parallel_size=2)
    config = CONFIG.model_copy(update={"primary_scope": scope})
    assert backend.shares_primary(config, parallel) == shares


def test_votes_of_a_step_that_failed_do_not_count_in_the_next(on_host):
    step = RandomStep(seed=3, rows=16, top_k=4, experts=60, select_top_k=1, projection=False, elsewhere_share=0.0)
    layer = step.layer("cpu")

    def fail(_losses_E):
        raise ConnectionError("a rank is gone")

    with pytest.raises(ConnectionError):
        layer.reroute(Step(step.weights_TK.clone(), step.ids_TK.clone(), step.valid_T), fail)
    assert not layer.workspace.any()

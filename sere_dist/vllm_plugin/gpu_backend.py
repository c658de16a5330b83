"""Re-routing on a GPU, by the kernel of `sere_dist.kernels`.

The router runs inside vLLM's own opaque `moe_forward` op. Python runs at capture alone, and what may change afterwards
lies in device memory that the kernel reads.
"""

import torch
import torch.distributed as dist
from vllm.distributed.parallel_state import get_dp_group
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter

from sere_dist.config import ReroutingConfig
from sere_dist.kernels.reroute import DeviceSettings, LayerKernel
from sere_dist.method.records import ExpertPlaces, LayerTables, Step
from sere_dist.vllm_plugin.backend import AllReduce, Backend, replace_choice
from sere_dist.vllm_plugin.rows import Rows


def losses_all_reduce() -> AllReduce:
    """Returns what adds up, in place, the losses of all data-parallel ranks: int64 [E]. All of them must call it.

    It runs on the current stream, so that it can be captured.

    Raises:
        ValueError: vLLM has no NCCL communicator for it.
    """
    communicator = getattr(get_dp_group().device_communicator, "pynccl_comm", None)
    if communicator is None or communicator.disabled:
        raise ValueError(
            "primary_scope: group needs vLLM's NCCL communicator, which is switched off or did not find NCCL: unset "
            "VLLM_DISABLE_PYNCCL, or set primary_scope: rank"
        )
    return lambda losses_E: communicator.all_reduce(losses_E, losses_E, op=dist.ReduceOp.SUM)


def check_rows(num_rows: int, rows: Rows) -> None:
    """Raises RuntimeError if a router got other rows than the step has: their masks would not line up.

    Where a graph replays, this was checked when it was captured.
    """
    padding = get_forward_context().is_padding if is_forward_context_available() else None
    expected = len(rows.valid) if padding is None else len(padding)
    if num_rows > expected or (padding is not None and num_rows != expected):
        raise RuntimeError(
            f"the router got {num_rows} rows in a step of {expected}, padding included: their re-routing masks do not "
            "line up"
        )


class GpuBackend(Backend[LayerKernel]):
    """A kernel for every layer, with settings of its own."""

    def losses_all_reduce(self) -> AllReduce:
        return losses_all_reduce()

    def new_layer(self, tables: LayerTables, places: ExpertPlaces, merges: bool) -> LayerKernel:
        return LayerKernel(tables, DeviceSettings(self.rows.valid.device), places, merges=merges)

    def set_settings(self, settings: dict[int, ReroutingConfig]) -> None:
        for layer, own in settings.items():
            kernel = self.layers[layer]
            kernel.settings.set(own.numbers, enabled=own.enabled, min_rows=own.min_rows, max_rows=own.max_rows)
            kernel.set_threshold(own.threshold)

    def attach(self, router: BaseRouter, layer: int) -> torch.Tensor:
        rows, kernel = self.rows, self.layers[layer]
        # It hands out tensors that the model holds (vLLM's backend for Transformers), which must not change.
        borrows = isinstance(router, CustomRoutingRouter)

        def rerouted(_router, weights, ids):
            check_rows(len(ids), rows)
            weights, ids = (each.clone() if borrows else each.contiguous() for each in (weights, ids))
            kernel.reroute(Step(weights, ids, rows.valid, self.home, rows.chance, rows.runs), self.all_reduce)
            return weights, ids

        replace_choice(router, rerouted)
        return kernel.counters

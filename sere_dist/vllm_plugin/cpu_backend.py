"""Re-routing on a CPU, by the compiled functions of `kernels.reroute_cpu`.

On a CPU `torch.compile` traces straight through vLLM's router, and anything that Python looked at there would be baked
in. So re-routing is one registered custom op. The layers' code is compiled once for all of them: what tells them apart
is a tensor, the layer's `handle`, by which the op finds its tables, settings and counters.
"""

from collections.abc import Callable
from typing import cast

import llvmlite.binding
import torch
import torch.distributed as dist
from vllm.distributed.parallel_state import get_dp_group
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.utils.torch_utils import direct_register_custom_op

from sere_dist.config import ReroutingConfig
from sere_dist.kernels.reroute_cpu import CpuLayer
from sere_dist.method.records import ExpertPlaces, LayerTables, Step
from sere_dist.vllm_plugin.backend import AllReduce, Backend, replace_choice

Routed = tuple[torch.Tensor, torch.Tensor]  # weights [T, K] and ids [T, K]

# When a CPU worker starts, vLLM looks for its kernels among the attributes of all that any module holds. The library of
# Numba makes a function of every name that it is asked for, `__dict__` too, which stops vLLM. So it gets an empty one.
llvmlite.binding.ffi.lib._fntab.setdefault("__dict__", {})

_library = torch.library.Library("sere_dist", "DEF")
_attached: list[Callable[[torch.Tensor, torch.Tensor], Routed]] = []  # what re-routes a layer, by its handle


def _reroute(topk_weights: torch.Tensor, topk_ids: torch.Tensor, handle: torch.Tensor) -> Routed:
    weights, ids = _attached[int(handle)](topk_weights, topk_ids)
    # An op must not return what it was given.
    return (topk_weights.clone(), topk_ids.clone()) if ids is topk_ids else (weights, ids)


direct_register_custom_op(
    "reroute",
    _reroute,
    fake_impl=lambda weights, ids, _handle: (torch.empty_like(weights), torch.empty_like(ids)),
    target_lib=_library,
)


def all_reduce_losses(losses_E: torch.Tensor) -> None:
    """Adds up, in place, the losses of all data-parallel ranks: int64 [E]. All of them must call it."""
    dist.all_reduce(losses_E, op=dist.ReduceOp.SUM, group=get_dp_group().cpu_group)


class ReroutedRouter(BaseRouter):
    """What vLLM's routers are once they have been attached.

    `sere_handle` is a plain tensor attribute, which torch.compile takes as an input of the graph.
    """

    sere_handle: torch.Tensor


class CpuBackend(Backend[CpuLayer]):
    """A `CpuLayer` for every layer, behind the custom op `sere_dist::reroute`."""

    def losses_all_reduce(self) -> AllReduce:
        return all_reduce_losses

    def new_layer(self, tables: LayerTables, places: ExpertPlaces, merges: bool) -> CpuLayer:
        return CpuLayer(tables, places, merges=merges)

    def set_settings(self, settings: dict[int, ReroutingConfig]) -> None:
        for layer, own in settings.items():
            self.layers[layer].set(own.numbers, enabled=own.enabled, min_rows=own.min_rows, max_rows=own.max_rows)

    def attach(self, router: BaseRouter, layer: int) -> torch.Tensor:
        kernel = self.layers[layer]
        cast(ReroutedRouter, router).sere_handle = torch.tensor(len(_attached))
        _attached.append(lambda weights, ids: self.reroute(kernel, weights, ids))

        def rerouted(router, weights, ids):
            if torch.compiler.is_compiling():
                return torch.ops.sere_dist.reroute(weights, ids, router.sere_handle)
            # Eager code saves itself the way through the dispatcher.
            return self.reroute(kernel, weights, ids)

        replace_choice(router, rerouted)
        return kernel.counters

    def reroute(self, kernel: CpuLayer, weights: torch.Tensor, ids: torch.Tensor) -> Routed:
        """Returns what becomes of a router's choice; the same tensors where no row of the step is valid."""
        rows, num_valid = self.rows.count.numpy()
        if num_valid and rows != len(ids):
            raise RuntimeError(
                f"the router got {len(ids)} rows in a step of {rows} tokens: their re-routing masks do not line up"
            )
        if not num_valid and self.all_reduce is None:  # a profiling or dummy run, or a step of prefill only
            return weights, ids
        step = Step(weights, ids, self.rows.valid, self.home, self.rows.chance, self.rows.runs)
        return kernel.reroute(step, self.all_reduce)

"""How a router's choice is replaced: by `kernels.reroute_cpu` on a CPU, by the CUDA kernel on a GPU; one interface.

On a CPU `torch.compile` traces straight through vLLM's router, and anything that Python looked at there would be baked
in. So re-routing is a registered custom op there, whose every input is a tensor: what may change between steps lies in
tensors that the op reads. On a GPU the router runs inside vLLM's own opaque `moe_forward` op; Python runs at capture
alone, and what may change lies in device memory that the kernel reads.
"""

import functools
import types
from collections.abc import Callable
from typing import Protocol

import torch
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.utils.torch_utils import direct_register_custom_op

from sere_dist.artifact import Artifact
from sere_dist.config import ReroutingConfig
from sere_dist.kernels.reroute_cpu import reroute_step
from sere_dist.rerouting import COUNTERS, ranked_neighbors
from sere_dist.vllm_plugin.rows import Rows


class Backend(Protocol):
    """Re-routes the layers of one worker."""

    def set_policy(self, settings: ReroutingConfig) -> None:
        """Takes effect in the next step."""

    def attach(self, router: BaseRouter, layer: int) -> torch.Tensor:
        """Makes a router return re-routed ids from now on. Returns its counters, int64 [len(COUNTERS)]."""


_library = torch.library.Library("sere_dist", "DEF")


def _reroute_step(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    neighbors: torch.Tensor,
    ranked_similarity: torch.Tensor,
    policy: torch.Tensor,
    valid_rows: torch.Tensor,
    num_rows: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """Re-routes one layer of one step; see `CpuBackend` for the arguments. Returns the ids, the same if none is new."""
    rows, num_valid = num_rows.numpy()
    if num_valid == 0:  # a profiling or dummy run, or a step of prefill only
        return topk_ids
    if rows != len(topk_ids):
        raise RuntimeError(
            f"the router got {len(topk_ids)} rows in a step of {rows} tokens: their re-routing masks do not line up"
        )
    select_top_k, threshold, min_rows, max_rows = policy.numpy()
    return reroute_step(
        topk_weights,
        topk_ids,
        neighbors,
        ranked_similarity,
        counters,
        select_top_k=int(select_top_k) if min_rows <= num_valid <= max_rows else 0,
        threshold=threshold,
        valid_T=valid_rows[:rows] if num_valid < rows else None,
    )


@functools.wraps(_reroute_step)
def _reroute_op(topk_weights, topk_ids, *state):
    ids = _reroute_step(topk_weights, topk_ids, *state)
    return ids.clone() if ids is topk_ids else ids  # an op must not return what it was given


def _reroute_fake(topk_weights, topk_ids, *_state) -> torch.Tensor:
    return torch.empty_like(topk_ids)


direct_register_custom_op(
    "reroute", _reroute_op, mutates_args=["counters"], fake_impl=_reroute_fake, target_lib=_library
)


def replace_choice(
    router: BaseRouter, replace: Callable[[BaseRouter, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Makes a router return what `replace` makes of the weights and ids that it chose."""
    compute_routing = type(router)._compute_routing

    def replaced(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        weights, ids = compute_routing(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
        return replace(self, weights, ids)

    router._compute_routing = types.MethodType(replaced, router)


class CpuBackend:
    """`kernels.reroute_cpu`, on a CPU.

    Attributes:
        policy: float64 [4]: S (0 when switched off), rho, least and most valid rows of a step that is re-routed.
    """

    def __init__(self, artifact: Artifact, rows: Rows):
        self.artifact, self.rows = artifact, rows
        self.policy = torch.zeros(4, dtype=torch.float64)

    def set_policy(self, settings: ReroutingConfig) -> None:
        select_top_k = settings.select_top_k if settings.enabled else 0
        most = torch.inf if settings.max_rows is None else settings.max_rows
        self.policy.copy_(torch.tensor([select_top_k, settings.threshold, settings.min_rows, most]))

    def attach(self, router: BaseRouter, layer: int) -> torch.Tensor:
        counters = torch.zeros(len(COUNTERS), dtype=torch.int64)
        # Plain tensor attributes: torch.compile takes them as inputs of the graph, whichever layer it compiles.
        router.sere_neighbors, router.sere_similarity = ranked_neighbors(self.artifact.similarity[layer])
        router.sere_policy, router.sere_counters = self.policy, counters
        router.sere_valid_rows, router.sere_num_rows = self.rows.valid, self.rows.count

        def rerouted(router, weights, ids):
            # Eager code saves itself the way through the dispatcher: a hundredth of a decode step of one request.
            reroute = torch.ops.sere_dist.reroute if torch.compiler.is_compiling() else _reroute_step
            ids = reroute(
                weights,
                ids,
                router.sere_neighbors,
                router.sere_similarity,
                router.sere_policy,
                router.sere_valid_rows,
                router.sere_num_rows,
                router.sere_counters,
            )
            return weights, ids

        replace_choice(router, rerouted)
        return counters


class KernelBackend:
    """The kernel of `sere_dist.kernels`, on a GPU."""

    def __init__(self, artifact: Artifact, rows: Rows):
        from sere_dist.kernels.reroute import Layer, Policy  # brings cuda.core, which no worker on a CPU needs

        self.rows = rows
        self.policy = Policy(rows.valid.device)
        self.layers = {layer: Layer(similarity, self.policy) for layer, similarity in artifact.similarity.items()}

    def set_policy(self, settings: ReroutingConfig) -> None:
        self.policy.set(
            select_top_k=settings.select_top_k,
            enabled=settings.enabled,
            min_rows=settings.min_rows,
            max_rows=settings.max_rows,
        )
        for layer in self.layers.values():
            layer.set_threshold(settings.threshold)

    def attach(self, router: BaseRouter, layer: int) -> torch.Tensor:
        rows, kernel = self.rows, self.layers[layer]

        def rerouted(_router, weights, ids):
            if len(ids) > len(rows.valid):
                raise RuntimeError(
                    f"the router got {len(ids)} rows, a step has {len(rows.valid)} at most: not the batch's rows"
                )
            weights, ids = weights.contiguous(), ids.contiguous()
            kernel.reroute(weights, ids, rows.valid)
            return weights, ids

        replace_choice(router, rerouted)
        return kernel.counters

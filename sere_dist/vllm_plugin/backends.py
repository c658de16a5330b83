"""How a router's choice is replaced: on a CPU by numpy or torch, on a GPU by the CUDA kernel; one interface.

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
import torch.distributed as dist
from vllm.distributed.parallel_state import get_ep_group
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.utils.torch_utils import direct_register_custom_op

from sere_dist.artifact.folder import Artifact
from sere_dist.config import ReroutingConfig
from sere_dist.kernels.reroute_numpy import reroute_step
from sere_dist.method.rerouting import (
    COUNTERS,
    primary_votes,
    ranked_neighbors,
    repeat_dropped,
    reroute,
    reroute_projection,
    step_counts,
    to_fixed_point,
)
from sere_dist.vllm_plugin.expert_map import ExpertMap
from sere_dist.vllm_plugin.rows import Rows


class Backend(Protocol):
    """Re-routes the layers of one worker."""

    def __init__(self, artifact: Artifact, rows: Rows, settings: ReroutingConfig, owners: ExpertMap | None):
        """`owners` says where experts live; None: one rank holds all of them."""

    def set_policy(self, settings: dict[int, ReroutingConfig]) -> None:
        """Sets the policy of every layer (`Artifact.settings_by_layer`), from the next step on."""

    def attach(self, router: BaseRouter, layer: int) -> torch.Tensor:
        """Makes a router return re-routed weights and ids from now on.

        Returns its counters, int64 [len(COUNTERS)], and behind them the active experts of each rank, if there are more
        than one.
        """


def is_projection(artifact: Artifact, settings: ReroutingConfig) -> bool:
    """Says whether layers follow policy projection; they all do, or none."""
    return next(iter(artifact.settings_by_layer(settings).values())).policy == "projection"


def replace_choice(
    router: BaseRouter, replace: Callable[[BaseRouter, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Makes a router return what `replace` makes of the weights and ids that it chose."""
    compute_routing = type(router)._compute_routing

    def replaced(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        weights, ids = compute_routing(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
        return replace(self, weights, ids)

    router._compute_routing = types.MethodType(replaced, router)


def all_reduce_losses(votes_E: torch.Tensor) -> None:
    """Adds up, in place, the votes of all ranks of the expert-parallel group: int64 [E]. All of them must come here."""
    group = get_ep_group()
    if votes_E.is_cuda:  # on the current stream, so that it can be captured
        group.device_communicator.pynccl_comm.all_reduce(votes_E, votes_E, op=dist.ReduceOp.SUM)
    else:
        dist.all_reduce(votes_E, op=dist.ReduceOp.SUM, group=group.cpu_group)


def homes(rows: Rows, owners: ExpertMap | None) -> torch.Tensor | None:
    """Returns the home of every row, int32 [most tokens of a step]; None: no row has one."""
    if owners is None or owners.home is None:
        return None
    return torch.full_like(rows.valid, owners.home, dtype=torch.int32)


_library = torch.library.Library("sere_dist", "DEF")


def _check_rows(rows: int, topk_ids: torch.Tensor) -> None:
    if rows != len(topk_ids):
        raise RuntimeError(
            f"the router got {len(topk_ids)} rows in a step of {rows} tokens: their re-routing masks do not line up"
        )


def _reroute_fast(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    neighbors: torch.Tensor,
    ranked_similarity: torch.Tensor,
    policy: torch.Tensor,
    valid_rows: torch.Tensor,
    num_rows: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """The paper's policy on one rank; see `CpuBackend` for the arguments. Returns the ids, the same if none is new."""
    rows, num_valid = num_rows.numpy()
    if num_valid == 0:  # a profiling or dummy run, or a step of prefill only
        return topk_ids
    _check_rows(rows, topk_ids)
    select_top_k, threshold, min_rows, max_rows, *_ = policy.numpy()
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


@functools.wraps(_reroute_fast)
def _reroute_fast_op(topk_weights, topk_ids, *state):
    ids = _reroute_fast(topk_weights, topk_ids, *state)
    return ids.clone() if ids is topk_ids else ids  # an op must not return what it was given


direct_register_custom_op(
    "reroute_fast",
    _reroute_fast_op,
    mutates_args=["counters"],
    fake_impl=lambda _weights, ids, *_state: torch.empty_like(ids),
    target_lib=_library,
)


def _reroute_any(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    similarity: torch.Tensor,
    coefficient: torch.Tensor | None,
    size: torch.Tensor | None,
    rank: torch.Tensor | None,
    domain: torch.Tensor | None,
    home: torch.Tensor | None,
    policy: torch.Tensor,
    valid_rows: torch.Tensor,
    num_rows: torch.Tensor,
    counters: torch.Tensor,
    shares_primary: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Any policy on any number of ranks; see `CpuBackend` for the arguments."""
    rows, num_valid = num_rows.tolist()
    if num_valid == 0 and not shares_primary:
        return topk_weights.clone(), topk_ids.clone()
    select_top_k, threshold, min_rows, max_rows, expert_price, traffic_price = policy.tolist()
    num_experts, valid = len(similarity), valid_rows[: len(topk_ids)]
    settings = {"select_top_k": int(select_top_k), "valid_T": valid}
    priced = {"expert_price": expert_price, "size_E": size}
    votes = primary_votes(topk_weights, topk_ids, num_experts, **priced, **settings)
    if shares_primary:
        all_reduce_losses(votes)  # in every step: the other ranks wait
    if num_valid == 0:
        return topk_weights.clone(), topk_ids.clone()
    _check_rows(rows, topk_ids)
    if not min_rows <= num_valid <= max_rows:
        settings["select_top_k"] = 0
    settings["primary_E"] = votes >= to_fixed_point(expert_price)
    homes = None if home is None else home[:rows]
    weights = topk_weights
    if coefficient is None:
        ids = reroute(topk_weights, topk_ids, similarity, threshold=threshold, **settings)
    else:
        tables = (similarity, coefficient, size)
        traffic = {"traffic_price": traffic_price, "domain_E": domain, "home_T": homes}
        weights, ids = reroute_projection(topk_weights, topk_ids, *tables, threshold=threshold, **traffic, **settings)
    places = {"rank_E": rank, "num_ranks": len(counters) - len(COUNTERS), "domain_E": domain, "home_T": homes}
    counters += step_counts(topk_weights, topk_ids, ids, num_experts=num_experts, **places, **settings)
    return weights.clone(), repeat_dropped(topk_weights, topk_ids, ids)


direct_register_custom_op(
    "reroute_any",
    _reroute_any,
    mutates_args=["counters"],
    fake_impl=lambda weights, ids, *_state: (torch.empty_like(weights), torch.empty_like(ids)),
    target_lib=_library,
)


class CpuBackend:
    """On a CPU: `kernels.reroute_cpu` for the paper's policy on one rank, otherwise the functions of `rerouting`.

    Attributes:
        policies: of each layer float64 [6]: S (0 when switched off), rho, least and most valid rows of a step that is
            re-routed, and the prices of an expert and of a domain.
    """

    def __init__(self, artifact: Artifact, rows: Rows, settings: ReroutingConfig, owners: ExpertMap | None):
        self.artifact, self.rows, self.settings, self.owners = artifact, rows, settings, owners
        self.home = homes(rows, owners)
        self.is_projection = is_projection(artifact, settings)
        self.policies = {layer: torch.zeros(6, dtype=torch.float64) for layer in artifact.similarity}

    def set_policy(self, settings: dict[int, ReroutingConfig]) -> None:
        for layer, own in settings.items():
            select_top_k = own.select_top_k if own.enabled else 0
            most = torch.inf if own.max_rows is None else own.max_rows
            numbers = [select_top_k, own.threshold, own.min_rows, most, own.expert_price, own.traffic_price]
            self.policies[layer].copy_(torch.tensor(numbers, dtype=torch.float64))

    def attach(self, router: BaseRouter, layer: int) -> torch.Tensor:
        # Plain tensor attributes: torch.compile takes them as inputs of the graph, whichever layer it compiles.
        router.sere_settings = self.policies[layer]
        router.sere_valid_rows, router.sere_num_rows = self.rows.valid, self.rows.count
        if self.owners is None and not self.is_projection:
            self._attach_fast(router, layer)
        else:
            self._attach_any(router, layer)
        return router.sere_counters

    def _attach_fast(self, router: BaseRouter, layer: int) -> None:
        router.sere_neighbors, router.sere_similarity = ranked_neighbors(self.artifact.similarity[layer])
        router.sere_counters = torch.zeros(len(COUNTERS), dtype=torch.int64)

        def rerouted(router, weights, ids):
            # Eager code saves itself the way through the dispatcher: a hundredth of a decode step of one request.
            reroute = torch.ops.sere_dist.reroute_fast if torch.compiler.is_compiling() else _reroute_fast
            ids = reroute(
                weights,
                ids,
                router.sere_neighbors,
                router.sere_similarity,
                router.sere_settings,
                router.sere_valid_rows,
                router.sere_num_rows,
                router.sere_counters,
            )
            return weights, ids

        replace_choice(router, rerouted)

    def _attach_any(self, router: BaseRouter, layer: int) -> None:
        router.sere_similarity = self.artifact.similarity[layer]
        router.sere_coefficient = self.artifact.coefficient[layer] if self.is_projection else None
        router.sere_size = self.artifact.size[layer] if self.is_projection else None
        router.sere_rank = router.sere_domain = None
        num_ranks = 0
        if self.owners is not None:
            router.sere_rank, router.sere_domain = self.owners.rank[layer], self.owners.domain[layer]
            num_ranks = self.owners.num_ranks
        router.sere_home = self.home
        router.sere_counters = torch.zeros(len(COUNTERS) + num_ranks, dtype=torch.int64)
        shares_primary = self.settings.primary_scope == "group"

        def rerouted(router, weights, ids):
            return torch.ops.sere_dist.reroute_any(
                weights,
                ids,
                router.sere_similarity,
                router.sere_coefficient,
                router.sere_size,
                router.sere_rank,
                router.sere_domain,
                router.sere_home,
                router.sere_settings,
                router.sere_valid_rows,
                router.sere_num_rows,
                router.sere_counters,
                shares_primary,
            )

        replace_choice(router, rerouted)


class KernelBackend:
    """The kernel of `sere_dist.kernels`, on a GPU."""

    def __init__(self, artifact: Artifact, rows: Rows, settings: ReroutingConfig, owners: ExpertMap | None):
        from sere_dist.kernels.reroute import Layer, Policy  # brings cuda.core, which no worker on a CPU needs

        self.rows = rows
        self.home = homes(rows, owners)
        self.unite = all_reduce_losses if settings.primary_scope == "group" else None
        self.policies, self.layers, priced = {}, {}, is_projection(artifact, settings)
        for layer, similarity in artifact.similarity.items():
            tables = {}
            if priced:
                tables |= {"coefficient_EE": artifact.coefficient[layer], "size_E": artifact.size[layer]}
            if owners is not None:
                tables |= {"rank_E": owners.rank[layer], "domain_E": owners.domain[layer]}
                tables |= {"num_ranks": owners.num_ranks}
            self.policies[layer] = Policy(rows.valid.device)
            self.layers[layer] = Layer(similarity, self.policies[layer], repeats_dropped=True, **tables)

    def set_policy(self, settings: dict[int, ReroutingConfig]) -> None:
        for layer, own in settings.items():
            self.policies[layer].set(
                select_top_k=own.select_top_k,
                enabled=own.enabled,
                min_rows=own.min_rows,
                max_rows=own.max_rows,
                expert_price=own.expert_price,
                traffic_price=own.traffic_price,
            )
            self.layers[layer].set_threshold(own.threshold)

    def attach(self, router: BaseRouter, layer: int) -> torch.Tensor:
        rows, kernel = self.rows, self.layers[layer]

        def rerouted(_router, weights, ids):
            if len(ids) > len(rows.valid):
                raise RuntimeError(
                    f"the router got {len(ids)} rows, a step has {len(rows.valid)} at most: not the batch's rows"
                )
            weights, ids = weights.contiguous(), ids.contiguous()
            kernel.reroute(weights, ids, rows.valid, self.home, unite=self.unite)
            return weights, ids

        replace_choice(router, rerouted)
        return kernel.counters

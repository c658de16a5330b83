"""Re-routing on a CPU: numpy for the paper's policy on one rank, otherwise the functions of `sere_dist.method`.

On a CPU `torch.compile` traces straight through vLLM's router, and anything that Python looked at there would be baked
in. So re-routing is a registered custom op, whose every input is a tensor: what may change between steps lies in
tensors that the op reads.
"""

import functools
from typing import cast

import torch
import torch.distributed as dist
from vllm.distributed.parallel_state import get_dp_group
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.utils.torch_utils import direct_register_custom_op

from sere_dist.artifact.folder import Artifact
from sere_dist.config import ReroutingConfig
from sere_dist.kernels.neighbors import ranked_neighbors
from sere_dist.kernels.reroute_numpy import reroute_step
from sere_dist.method.counters import COUNTERS, count_step
from sere_dist.method.projection import primary_losses, reroute_projection, to_fixed_point
from sere_dist.method.records import ExpertPlaces, LayerTables, Settings, Step
from sere_dist.method.rerouting import replace_experts, substitutes
from sere_dist.method.slots import fill_dropped, merge_repeats
from sere_dist.vllm_plugin.backend import homes_of, places_of, replace_choice
from sere_dist.vllm_plugin.expert_map import ExpertMap
from sere_dist.vllm_plugin.rows import Rows

_library = torch.library.Library("sere_dist", "DEF")

# Of one layer, as a tensor that the ops read: S (0 when switched off), rho, the prices of an expert and of a domain,
# and the least and most valid rows of a step that is re-routed.
SETTINGS = ("select_top_k", "threshold", "expert_price", "traffic_price", "min_rows", "max_rows")


def settings_tensor(config: ReroutingConfig) -> torch.Tensor:
    """Returns float64 [len(SETTINGS)]."""
    numbers = config.numbers if config.enabled else config.numbers._replace(select_top_k=0)
    most = torch.inf if config.max_rows is None else config.max_rows
    return torch.tensor([*numbers, config.min_rows, most], dtype=torch.float64)


def settings_in_force(settings: torch.Tensor, num_valid: int) -> Settings:
    """Returns the settings of a step with so many valid rows: S is 0 where these are too few or too many."""
    select_top_k, threshold, expert_price, traffic_price, min_rows, max_rows = settings.tolist()
    is_on = min_rows <= num_valid <= max_rows
    return Settings(int(select_top_k) if is_on else 0, threshold, expert_price, traffic_price)


def all_reduce_losses(losses_E: torch.Tensor) -> None:
    """Adds up, in place, the losses of all data-parallel ranks: int64 [E]. All of them must call it."""
    dist.all_reduce(losses_E, op=dist.ReduceOp.SUM, group=get_dp_group().cpu_group)


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
    settings: torch.Tensor,
    valid_rows: torch.Tensor,
    num_rows: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """The paper's policy on one rank; see `CpuBackend` for the arguments. Returns the ids, the same if none is new."""
    rows, num_valid = num_rows.numpy()
    if num_valid == 0:  # a profiling or dummy run, or a step of prefill only
        return topk_ids
    _check_rows(rows, topk_ids)
    step = Step(topk_weights, topk_ids, valid_rows[:rows] if num_valid < rows else None)
    return reroute_step(step, (neighbors, ranked_similarity), settings_in_force(settings, num_valid), counters)


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
    settings: torch.Tensor,
    valid_rows: torch.Tensor,
    num_rows: torch.Tensor,
    counters: torch.Tensor,
    shares_primary: bool,
    merges: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Any policy on any number of ranks; see `CpuBackend` for the arguments."""
    rows, num_valid = num_rows.tolist()
    if num_valid == 0 and not shares_primary:
        return topk_weights.clone(), topk_ids.clone()
    step = Step(topk_weights, topk_ids, valid_rows[: len(topk_ids)], None if home is None else home[:rows])
    tables = LayerTables(similarity, coefficient, size)
    places = ExpertPlaces(rank, len(counters) - len(COUNTERS), domain)
    in_force = settings_in_force(settings, num_valid)
    # What the other ranks hear does not depend on this rank's gates.
    offered = in_force._replace(select_top_k=int(settings[0]))
    losses_E = primary_losses(step, tables, offered)
    if shares_primary:
        all_reduce_losses(losses_E)  # in every step: the other ranks wait
    if num_valid == 0:
        return topk_weights.clone(), topk_ids.clone()
    _check_rows(rows, topk_ids)
    is_on = 0 < in_force.select_top_k < topk_ids.shape[1]
    primary_E = (losses_E >= to_fixed_point(in_force.expert_price)) & is_on
    if coefficient is None:
        weights = topk_weights
        ids = replace_experts(topk_ids, substitutes(similarity, primary_E, in_force.threshold), step.valid_T)
    else:
        weights, ids = reroute_projection(step, tables, in_force, places, primary_E)
    if not merges:
        counters += count_step(step, ids, primary_E, places)
        return weights.clone(), fill_dropped(step, ids)
    merged_weights, merged_ids = merge_repeats(weights, ids, step.valid_T) if primary_E.any() else (weights, ids)
    counters += count_step(step, ids, primary_E, places, merged_ids)
    return merged_weights.clone(), merged_ids


direct_register_custom_op(
    "reroute_any",
    _reroute_any,
    mutates_args=["counters"],
    fake_impl=lambda weights, ids, *_state: (torch.empty_like(weights), torch.empty_like(ids)),
    target_lib=_library,
)


class ReroutedRouter(BaseRouter):
    """What vLLM's routers are once they have been attached: with what their op reads, and counts in.

    Plain tensor attributes: torch.compile takes them as inputs of the graph, whichever layer it compiles.
    """

    sere_settings: torch.Tensor
    sere_valid_rows: torch.Tensor
    sere_num_rows: torch.Tensor
    sere_counters: torch.Tensor
    sere_similarity: torch.Tensor
    # Of the op `reroute_fast`:
    sere_neighbors: torch.Tensor
    # Of the op `reroute_any`:
    sere_coefficient: torch.Tensor | None
    sere_size: torch.Tensor | None
    sere_rank: torch.Tensor | None
    sere_domain: torch.Tensor | None
    sere_home: torch.Tensor | None


class CpuBackend:
    """The op `reroute_fast` for the paper's policy on one rank without merging, otherwise the op `reroute_any`.

    Attributes:
        settings: by layer, float64 [len(SETTINGS)].
    """

    def __init__(
        self,
        artifact: Artifact,
        rows: Rows,
        config: ReroutingConfig,
        expert_map: ExpertMap | None,
        *,
        merges: bool,
        shares_primary: bool,
    ):
        self.artifact, self.rows, self.expert_map = artifact, rows, expert_map
        self.merges, self.shares_primary = merges, shares_primary
        self.home = homes_of(rows, expert_map)
        self.is_projection = artifact.policy(config) == "projection"
        self.settings = {layer: torch.zeros(len(SETTINGS), dtype=torch.float64) for layer in artifact.layers}

    def set_settings(self, settings: dict[int, ReroutingConfig]) -> None:
        for layer, own in settings.items():
            self.settings[layer].copy_(settings_tensor(own))

    def attach(self, router: BaseRouter, layer: int) -> torch.Tensor:
        rerouted = cast(ReroutedRouter, router)
        rerouted.sere_settings = self.settings[layer]
        rerouted.sere_valid_rows, rerouted.sere_num_rows = self.rows.valid, self.rows.count
        if self.expert_map is None and not self.is_projection and not self.merges:
            self._attach_fast(rerouted, layer)
        else:
            self._attach_any(rerouted, layer)
        return rerouted.sere_counters

    def _attach_fast(self, router: ReroutedRouter, layer: int) -> None:
        router.sere_neighbors, router.sere_similarity = ranked_neighbors(self.artifact.layers[layer].similarity_EE)
        router.sere_counters = torch.zeros(len(COUNTERS), dtype=torch.int64)

        def rerouted(router, weights, ids):
            # Eager code saves itself the way through the dispatcher: a hundredth of a decode step of one request.
            op = torch.ops.sere_dist.reroute_fast if torch.compiler.is_compiling() else _reroute_fast
            ids = op(
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

    def _attach_any(self, router: ReroutedRouter, layer: int) -> None:
        tables, places = self.artifact.layers[layer].tables, places_of(self.expert_map, layer)
        router.sere_similarity = tables.similarity_EE
        router.sere_coefficient = tables.coefficient_EE if self.is_projection else None
        router.sere_size = tables.size_E if self.is_projection else None
        router.sere_rank, router.sere_domain, router.sere_home = places.rank_E, places.domain_E, self.home
        router.sere_counters = torch.zeros(len(COUNTERS) + places.num_ranks, dtype=torch.int64)
        shares_primary, merges = self.shares_primary, self.merges

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
                merges,
            )

        replace_choice(router, rerouted)

"""How a router's choice is replaced: what both backends share.

`cpu_backend` does it with a compiled function, `gpu_backend` with the CUDA kernel. A worker process imports one of
them.
"""

import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from vllm.config import ParallelConfig
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from sere_dist.artifact.folder import Artifact
from sere_dist.config import ReroutingConfig
from sere_dist.method.records import ExpertPlaces, LayerTables
from sere_dist.vllm_plugin.expert_map import ExpertMap
from sere_dist.vllm_plugin.rows import Rows

AllReduce = Callable[[torch.Tensor], None]
LayerT = TypeVar("LayerT")


class Backend(ABC, Generic[LayerT]):
    """Re-routes the layers of one worker.

    Attributes:
        layers: by decoder layer index, what re-routes a layer.
        home: the home of every row, int32 [most tokens of a step]; None: no row has one.
        all_reduce: where data-parallel ranks share one primary set, adds up their losses, int64 [E], in place. All
            ranks must call it. None: each has its own set.
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
        """`expert_map` says where experts live; None: one rank holds all of them. `merges`: the expert kernels get
        `slots.merge_repeats`, else `slots.fill_dropped`."""
        self.rows, self.home = rows, homes_of(rows, expert_map)
        self.all_reduce = self.losses_all_reduce() if shares_primary else None
        has_prices = artifact.policy(config) == "projection"
        self.layers: dict[int, LayerT] = {}
        for layer, tables in artifact.tables.items():
            used = tables if has_prices else LayerTables(tables.similarity_EE)
            self.layers[layer] = self.new_layer(used, places_of(expert_map, layer), merges)

    @abstractmethod
    def losses_all_reduce(self) -> AllReduce:
        """Returns what adds up the losses of all data-parallel ranks."""

    @abstractmethod
    def new_layer(self, tables: LayerTables, places: ExpertPlaces, merges: bool) -> LayerT:
        """Returns what re-routes a layer."""

    @abstractmethod
    def set_settings(self, settings: dict[int, ReroutingConfig]) -> None:
        """Sets the settings of every layer (`Artifact.settings_by_layer`), from the next step on."""

    @abstractmethod
    def attach(self, router: BaseRouter, layer: int) -> torch.Tensor:
        """Makes a router return re-routed weights and ids from now on.

        Returns its counters, int64 [len(COUNTERS)], and behind them the active experts of each rank, if there are more
        than one.
        """


def replace_choice(
    router: BaseRouter, replace: Callable[[BaseRouter, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Makes a router return what `replace` makes of the weights and ids that it chose."""
    compute_routing = type(router)._compute_routing

    def replaced(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        weights, ids = compute_routing(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
        return replace(self, weights, ids)

    router._compute_routing = types.MethodType(replaced, router)


def shares_primary(config: ReroutingConfig, parallel: ParallelConfig) -> bool:
    """Says whether ranks add up their losses: those with other tokens, which data-parallel attention alone has."""
    return config.primary_scope == "group" and parallel.data_parallel_size > 1


def places_of(expert_map: ExpertMap | None, layer: int) -> ExpertPlaces:
    """Returns where a layer's experts live, in the very tensors that `ExpertMap.refresh` changes."""
    if expert_map is None:
        return ExpertPlaces()
    return ExpertPlaces(expert_map.rank[layer], expert_map.num_ranks, expert_map.domain[layer])


def homes_of(rows: Rows, expert_map: ExpertMap | None) -> torch.Tensor | None:
    """Returns the home of every row, int32 [most tokens of a step]; None: no row has one."""
    if expert_map is None or expert_map.home is None:
        return None
    return torch.full_like(rows.valid, expert_map.home, dtype=torch.int32)

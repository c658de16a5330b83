"""The policies that we serve, as `lockstep` calls them: the paper's, and projection.

Each function returns a `lockstep.Rerouter`. The primary set of a step is that of the whole batch, whatever ranks its
rows are on, but for `of_each_rank` and `of_ranks`.

Shape suffixes: D decode steps, B sequences, K experts per token, E experts.
"""

from collections.abc import Mapping, Sequence

import torch

from sere_dist.evaluation.lockstep import Rerouter, Routed, active_by_step, unchanged
from sere_dist.evaluation.traffic import Layout
from sere_dist.method.fixed_point import FIXED_POINT_ONE
from sere_dist.method.projection import estimated_error, reroute_projection
from sere_dist.method.records import ExpertPlaces, LayerTables, Settings, Step
from sere_dist.method.rerouting import heaviest_slots, replace_experts, substitutes

PAIRS_AT_ONCE = 2**26  # of experts, over the steps that are re-routed together: 256 MiB for each number of a pair


def primary_by_step(
    weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, select_top_k: int, num_experts: int
) -> torch.Tensor:
    """Returns bool [D, E]: the experts in the `select_top_k` heaviest slots of each step's rows."""
    keeps_DBK = heaviest_slots(weights_DBK.flatten(0, 1), select_top_k).view_as(ids_DBK)
    return active_by_step(ids_DBK.masked_fill(~keeps_DBK, -1), num_experts)


def paper_rerouter(tables: Mapping[int, LayerTables], settings: Settings) -> Rerouter:
    """SERE: lesser slots go to the most similar primary expert; see `method.rerouting`. Prices have no effect.

    `tables`: by decoder layer index.
    """

    def route(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: torch.Tensor | None) -> Routed:
        if not 0 < settings.select_top_k < ids_DBK.shape[2]:
            return weights_DBK, ids_DBK
        similarity_EE = tables[layer].similarity_EE

        def step(ids_BK: torch.Tensor, primary_E: torch.Tensor) -> torch.Tensor:
            return replace_experts(ids_BK, substitutes(similarity_EE, primary_E, settings.threshold))

        primary_DE = primary_by_step(weights_DBK, ids_DBK, settings.select_top_k, len(similarity_EE))
        return weights_DBK, torch.vmap(step)(ids_DBK, primary_DE)

    return route


def projection_rerouter(
    tables: Mapping[int, LayerTables], settings: Settings, layout: Layout | None = None
) -> Rerouter:
    """Projection: every lesser slot takes its cheapest change, in error and in traffic; see `method.projection`.

    `tables`: by decoder layer index, of method projection. Without a `layout` no domain has a price.
    """

    def route(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: torch.Tensor | None) -> Routed:
        places = None if layout is None else ExpertPlaces(domain_E=layout.rank[layer])
        home_B = None if layout is None else layout.homes(ids_DBK.shape[1])

        def step(weights_BK: torch.Tensor, ids_BK: torch.Tensor) -> Routed:
            return reroute_projection(Step(weights_BK, ids_BK, home_T=home_B), tables[layer], settings, places)

        steps_at_once = max(1, PAIRS_AT_ONCE // len(tables[layer].similarity_EE) ** 2)
        return torch.vmap(step, chunk_size=steps_at_once)(weights_DBK, ids_DBK)

    return route


class Estimating:
    """A projection's rerouter that also adds up the error that it is estimated to make, in the unit of w² n.

    Attributes:
        error: of all rows and layers so far.
    """

    def __init__(self, rerouter: Rerouter, tables: Mapping[int, LayerTables]):
        self.rerouter, self.tables, self.error = rerouter, tables, 0.0

    def __call__(
        self, layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, scores_DBE: torch.Tensor | None
    ) -> Routed:
        weights, ids = self.rerouter(layer, weights_DBK, ids_DBK, scores_DBE)
        step = Step(weights_DBK.flatten(0, 1), ids_DBK.flatten(0, 1))
        self.error += float(estimated_error(step, ids.flatten(0, 1), self.tables[layer])) / FIXED_POINT_ONE
        return weights, ids


def of_each_rank(rerouter: Rerouter, num_ranks: int) -> Rerouter:
    """Returns the rerouter with a primary set for each rank's rows alone, b mod `num_ranks`, instead of the batch's."""
    return of_ranks([rerouter] * num_ranks)


def of_ranks(rerouters: Sequence[Rerouter]) -> Rerouter:
    """Returns the rerouter that is, for the rows b mod `len(rerouters)` of each rank, that rank's."""

    def by_rank(
        layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, scores_DBE: torch.Tensor | None
    ) -> Routed:
        weights_DBK, ids_DBK = weights_DBK.clone(), ids_DBK.clone()
        for rank, rerouter in enumerate(rerouters[: ids_DBK.shape[1]]):
            rows = slice(rank, None, len(rerouters))
            scores = None if scores_DBE is None else scores_DBE[:, rows]
            weights_DBK[:, rows], ids_DBK[:, rows] = rerouter(layer, weights_DBK[:, rows], ids_DBK[:, rows], scores)
        return weights_DBK, ids_DBK

    return by_rank


def of_layers(rerouters: Mapping[int, Rerouter]) -> Rerouter:
    """Returns the rerouter that is, in each decoder layer, that layer's; layers without one stay as they are."""

    def by_layer(
        layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, scores_DBE: torch.Tensor | None
    ) -> Routed:
        return rerouters.get(layer, unchanged)(layer, weights_DBK, ids_DBK, scores_DBE)

    return by_layer

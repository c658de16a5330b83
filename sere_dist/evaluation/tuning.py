"""Which setting each layer gets: the one that costs least quality for the experts that a step no longer runs.

Every layer is measured alone, the others as they are. Small errors of different layers add up, nearly, so the best
combinations are found by arithmetic: layers differ in what a saved expert costs, and the cheapest savings come first.
What is chosen among those combinations is then measured whole. Shape suffixes: D decode steps, B sequences, K experts a
token, E experts.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Literal, NamedTuple

import torch

from sere_dist.artifact.recommendation import LayerSetting, Outcome
from sere_dist.evaluation.layered import LayeredHeldOut
from sere_dist.evaluation.lockstep import HeldOut, Rerouter, Routed
from sere_dist.evaluation.rerouters import of_layers, paper_rerouter, primary_by_step, projection_rerouter
from sere_dist.method.records import LayerTables

Combination = dict[int, LayerSetting]  # by decoder layer; a layer that is not there stays as it is

RHO_QUANTILES = (0.5, 0.9)  # of a layer's similarities: thresholds to try
PRICE_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # of `losses_of_steps`: prices to try


class Cost(NamedTuple):
    """Of a setting in one layer alone, on average over decode steps."""

    active_experts: float
    kl: float


def rerouter_of(
    tables: Mapping[int, LayerTables], policy: Literal["sere", "projection"], combination: Combination
) -> Rerouter:
    """Returns what re-routes each layer by its setting. `tables`: by decoder layer index."""
    make = paper_rerouter if policy == "sere" else projection_rerouter
    return of_layers({layer: make(tables, setting.numbers) for layer, setting in combination.items()})


def losses_of_steps(
    held_out: HeldOut | LayeredHeldOut, batch: int, tables: Mapping[int, LayerTables]
) -> dict[int, torch.Tensor]:
    """Returns, by layer, what each decode step would lose without each expert that no token has as its heaviest.

    That is what is left of the sum of w w size over the slots that name it, after the best substitution by one of those
    heaviest experts: as in `projection.worth_running`, before any other is primary. All steps and experts are in one
    row.
    """
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in tables}

    def look(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: torch.Tensor | None) -> Routed:
        of_layer = tables[layer].to(weights_DBK.device)
        size_E = of_layer.size_E
        assert size_E is not None  # tables of method projection
        losses_DN = (weights_DBK.float() ** 2 * size_E[ids_DBK.long()]).flatten(1)
        losses_DE = torch.zeros(len(ids_DBK), len(size_E), device=ids_DBK.device)
        losses_DE.scatter_add_(1, ids_DBK.flatten(1).long(), losses_DN)
        primary_DE = primary_by_step(weights_DBK, ids_DBK, 1, len(size_E))
        alike_EE = of_layer.similarity_EE.clamp(min=0)
        best_DE = torch.stack([(alike_EE * primary_E).amax(dim=1) for primary_E in primary_DE])
        found[layer].append((losses_DE * (1 - best_DE))[(losses_DE > 0) & ~primary_DE].cpu())
        return weights_DBK, ids_DBK

    held_out.run(look, batch)
    return {layer: torch.cat(losses) for layer, losses in found.items()}


def candidates(
    policy: Literal["sere", "projection"], top_k: int, similarity_EE: torch.Tensor, losses_N: torch.Tensor | None = None
) -> list[LayerSetting]:
    """Returns the settings to try in a layer, other than off.

    Of policy sere: every S, without and with thresholds. Of policy projection: S = 1, without and with prices at which
    at most certain shares of the experts run that no token has as its heaviest (`losses_of_steps`). A greater S was
    never on a layer's hull where it was tried beside those prices (example model, batch 16).
    """
    if policy == "sere":
        different = similarity_EE[~torch.eye(len(similarity_EE), dtype=torch.bool)]
        thresholds = [0.0, *_distinct(different.quantile(torch.tensor(RHO_QUANTILES)).tolist())]
        return [LayerSetting(select_top_k=s, threshold=rho) for s in range(1, top_k) for rho in thresholds]
    assert losses_N is not None  # policy projection is given them
    losses = losses_N.sort().values
    prices = _distinct(float(losses[int(share * len(losses))]) for share in PRICE_QUANTILES) if len(losses) else []
    return [LayerSetting(select_top_k=1, expert_price=price) for price in (0.0, *prices)]


def most_candidates(policy: Literal["sere", "projection"], top_k: int) -> int:
    """Returns how many settings `candidates` returns at most."""
    return (top_k - 1) * (1 + len(RHO_QUANTILES)) if policy == "sere" else 1 + len(PRICE_QUANTILES)


def _distinct(numbers: Iterable[float]) -> list[float]:
    """Returns the numbers that are more than 0, to three digits."""
    return sorted({rounded for number in numbers if (rounded := float(f"{number:.3g}")) > 0})


def hull(costs: Mapping[LayerSetting, Cost], off: Cost) -> list[tuple[LayerSetting | None, Cost]]:
    """Returns the lower convex hull of a layer's settings, from off (None) towards fewer experts.

    Along it each further expert saved costs more than the one before. Settings above it are worse than a mixture of two
    that are on it.
    """
    points = sorted(costs.items(), key=lambda point: (-point[1].active_experts, point[1].kl))
    kept: list[tuple[LayerSetting | None, Cost]] = [(None, off)]
    for setting, cost in points:
        if cost.active_experts >= kept[0][1].active_experts:
            continue
        while len(kept) > 1 and slope(kept[-2][1], kept[-1][1]) >= slope(kept[-2][1], cost):
            kept.pop()
        if cost.active_experts < kept[-1][1].active_experts:
            kept.append((setting, cost))
    return kept


def slope(more: Cost, fewer: Cost) -> float:
    """Returns the KL for each expert saved."""
    return (fewer.kl - more.kl) / (more.active_experts - fewer.active_experts)


def combinations(alone: Mapping[int, Mapping[LayerSetting, Cost]], off: Cost) -> list[Combination]:
    """Returns combinations from the mildest on: one layer after the other goes on to the next setting on its hull.

    Each is, of those that save as much, the one with the least sum of KL (to within one layer's step).
    """
    steps = []
    for layer, costs in alone.items():
        along = hull(costs, off)
        for place, ((_, before), (setting, after)) in enumerate(pairwise(along)):
            assert setting is not None  # only the first on a hull is off
            steps.append((slope(before, after), layer, place, setting))
    found: list[Combination] = []
    for _slope, layer, _place, setting in sorted(steps, key=lambda step: step[:3]):
        found.append({**(found[-1] if found else {}), layer: setting})
    return found


def evenly_spaced(low: int, high: int, count: int) -> list[int]:
    """Returns up to `count` whole numbers from `low` to `high`, both of them among these."""
    if high - low < count:
        return list(range(low, high + 1))
    return sorted({round(low + (high - low) * i / (count - 1)) for i in range(count)})


class Budget(NamedTuple):
    """What a setting may cost, or save at least: one number."""

    kind: Literal["kl", "loss_rise", "active_experts"]
    most: float

    def holds(self, outcome: Outcome) -> bool:
        """Says whether an outcome is within it: of quality, with two standard errors to spare."""
        spare = 0.0 if self.kind == "active_experts" else 2 * getattr(outcome, f"{self.kind}_error")
        return getattr(outcome, self.kind) + spare <= self.most

    def __str__(self) -> str:
        what = {"kl": "a KL of", "loss_rise": "a loss rise of", "active_experts": "active experts of"}[self.kind]
        return f"{what} at most {self.most:g}" + ("" if self.kind == "active_experts" else " nats a token")


def bracket(measured: Mapping[int, Outcome], budget: Budget) -> tuple[int | None, int | None]:
    """Returns the places of two measured combinations between which the one to choose lies: the first is within budget.

    Combinations are in order, the mildest first: within a budget of quality are the first ones, within one of active
    experts the last. None where there is no such one.
    """
    places = sorted(measured, reverse=budget.kind == "active_experts")
    outside = next((place for place in places if not budget.holds(measured[place])), None)
    within = places if outside is None else places[: places.index(outside)]
    return (within[-1] if within else None), outside

"""What re-routes the decode steps of a layer in `lockstep`: the paper's policy, dropping, and projection at a price.

Each function returns a `lockstep.Policy`. The primary set of a step is that of the whole batch, whatever ranks its rows
are on, but for `of_each_rank`. Shape suffixes: D decode steps, B sequences, K experts a token, E experts.
"""

from collections.abc import Mapping

import torch

from sere_dist.evaluation.lockstep import Policy, Routed, active_by_step
from sere_dist.evaluation.traffic import Layout
from sere_dist.rerouting import primary_slots, reroute, reroute_projection


def primary_by_step(
    weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, select_top_k: int, num_experts: int
) -> torch.Tensor:
    """Returns bool [D, E]: the experts in the `select_top_k` heaviest slots of each step's rows."""
    is_primary_DBK = primary_slots(weights_DBK.flatten(0, 1), select_top_k).view_as(ids_DBK)
    return active_by_step(ids_DBK.masked_fill(~is_primary_DBK, -1), num_experts)


def similarity_policy(similarity: Mapping[int, torch.Tensor], select_top_k: int, threshold: float = 0.0) -> Policy:
    """The paper's: lesser slots go to the most similar primary expert; see `rerouting.reroute`.

    `similarity`: decoder layer index -> [E, E].
    """

    def policy(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor) -> Routed:
        def step(weights_BK: torch.Tensor, ids_BK: torch.Tensor, primary_E: torch.Tensor) -> torch.Tensor:
            settings = {"select_top_k": select_top_k, "threshold": threshold, "primary_E": primary_E}
            return reroute(weights_BK, ids_BK, similarity[layer], **settings)

        primary_DE = primary_by_step(weights_DBK, ids_DBK, select_top_k, len(similarity[layer]))
        return weights_DBK, torch.vmap(step)(weights_DBK, ids_DBK, primary_DE)

    return policy


def of_each_rank(policy: Policy, num_ranks: int) -> Policy:
    """Returns the policy with a primary set for each rank's rows alone, b mod `num_ranks`, instead of the batch's."""

    def by_rank(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor) -> Routed:
        weights_DBK, ids_DBK = weights_DBK.clone(), ids_DBK.clone()
        for rank in range(min(num_ranks, ids_DBK.shape[1])):
            rows = slice(rank, None, num_ranks)
            weights_DBK[:, rows], ids_DBK[:, rows] = policy(layer, weights_DBK[:, rows], ids_DBK[:, rows])
        return weights_DBK, ids_DBK

    return by_rank


def dropping_policy(num_experts: int, select_top_k: int, *, renormalise: bool = False) -> Policy:
    """Slots whose expert is not primary are dropped; with `renormalise` a token's other weights make up for them."""

    def policy(_layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor) -> Routed:
        primary_DE = primary_by_step(weights_DBK, ids_DBK, select_top_k, num_experts)
        runs_DBK = primary_DE.gather(1, ids_DBK.flatten(1).long()).view_as(ids_DBK)
        kept_DBK = weights_DBK * runs_DBK
        if renormalise:
            kept_DBK = kept_DBK * (weights_DBK.sum(dim=2, keepdim=True) / kept_DBK.sum(dim=2, keepdim=True))
        return kept_DBK, ids_DBK.masked_fill(~runs_DBK, -1)

    return policy


def projection_policy(
    similarity: Mapping[int, torch.Tensor],
    coefficient: Mapping[int, torch.Tensor],
    size: Mapping[int, torch.Tensor],
    select_top_k: int,
    *,
    threshold: float = 0.0,
    traffic_price: float = 0.0,
    layout: Layout | None = None,
) -> Policy:
    """Every lesser slot's cheapest change, in error and traffic; see `rerouting.reroute_projection`.

    The mappings are those of an artifact of method projection. Without a `layout` nothing has a price.
    """

    def policy(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor) -> Routed:
        settings = {"select_top_k": select_top_k, "threshold": threshold, "traffic_price": traffic_price}
        if layout is not None:
            settings |= {"domain_E": layout.rank[layer], "home_T": layout.homes(ids_DBK.shape[1])}

        def step(weights_BK: torch.Tensor, ids_BK: torch.Tensor, primary_E: torch.Tensor) -> Routed:
            matrices = similarity[layer], coefficient[layer], size[layer]
            return reroute_projection(weights_BK, ids_BK, *matrices, primary_E=primary_E, **settings)

        primary_DE = primary_by_step(weights_DBK, ids_DBK, select_top_k, len(similarity[layer]))
        return torch.vmap(step)(weights_DBK, ids_DBK, primary_DE)

    return policy

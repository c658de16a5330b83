"""Policies of the field, to compare with: dropping, fewer experts per token, OEA, XShare and REAP.

Each function returns a `lockstep.Rerouter`, from the description in its paper, not from its authors' code. A slot that
is left empty has id -1 and weight 0. What *renormalises* gives a token's slots the sum of weights that the router gave
them. Shape suffixes: D decode steps, B sequences, K experts per token, E experts, N tokens, H hidden size.
"""

from collections.abc import Mapping

import torch

from sere_dist.evaluation.lockstep import Rerouter, Routed
from sere_dist.evaluation.rerouters import primary_by_step
from sere_dist.method.rerouting import heaviest_slots


def dropping_rerouter(num_experts: int, select_top_k: int, *, renormalise: bool = False) -> Rerouter:
    """Slots whose expert is not primary are dropped; with `renormalise` a token's other weights make up for them."""

    def route(_layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: torch.Tensor | None) -> Routed:
        primary_DE = primary_by_step(weights_DBK, ids_DBK, select_top_k, num_experts)
        runs_DBK = primary_DE.gather(1, ids_DBK.flatten(1).long()).view_as(ids_DBK)
        return _kept(weights_DBK, ids_DBK, runs_DBK, renormalise)

    return route


def top_k_rerouter(select_top_k: int, *, renormalise: bool = False) -> Rerouter:
    """Every token keeps its `select_top_k` heaviest slots and drops the rest, whatever else the batch runs."""

    def route(_layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: torch.Tensor | None) -> Routed:
        is_primary_DBK = heaviest_slots(weights_DBK.flatten(0, 1), select_top_k).view_as(ids_DBK)
        return _kept(weights_DBK, ids_DBK, is_primary_DBK, renormalise)

    return route


def oea_rerouter(select_top_k: int, *, renormalise: bool = True) -> Rerouter:
    """Opportunistic expert activation (arXiv 2511.02237, the simplified form): what others load, a token may use.

    Every token keeps its `select_top_k` heaviest slots (k0 there). The others are filled with the experts that it
    scores highest among those that any token of the batch keeps, whether its router chose them or not. Weights are the
    scores, there renormalised. A slot is empty where the batch keeps fewer than K experts.
    """

    def route(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, scores_DBE: torch.Tensor | None) -> Routed:
        scores_DBE = _known(scores_DBE, layer)
        primary_DE = primary_by_step(weights_DBK, ids_DBK, select_top_k, scores_DBE.shape[2])
        is_primary_DBK = heaviest_slots(weights_DBK.flatten(0, 1), select_top_k).view_as(ids_DBK)
        kept_DBE = torch.zeros_like(scores_DBE).scatter_(2, ids_DBK.long(), is_primary_DBK.float())
        preference_DBE = scores_DBE.masked_fill(~primary_DE[:, None], -torch.inf).masked_fill(kept_DBE > 0, torch.inf)
        return _chosen(preference_DBE, scores_DBE, weights_DBK, ids_DBK, renormalise)

    return route


def xshare_rerouter(budget: int, *, warm_up: int = 0, renormalise: bool = True) -> Rerouter:
    """XShare (arXiv 2602.07265): the batch runs the `budget` experts that its tokens together score highest.

    An expert's demand is the sum of its scores over the batch. Every token's `warm_up` heaviest experts come first,
    even where they are more than the budget. Then each token takes the K experts of the batch's that it scores highest;
    weights are the scores, there renormalised. A slot is empty where the batch runs fewer than K experts. (Its group
    budgets, for speculative decoding and for expert parallelism, are not here.)
    """

    def route(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, scores_DBE: torch.Tensor | None) -> Routed:
        scores_DBE = _known(scores_DBE, layer)
        first_DE = primary_by_step(weights_DBK, ids_DBK, warm_up, scores_DBE.shape[2])
        demand_DE = scores_DBE.sum(dim=1).masked_fill(first_DE, torch.inf)
        place_DE = demand_DE.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
        runs_DE = (place_DE < budget) | first_DE
        preference_DBE = scores_DBE.masked_fill(~runs_DE[:, None], -torch.inf)
        return _chosen(preference_DBE, scores_DBE, weights_DBK, ids_DBK, renormalise)

    return route


def reap_rerouter(saliency: Mapping[int, torch.Tensor], kept: int) -> Rerouter:
    """REAP (arXiv 2510.13999): each layer has only its `kept` experts of the largest saliency, in every step.

    A token takes the K experts of these that it scores highest; weights are the scores, and keep their sum. So it is
    for a model that normalises the weights of the chosen experts. (The prompt still has all experts in `lockstep`.)

    `saliency`: [E] by decoder layer index, what a calibration of method projection found.
    """

    def route(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, scores_DBE: torch.Tensor | None) -> Routed:
        scores_DBE = _known(scores_DBE, layer)
        place_E = saliency[layer].sort(descending=True, stable=True).indices.argsort()
        preference_DBE = scores_DBE.masked_fill((place_E >= kept).to(scores_DBE.device), -torch.inf)
        return _chosen(preference_DBE, scores_DBE, weights_DBK, ids_DBK, renormalise=True)

    return route


def _kept(weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, kept_DBK: torch.Tensor, renormalise: bool) -> Routed:
    """Returns the routing with all slots but those of `kept_DBK` dropped."""
    new_weights_DBK = weights_DBK * kept_DBK
    if renormalise:
        new_weights_DBK = _renormalised(new_weights_DBK, weights_DBK)
    return new_weights_DBK, ids_DBK.masked_fill(~kept_DBK, -1)


def _chosen(
    preference_DBE: torch.Tensor,
    scores_DBE: torch.Tensor,
    weights_DBK: torch.Tensor,
    ids_DBK: torch.Tensor,
    renormalise: bool,
) -> Routed:
    """Returns the K experts that each token prefers most, never those at -inf, weighted by their scores.

    Without `renormalise` an expert that the router chose has the weight that the router gave it.
    """
    preferred = preference_DBE.sort(dim=2, descending=True, stable=True)  # equal scores: the lower id first
    slots = slice(ids_DBK.shape[2])
    experts_DBK, is_empty_DBK = preferred.indices[:, :, slots], preferred.values[:, :, slots] == -torch.inf
    new_weights_DBK = scores_DBE.gather(2, experts_DBK).masked_fill(is_empty_DBK, 0)
    new_ids_DBK = experts_DBK.to(ids_DBK.dtype).masked_fill(is_empty_DBK, -1)
    if renormalise:
        return _renormalised(new_weights_DBK, weights_DBK), new_ids_DBK
    chosen_DBK = scores_DBE.gather(2, ids_DBK.clamp(min=0).long()).masked_fill(ids_DBK < 0, 0)
    scale_DB1 = weights_DBK.sum(dim=2, keepdim=True) / chosen_DBK.sum(dim=2, keepdim=True)
    return new_weights_DBK * scale_DB1, new_ids_DBK


def _renormalised(new_weights_DBK: torch.Tensor, weights_DBK: torch.Tensor) -> torch.Tensor:
    """Returns the new weights, scaled to the sum of the old ones in every row."""
    return new_weights_DBK * (weights_DBK.sum(dim=2, keepdim=True) / new_weights_DBK.sum(dim=2, keepdim=True))


def _known(scores_DBE: torch.Tensor | None, layer: int) -> torch.Tensor:
    """Raises ValueError where a model's router could not be read."""
    if scores_DBE is None:
        raise ValueError(
            f"this policy needs the router's score of every expert, and that of layer {layer} can't be read: no module "
            "beside its experts returns logits whose softmax or sigmoid is in proportion to the weights"
        )
    return scores_DBE

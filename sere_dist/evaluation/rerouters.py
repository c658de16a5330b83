"""What re-routes the decode steps of a layer in `lockstep`: the paper's policy, projection at a price, and the field.

Each function returns a `lockstep.Policy`. The primary set of a step is that of the whole batch, whatever ranks its rows
are on, but for `of_each_rank`; `of_layers` gives each layer one of its own. A slot that is left empty has id -1 and
weight 0. What *renormalises* gives a token's slots the sum of weights that the router gave them. Shape suffixes: D
decode steps, B sequences, K experts a token, E experts.
"""

from collections.abc import Mapping

import torch

from sere_dist.evaluation.lockstep import Policy, Routed, active_by_step, unchanged
from sere_dist.evaluation.traffic import Layout
from sere_dist.method.rerouting import primary_slots, reroute, reroute_projection


def primary_by_step(
    weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, select_top_k: int, num_experts: int
) -> torch.Tensor:
    """Returns bool [D, E]: the experts in the `select_top_k` heaviest slots of each step's rows."""
    is_primary_DBK = primary_slots(weights_DBK.flatten(0, 1), select_top_k).view_as(ids_DBK)
    return active_by_step(ids_DBK.masked_fill(~is_primary_DBK, -1), num_experts)


def paper_rerouter(similarity: Mapping[int, torch.Tensor], select_top_k: int, threshold: float = 0.0) -> Policy:
    """The paper's: lesser slots go to the most similar primary expert; see `rerouting.reroute`.

    `similarity`: decoder layer index -> [E, E].
    """

    def policy(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: torch.Tensor | None) -> Routed:
        def step(weights_BK: torch.Tensor, ids_BK: torch.Tensor, primary_E: torch.Tensor) -> torch.Tensor:
            settings = {"select_top_k": select_top_k, "threshold": threshold, "primary_E": primary_E}
            return reroute(weights_BK, ids_BK, similarity[layer], **settings)

        primary_DE = primary_by_step(weights_DBK, ids_DBK, select_top_k, len(similarity[layer]))
        return weights_DBK, torch.vmap(step)(weights_DBK, ids_DBK, primary_DE)

    return policy


def of_each_rank(policy: Policy, num_ranks: int) -> Policy:
    """Returns the policy with a primary set for each rank's rows alone, b mod `num_ranks`, instead of the batch's."""

    def by_rank(
        layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, scores_DBE: torch.Tensor | None
    ) -> Routed:
        weights_DBK, ids_DBK = weights_DBK.clone(), ids_DBK.clone()
        for rank in range(min(num_ranks, ids_DBK.shape[1])):
            rows = slice(rank, None, num_ranks)
            scores = None if scores_DBE is None else scores_DBE[:, rows]
            weights_DBK[:, rows], ids_DBK[:, rows] = policy(layer, weights_DBK[:, rows], ids_DBK[:, rows], scores)
        return weights_DBK, ids_DBK

    return by_rank


def of_layers(policies: Mapping[int, Policy]) -> Policy:
    """Returns the policy that is, in each decoder layer, that layer's; layers without one stay as they are."""

    def by_layer(
        layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, scores_DBE: torch.Tensor | None
    ) -> Routed:
        return policies.get(layer, unchanged)(layer, weights_DBK, ids_DBK, scores_DBE)

    return by_layer


def dropping_rerouter(num_experts: int, select_top_k: int, *, renormalise: bool = False) -> Policy:
    """Slots whose expert is not primary are dropped; with `renormalise` a token's other weights make up for them."""

    def policy(_layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: torch.Tensor | None) -> Routed:
        primary_DE = primary_by_step(weights_DBK, ids_DBK, select_top_k, num_experts)
        runs_DBK = primary_DE.gather(1, ids_DBK.flatten(1).long()).view_as(ids_DBK)
        return _kept(weights_DBK, ids_DBK, runs_DBK, renormalise)

    return policy


def top_k_rerouter(select_top_k: int, *, renormalise: bool = False) -> Policy:
    """Every token keeps its `select_top_k` heaviest slots and drops the rest, whatever else the batch runs."""

    def policy(_layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: torch.Tensor | None) -> Routed:
        is_primary_DBK = primary_slots(weights_DBK.flatten(0, 1), select_top_k).view_as(ids_DBK)
        return _kept(weights_DBK, ids_DBK, is_primary_DBK, renormalise)

    return policy


def oea_rerouter(select_top_k: int, *, renormalise: bool = True) -> Policy:
    """Opportunistic expert activation (arXiv 2511.02237, the simplified form): what others load, a token may use.

    Every token keeps its `select_top_k` heaviest slots (k0 there). The others are filled with the experts that it
    scores highest among those that any token of the batch keeps, whether its router chose them or not. Weights are the
    scores, there renormalised. A slot is empty where the batch keeps fewer than K experts.
    """

    def policy(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, scores_DBE: torch.Tensor | None) -> Routed:
        scores_DBE = _known(scores_DBE, layer)
        primary_DE = primary_by_step(weights_DBK, ids_DBK, select_top_k, scores_DBE.shape[2])
        is_primary_DBK = primary_slots(weights_DBK.flatten(0, 1), select_top_k).view_as(ids_DBK)
        kept_DBE = torch.zeros_like(scores_DBE).scatter_(2, ids_DBK.long(), is_primary_DBK.float())
        preference_DBE = scores_DBE.masked_fill(~primary_DE[:, None], -torch.inf).masked_fill(kept_DBE > 0, torch.inf)
        return _chosen(preference_DBE, scores_DBE, weights_DBK, ids_DBK, renormalise)

    return policy


def xshare_rerouter(budget: int, *, warm_up: int = 0, renormalise: bool = True) -> Policy:
    """XShare (arXiv 2602.07265): the batch runs the `budget` experts that its tokens together score highest.

    An expert's demand is the sum of its scores over the batch. Every token's `warm_up` heaviest experts come first,
    even where they are more than the budget. Then each token takes the K experts of the batch's that it scores highest;
    weights are the scores, there renormalised. A slot is empty where the batch runs fewer than K experts. (Its group
    budgets, for speculative decoding and for expert parallelism, are not here.)
    """

    def policy(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, scores_DBE: torch.Tensor | None) -> Routed:
        scores_DBE = _known(scores_DBE, layer)
        first_DE = primary_by_step(weights_DBK, ids_DBK, warm_up, scores_DBE.shape[2])
        demand_DE = scores_DBE.sum(dim=1).masked_fill(first_DE, torch.inf)
        place_DE = demand_DE.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
        runs_DE = (place_DE < budget) | first_DE
        preference_DBE = scores_DBE.masked_fill(~runs_DE[:, None], -torch.inf)
        return _chosen(preference_DBE, scores_DBE, weights_DBK, ids_DBK, renormalise)

    return policy


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


def projection_rerouter(
    similarity: Mapping[int, torch.Tensor],
    coefficient: Mapping[int, torch.Tensor],
    size: Mapping[int, torch.Tensor],
    select_top_k: int,
    *,
    threshold: float = 0.0,
    expert_price: float = 0.0,
    traffic_price: float = 0.0,
    layout: Layout | None = None,
) -> Policy:
    """Every lesser slot's cheapest change, in error and traffic; see `rerouting.reroute_projection`.

    The mappings are those of an artifact of method projection. Without a `layout` no domain has a price.
    """

    def policy(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: torch.Tensor | None) -> Routed:
        settings = {"select_top_k": select_top_k, "threshold": threshold}
        settings |= {"expert_price": expert_price, "traffic_price": traffic_price}
        if layout is not None:
            settings |= {"domain_E": layout.rank[layer], "home_T": layout.homes(ids_DBK.shape[1])}

        def step(weights_BK: torch.Tensor, ids_BK: torch.Tensor) -> Routed:
            return reroute_projection(
                weights_BK, ids_BK, similarity[layer], coefficient[layer], size[layer], **settings
            )

        return torch.vmap(step)(weights_DBK, ids_DBK)

    return policy

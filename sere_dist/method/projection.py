"""Policy `projection`: every lesser slot takes the change that costs least, in error and in traffic. Not in the paper.

Method `projection` (`similarity.expert_projection`) gives three tables. Expert p, multiplied by the coefficient c_ep,
is the best that p can do in place of e. The similarity s_ep is the share of e's output that this explains. The size n_e
is the mean squared output of e. With w the router's weight, the squared errors of a change, and its price, are

    cost(e -> p) = w² n_e (1 - s_ep) + traffic_price [the token does not visit p's domain yet]
    cost(drop e) = w² n_e

for every primary expert p; s_ee = c_ee = 1. A slot that goes to p gets the weight w c_ep, a dropped slot the id -1 and
the weight 0. A token's S heaviest slots and critical ones stay as they are, as in `rerouting`. Its heaviest slot is
never dropped.

Primary are the experts in these heaviest slots, and those that run in any case for rows that keep theirs: a prompt's,
or those of a request that asks for it (`Step.runs_T`). `expert_price` decides what else is. Without e, the step would
lose

    loss(e) = sum over the slots that name e of w² n_e q
    left(e) = loss(e) (1 - the largest s_ep over the primary p so far, at least 0)

if nothing stood in for e, and after the best substitution. q is the chance that the token's output is used: 1, but for
drafted tokens of speculative decoding. Experts of which more is left come first, of equal ones the lower id. e runs if
it is worth its price beside those that come before it:

    loss(e) (1 - the largest s_ep over the p before e, at least 0) >= expert_price.

That is as good as to add the experts one at a time (`studies/selection.py`), and needs no loop. With a `balance_price`
an expert that is worth its price also has to be worth its place: see `balance`. With S = 0 the prices alone decide, and
if no expert is worth them, the first one runs all the same.

Losses are added up in fixed point, so that the sum does not depend on the order and ranks can share one primary set.

Shape suffixes: T tokens of the step, K experts per token, E experts of the layer. Comparisons are in float32, in the
order that is written here, so that `kernels/reroute.cu` agrees to the bit.
"""

from typing import NamedTuple

import torch

from sere_dist.method.balance import balanced_primary
from sere_dist.method.fixed_point import ALWAYS_PRIMARY, FIXED_POINT_ONE, to_fixed_point
from sere_dist.method.records import ExpertPlaces, LayerTables, Settings, Step
from sere_dist.method.rerouting import (
    active_experts,
    filled_slots,
    heaviest_slots,
    slots_by_weight,
    substitutes,
)


class ProjectionTables(NamedTuple):
    """A layer's tables of method projection, in float32, the diagonals 1."""

    similarity_EE: torch.Tensor
    coefficient_EE: torch.Tensor
    size_E: torch.Tensor


def reroute_projection(
    step: Step,
    tables: LayerTables,
    settings: Settings,
    places: ExpertPlaces | None = None,
    primary_E: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns new weights and ids [T, K], in the dtypes of the step. The inputs are not changed.

    A token's slots are settled in order of weight. Of equal costs the larger similarity wins, then the lower id, and
    dropping comes last.

    Args:
        step: what the router chose.
        tables: of method `projection`.
        settings: S, rho and the prices. Where they are not `in_force` nothing changes.
        places: the rank and the domain of each expert. A token visits its home, the domains of the slots that stay, and
            each domain that a slot was sent to. Without domains `traffic_price` has no effect, without ranks
            `balance_price`.
        primary_E: bool [E], where other ranks have a say in it. None: the `primary_by_price` of this step.

    Raises:
        ValueError: the tables are of another method.
    """
    if not in_force(settings, step.ids_TK.shape[1], places):
        return step.weights_TK.clone(), step.ids_TK.clone()
    if primary_E is None:
        primary_E = primary_by_price(step, tables, settings, places)
    own = projection_tables(tables)
    order_TK = slots_by_weight(step.weights_TK)
    heaviest_TK = order_TK.argsort(dim=1) < settings.select_top_k
    critical_E = _critical_experts(own.similarity_EE, primary_E, settings.threshold)
    stays_TK = heaviest_TK | critical_E[step.ids_TK.clamp(min=0).long()]
    settles_TK = filled_slots(step.ids_TK, step.valid_T) & ~stays_TK
    domain_E = None if places is None else places.domain_E
    visited_TE = _visited(step, settles_TK, domain_E)

    weights_TK, ids_TK = step.weights_TK.float(), step.ids_TK
    candidates_EE = own.similarity_EE.masked_fill(~primary_E, -torch.inf)
    for turn in range(settings.select_top_k, step.ids_TK.shape[1]):
        slot_T1 = order_TK[:, turn : turn + 1]
        id_T, weight_T, settles_T = (each.gather(1, slot_T1).squeeze(1) for each in (ids_TK, weights_TK, settles_TK))
        expert_T = id_T.clamp(min=0).long()
        drop_cost_T = (weight_T * weight_T) * own.size_E[expert_T]
        cost_TE = _substitution_costs(drop_cost_T, own.similarity_EE[expert_T], visited_TE, settings.traffic_price)
        least_T = cost_TE.masked_fill(~primary_E, torch.inf).amin(dim=1)
        cheapest_TE = candidates_EE[expert_T].masked_fill(cost_TE > least_T[:, None], -torch.inf)
        substitute_T = cheapest_TE.max(dim=1).indices  # of equal values the first: the lowest id

        drops_T = settles_T & (drop_cost_T < least_T) & (turn > 0)
        moves_T = settles_T & ~drops_T
        new_weight_T = torch.where(moves_T, weight_T * own.coefficient_EE[expert_T, substitute_T], weight_T)
        new_id_T = torch.where(moves_T, substitute_T.to(ids_TK.dtype), id_T)
        weights_TK = weights_TK.scatter(1, slot_T1, new_weight_T.masked_fill(drops_T, 0)[:, None])
        ids_TK = ids_TK.scatter(1, slot_T1, new_id_T.masked_fill(drops_T, -1)[:, None])
        if visited_TE is not None and domain_E is not None:
            in_its_domain_TE = domain_E[substitute_T][:, None] == domain_E[None]
            visited_TE = visited_TE | (in_its_domain_TE & moves_T[:, None])
    changed_TK = weights_TK != step.weights_TK.float()
    return torch.where(changed_TK, weights_TK.to(step.weights_TK.dtype), step.weights_TK), ids_TK


def primary_by_price(
    step: Step, tables: LayerTables, settings: Settings, places: ExpertPlaces | None = None
) -> torch.Tensor:
    """Returns bool [E]: the experts in the S heaviest slots and those worth the prices; none if not `in_force`."""
    return worth_running(primary_losses(step, tables, settings, places), tables, settings, places)


def worth_running(
    losses_E: torch.Tensor, tables: LayerTables, settings: Settings, places: ExpertPlaces | None = None
) -> torch.Tensor:
    """Returns bool [E], the primary experts: those that run in any case, and those that are worth the prices.

    Args:
        losses_E: int64 [E], the `primary_losses` of a step; ranks may have added theirs up.
        tables: the layer's.
        settings: without prices only those are primary that run in any case. With S = 0 and losses, one expert is.
        places: the rank of each expert. None, or no ranks: `balance_price` has no effect.
    """
    if not (expert_price := price_of_an_expert(settings, places)):
        return losses_E >= ALWAYS_PRIMARY
    left_E = left_without_each_expert(losses_E, tables)
    if settings.select_top_k == 0:
        first_E = torch.arange(len(left_E), device=left_E.device) == losses_E.float().max(dim=0).indices
        first_E = first_E & (losses_E > 0) & ~(left_E >= expert_price).any()
        left_E = left_E.masked_fill(first_E, ALWAYS_PRIMARY)
    if not (balance_price := price_of_a_place(settings, places)):
        return left_E >= expert_price
    assert places is not None and places.rank_E is not None  # else a place has no price
    return balanced_primary(left_E, places.rank_E, expert_price=expert_price, balance_price=balance_price)


def left_without_each_expert(losses_E: torch.Tensor, tables: LayerTables) -> torch.Tensor:
    """Returns int64 [E], fixed point: what is left of `primary_losses` beside the experts that come before each.

    ALWAYS_PRIMARY for an expert that runs in any case.
    """
    must_E = losses_E >= ALWAYS_PRIMARY
    loss_E, alike_EE = losses_E.float(), tables.similarity_EE.float().clamp(min=0)
    left_E = loss_E * (1 - alike_EE.masked_fill(~must_E, 0).amax(dim=1))
    left_E = left_E.masked_fill(must_E, torch.inf)
    index_E = torch.arange(len(left_E), device=left_E.device)
    is_before_EE = (left_E > left_E[:, None]) | ((left_E == left_E[:, None]) & (index_E < index_E[:, None]))
    left_E = loss_E * (1 - alike_EE.masked_fill(~is_before_EE, 0).amax(dim=1))
    return left_E.long().masked_fill(must_E, ALWAYS_PRIMARY)


def in_force(settings: Settings, num_slots: int, places: ExpertPlaces | None = None) -> bool:
    """Returns whether the settings may change a token of K = `num_slots`: 0 < S < K, or S = 0 and prices."""
    if settings.select_top_k == 0:
        return price_of_an_expert(settings, places) > 0
    return 0 < settings.select_top_k < num_slots


def price_of_an_expert(settings: Settings, places: ExpertPlaces | None = None) -> int:
    """Returns in fixed point what must be left without an expert, at least 1. 0: none has a price.

    Where a place has a price, any expert may have one.
    """
    return to_fixed_point(settings.expert_price) or (1 if price_of_a_place(settings, places) else 0)


def price_of_a_place(settings: Settings, places: ExpertPlaces | None) -> int:
    """Returns the balance price in fixed point; 0 where experts are on no ranks."""
    return 0 if places is None or places.rank_E is None else to_fixed_point(settings.balance_price)


def primary_losses(
    step: Step, tables: LayerTables, settings: Settings, places: ExpertPlaces | None = None
) -> torch.Tensor:
    """Returns int64 [E], fixed point: what the step would lose without each expert if nothing stood in for it.

    ALWAYS_PRIMARY for an expert in one of the S heaviest slots of a valid token. With sizes, which policy projection
    has, also for one in any slot of a row of `runs_T`: it runs whatever is decided here. Losses of other experts are
    only counted if experts have a price, which needs `tables.size_E`. All 0 without settings that are `in_force`.
    Ranks that share one primary set add these up.
    """
    num_experts = len(tables.similarity_EE)
    if not in_force(settings, step.ids_TK.shape[1], places):
        return torch.zeros(num_experts, dtype=torch.int64, device=step.ids_TK.device)
    filled_TK = filled_slots(step.ids_TK, step.valid_T)
    keeps_TK = heaviest_slots(step.weights_TK, settings.select_top_k) & filled_TK
    if price_of_an_expert(settings, places):
        if tables.size_E is None:
            raise ValueError("a price needs the experts' size_E: calibrate with method projection")
        losses_E = losses_without_each_expert(step, tables.size_E)
    else:
        losses_E = torch.zeros(num_experts, dtype=torch.int64, device=step.ids_TK.device)
    if tables.size_E is not None and step.runs_T is not None:
        keeps_TK = keeps_TK | step.runs_T[:, None]
    return losses_E.masked_fill(active_experts(step.ids_TK, keeps_TK, num_experts), ALWAYS_PRIMARY)


def losses_without_each_expert(step: Step, size_E: torch.Tensor) -> torch.Tensor:
    """Returns int64 [E], fixed point: the squared error that the valid tokens' slots would make without each expert.

    A slot's error is ((w w) n) q in float32, rounded to a whole number (half to even; NaN counts as 0).
    """
    num_experts, weights_TK = len(size_E), step.weights_TK.float()
    errors_TK = (weights_TK * weights_TK) * size_E.float()[step.ids_TK.clamp(min=0).long()]
    fixed_TK = _in_fixed_point(errors_TK, step.chance_T)
    named_TK = torch.where(filled_slots(step.ids_TK, step.valid_T), step.ids_TK, num_experts).long()
    losses = torch.zeros(num_experts + 1, dtype=torch.int64, device=step.ids_TK.device)  # one place more for "none"
    return losses.index_add(0, named_TK.flatten(), fixed_TK.flatten())[:num_experts]


def estimated_error(step: Step, new_ids_TK: torch.Tensor, tables: LayerTables) -> torch.Tensor:
    """Returns int64 [], fixed point: the squared errors that the changes of a step are estimated to make.

    They are the costs above, each times q, without the price of traffic. `new_ids_TK` is what `reroute_projection`
    made of the step. The errors of a token's slots are added as if they did not correlate.
    """
    similarity_EE, _coefficient_EE, size_E = projection_tables(tables)
    before_TK, after_TK = (ids_TK.clamp(min=0).long() for ids_TK in (step.ids_TK, new_ids_TK))
    weights_TK = step.weights_TK.float()
    whole_TK = (weights_TK * weights_TK) * size_E[before_TK]
    moved_TK = whole_TK * (1 - similarity_EE[before_TK, after_TK])
    errors_TK = torch.where(new_ids_TK < 0, whole_TK, moved_TK).masked_fill(new_ids_TK == step.ids_TK, 0)
    return _in_fixed_point(errors_TK, step.chance_T).sum()


def _in_fixed_point(errors_TK: torch.Tensor, chance_T: torch.Tensor | None) -> torch.Tensor:
    """Returns int64 [T, K]: errors times the chances of their tokens, rounded (half to even; NaN counts as 0)."""
    if chance_T is not None:
        errors_TK = errors_TK * chance_T[:, None]
    return (errors_TK * FIXED_POINT_ONE).round().nan_to_num(0).clamp(0, ALWAYS_PRIMARY).long()


def projection_tables(tables: LayerTables) -> ProjectionTables:
    """Returns the tables in float32. An expert stands in for itself whatever rounding left on the diagonal."""
    if tables.coefficient_EE is None or tables.size_E is None:
        raise ValueError("policy projection needs coefficient_EE and size_E: calibrate with method projection")
    itself_EE = torch.eye(len(tables.similarity_EE), dtype=torch.bool, device=tables.similarity_EE.device)
    similarity_EE, coefficient_EE = (
        table.float().masked_fill(itself_EE, 1) for table in (tables.similarity_EE, tables.coefficient_EE)
    )
    return ProjectionTables(similarity_EE, coefficient_EE, tables.size_E.float())


def _critical_experts(similarity_EE: torch.Tensor, primary_E: torch.Tensor, threshold: float) -> torch.Tensor:
    """Returns bool [E]: the experts that are not primary and have no substitute; all if there is no primary expert."""
    itself_E = torch.arange(len(primary_E), device=primary_E.device)
    return ~primary_E & (substitutes(similarity_EE, primary_E, threshold) == itself_E)


def _visited(step: Step, settles_TK: torch.Tensor, domain_E: torch.Tensor | None) -> torch.Tensor | None:
    """Returns bool [T, E]: whether a token visits the domain of expert e anyway. None where there are no domains."""
    if domain_E is None:
        return None
    same_domain_EE = domain_E[:, None] == domain_E[None]
    stays_TK = filled_slots(step.ids_TK, step.valid_T) & ~settles_TK
    visited_TE = (same_domain_EE[step.ids_TK.clamp(min=0).long()] & stays_TK[:, :, None]).any(dim=1)
    return visited_TE if step.home_T is None else visited_TE | (step.home_T[:, None] == domain_E[None])


def _substitution_costs(
    drop_cost_T: torch.Tensor, similarity_TE: torch.Tensor, visited_TE: torch.Tensor | None, traffic_price: float
) -> torch.Tensor:
    """Returns float32 [T, E]: the cost of sending a slot of each token to each expert."""
    cost_TE = drop_cost_T[:, None] * (1 - similarity_TE)
    if visited_TE is None:
        return cost_TE
    price = torch.tensor(traffic_price, dtype=torch.float32, device=cost_TE.device)
    return cost_TE + torch.where(visited_TE, torch.zeros_like(price), price)

"""Re-routing of one decode step on a CPU: every policy, merging and counters in one pass, compiled by Numba.

    layer = CpuLayer(LayerTables(similarity_EE))
    layer.set(Settings(select_top_k=2))
    weights_TK, ids_TK = layer.reroute(Step(topk_weights_TK, topk_ids_TK, valid_T))
    dict(zip(COUNTERS, layer.counters.tolist()))

`sere_dist.method` computes the same, to the bit: all arithmetic is in float32, in the order that is written there. The
same steps as in reroute.cu: vote, find substitutes, settle. Compiled code is kept beside this file, or where
NUMBA_CACHE_DIR says. Shape suffixes: T tokens of the step, K experts per token, E experts of the layer.
"""

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
import torch

from sere_dist.kernels.neighbors import ranked_neighbors
from sere_dist.method.counters import COUNTERS
from sere_dist.method.fixed_point import ALWAYS_PRIMARY, FIXED_POINT_ONE, to_fixed_point
from sere_dist.method.projection import projection_tables
from sere_dist.method.records import ExpertPlaces, LayerTables, Settings, Step

NOWHERE = -1  # a slot or a token without a domain
NO_SUBSTITUTE, NOT_LOOKED_UP = -1, -2
NO_HOME, NO_CHANCE = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
NO_ROW = np.empty(0, dtype=np.bool_)
ONE, ZERO = np.float32(1), np.float32(0)
FIXED = np.float32(FIXED_POINT_ONE)
MOST = np.float32(ALWAYS_PRIMARY)
(
    STEPS,
    ROWS,
    REROUTED,
    CRITICAL,
    DROPPED,
    MERGED,
    ACTIVE,
    ACTIVE_AFTER,
    LARGEST_RANK,
    LARGEST_RANK_AFTER,
    DOMAINS,
    DOMAINS_AFTER,
    REMOTE_DOMAINS,
    REMOTE_DOMAINS_AFTER,
    REMOTE_SLOTS,
    REMOTE_SLOTS_AFTER,
    ESTIMATED_ERROR,
) = range(len(COUNTERS))


class Slots(NamedTuple):
    """A step's own copies of weights and ids, which are rewritten, and its masks. `home_T` is empty where no token has
    a home, `chance_T` where no token is a draft, `runs_T` where no other row's experts count."""

    weights_TK: np.ndarray
    ids_TK: np.ndarray
    valid_T: np.ndarray
    home_T: np.ndarray
    chance_T: np.ndarray
    runs_T: np.ndarray


class Tables(NamedTuple):
    """A layer's tables. Those that there is no use for are empty: coefficients and sizes under the paper's policy,
    ranks and domains where one rank holds all experts."""

    neighbors_EE: np.ndarray  # every row: all experts, the most similar first
    ranked_EE: np.ndarray  # their similarities
    coefficient_EE: np.ndarray
    size_E: np.ndarray
    rank_E: np.ndarray
    domain_E: np.ndarray


# What stands in a layer's `numbers`, all as float64.
SELECT_TOP_K, THRESHOLD, EXPERT_PRICE, BALANCE_PRICE, TRAFFIC_PRICE, MIN_ROWS, MAX_ROWS, MERGES = range(8)


def compiled(function: Callable) -> Callable:
    """Compiles a function when it is first called, or takes what an earlier process compiled."""
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # no folder can be written
        return numba.njit(function)


@compiled
def rank_slots(weights_K, ranks_K):
    """Sets `ranks_K`: how many of the token's slots come first, the heavier ones, and of equal ones the earlier."""
    for mine in range(len(weights_K)):
        weight, rank = weights_K[mine], 0
        for other in range(len(weights_K)):
            its = weights_K[other]
            # Like torch's sort: NaN is the largest, and equal to NaN.
            is_nan, its_nan = weight != weight, its != its
            comes_first = (its_nan and not is_nan) or its > weight
            is_equal = its == weight or (is_nan and its_nan)
            rank += comes_first or (is_equal and other < mine)
        ranks_K[mine] = rank


@compiled
def in_fixed_point(error, chance_T, token):
    """Returns an error times the chance of its token as a whole number; 0 for NaN."""
    if len(chance_T):
        error = error * chance_T[token]
    error = np.rint(error * FIXED)
    return np.int64(min(error, MOST)) if error > ZERO else np.int64(0)


@compiled
def in_force(numbers, num_slots, has_prices):
    """Returns whether the settings may change a token: `projection.in_force`."""
    select_top_k = np.int64(numbers[SELECT_TOP_K])
    if select_top_k == 0:
        return has_prices and numbers[EXPERT_PRICE] > 0
    return 0 < select_top_k < num_slots


@compiled
def vote(slots, size_E, numbers, losses_E, chosen_E):
    """Adds each expert's loss to `losses_E`, and marks the experts that valid tokens chose. Returns the valid rows."""
    weights_TK, ids_TK, valid_T, _home_T, chance_T, runs_T = slots
    num_slots, num_experts, rows = ids_TK.shape[1], len(losses_E), 0
    select_top_k = np.int64(numbers[SELECT_TOP_K])
    counts_losses = len(size_E) > 0 and numbers[EXPERT_PRICE] > 0
    ranks_K, heaviest_E = np.empty(num_slots, dtype=np.int64), np.zeros(num_experts, dtype=np.bool_)
    is_on = in_force(numbers, num_slots, len(size_E) > 0)
    for token in range(len(ids_TK)):
        if is_on and len(size_E) and len(runs_T) and runs_T[token]:
            for expert in ids_TK[token]:
                if 0 <= expert < num_experts:
                    heaviest_E[expert] = True
        if not valid_T[token]:
            continue
        rows += 1
        if is_on:
            rank_slots(weights_TK[token], ranks_K)
        for slot in range(num_slots):
            expert = ids_TK[token, slot]
            if expert < 0 or expert >= num_experts:
                continue
            chosen_E[expert] = True
            if not is_on:
                continue
            if ranks_K[slot] < select_top_k:
                heaviest_E[expert] = True
            elif counts_losses:
                weight = weights_TK[token, slot]
                losses_E[expert] += in_fixed_point((weight * weight) * size_E[expert], chance_T, token)
    for expert in range(num_experts):
        if heaviest_E[expert]:
            losses_E[expert] = ALWAYS_PRIMARY
    return rows


@compiled
def substitute_of(expert, tables, primary_E, threshold):
    """Returns the expert's most similar primary expert and that similarity; NO_SUBSTITUTE where it is critical."""
    for place in range(len(primary_E)):
        neighbor = tables.neighbors_EE[expert, place]
        if primary_E[neighbor]:
            similarity = tables.ranked_EE[expert, place]
            if threshold > ZERO and similarity < threshold and not primary_E[expert]:
                return NO_SUBSTITUTE, ZERO
            return np.int64(neighbor), similarity
    return NO_SUBSTITUTE, ZERO


@compiled
def comes_before(left_E, other, expert):
    """Returns whether more is left of the loss without `other`; of equal ones the lower id comes first."""
    return left_E[other] > left_E[expert] or (left_E[other] == left_E[expert] and other < expert)


@compiled
def mark_primary(losses_E, tables, expert_price, balance_price, one_runs):
    """Returns bool [E], the primary experts: those that run in any case, and those that are worth the prices. With
    `one_runs`, and if none is worth them, it is the one with the largest loss."""
    must_E = losses_E >= ALWAYS_PRIMARY
    if expert_price == 0:
        return must_E
    num_experts = len(losses_E)
    left_E, worth_E = np.zeros(num_experts, dtype=np.float32), np.zeros(num_experts, dtype=np.int64)
    for expert in range(num_experts):
        if must_E[expert]:
            left_E[expert], worth_E[expert] = np.inf, ALWAYS_PRIMARY
        elif losses_E[expert] >= expert_price:
            best = max(substitute_of(expert, tables, must_E, ZERO)[1], ZERO)
            left_E[expert] = np.float32(losses_E[expert]) * (ONE - best)
    for expert in range(num_experts):
        if must_E[expert] or np.int64(left_E[expert]) < expert_price:
            continue
        best = ZERO
        for place in range(num_experts):
            if comes_before(left_E, np.int64(tables.neighbors_EE[expert, place]), expert):
                best = max(tables.ranked_EE[expert, place], ZERO)
                break
        worth_E[expert] = np.int64(np.float32(losses_E[expert]) * (ONE - best))
    primary_E = worth_E >= expert_price
    if one_runs and not primary_E.any() and losses_E.max() > 0:
        first = losses_E.astype(np.float32).argmax()  # as the others are ordered: by float32, then by id
        primary_E[first], worth_E[first] = True, ALWAYS_PRIMARY
    if balance_price > 0:
        drop_places(worth_E, primary_E, tables.rank_E, expert_price, balance_price)
    return primary_E


@compiled
def drop_places(worth_E, primary_E, rank_E, expert_price, balance_price):
    """Leaves those of the primary experts that are worth their place on their rank: `balance.balanced_primary`."""
    num_experts = len(worth_E)
    place_E, worth_of_place_E = np.zeros(num_experts, dtype=np.int64), np.zeros(num_experts, dtype=np.int64)
    for expert in range(num_experts):
        if not primary_E[expert]:
            continue
        place = 0
        for other in range(num_experts):
            place += primary_E[other] and rank_E[other] == rank_E[expert] and comes_before(worth_E, other, expert)
        worth = worth_E[expert]
        place_E[expert] = place
        worth_of_place_E[place] += worth if worth >= ALWAYS_PRIMARY else worth - expert_price
    for expert in range(num_experts):
        place = place_E[expert]
        primary_E[expert] = primary_E[expert] and (place == 0 or worth_of_place_E[place] >= balance_price)


@compiled
def is_among(domain, visits_K, home):
    if domain == home:
        return True
    for visited in visits_K:  # noqa: SIM110  Numba compiles no generator
        if visited == domain:
            return True
    return False


@compiled
def count_visits(visits_K, home, counters, when):
    """Counts the domains that a token's slots visit: each once, and as remote unless it is the token's home."""
    for slot in range(len(visits_K)):
        domain = visits_K[slot]
        if domain == NOWHERE:
            continue
        is_new = True
        for earlier in range(slot):
            is_new = is_new and visits_K[earlier] != domain
        is_remote = domain != home
        counters[DOMAINS + when] += is_new
        counters[REMOTE_DOMAINS + when] += is_new and is_remote
        counters[REMOTE_SLOTS + when] += is_remote


@compiled
def cheapest(expert, loss, choice, similarity, tables, primary_E, price, visits_K, home, may_drop):
    """Returns the expert that takes a slot, or -1 if it may be dropped and that costs less, and the error that this
    makes. Costs rise as similarity falls, so only two experts can be the cheapest: the most similar one, and the most
    similar one in a domain that is visited anyway."""
    least = error = loss * (ONE - similarity)
    if price > ZERO and len(tables.domain_E) and not is_among(tables.domain_E[choice], visits_K, home):
        least = least + price
        for place in range(len(primary_E)):
            neighbor = tables.neighbors_EE[expert, place]
            if primary_E[neighbor] and is_among(tables.domain_E[neighbor], visits_K, home):
                cost = loss * (ONE - tables.ranked_EE[expert, place])
                if cost < least:  # of equal costs the larger similarity wins: the choice so far came first
                    least, error, choice = cost, cost, np.int64(neighbor)
                break
    return (np.int64(-1), loss) if may_drop and loss < least else (choice, error)


@compiled
def find_visits(ids_K, domain_E, visits_K):
    """Sets the domain that each slot visits."""
    for slot in range(len(ids_K)):
        visits_K[slot] = domain_E[ids_K[slot]] if 0 <= ids_K[slot] < len(domain_E) else NOWHERE


@compiled
def merge(weights_K, ids_K):
    """Leaves each expert in its first slot, with the sum of its weights. Returns how many slots that emptied."""
    merged = 0
    for slot in range(len(ids_K)):
        if ids_K[slot] < 0:
            continue
        for later in range(slot + 1, len(ids_K)):
            if ids_K[later] == ids_K[slot]:
                weights_K[slot] = weights_K[slot] + weights_K[later]
                weights_K[later], ids_K[later] = ZERO, -1
                merged += 1
    return merged


@compiled
def settle(slots, tables, primary_E, numbers, acts, runs_E, counters):
    """Rewrites the valid tokens' slots in place, marks the experts that run, and counts slots and visits."""
    weights_TK, ids_TK, valid_T, home_T, chance_T, _runs_T = slots
    num_slots, num_experts = ids_TK.shape[1], len(primary_E)
    select_top_k, merges = np.int64(numbers[SELECT_TOP_K]), numbers[MERGES] > 0
    threshold, price = np.float32(numbers[THRESHOLD]), np.float32(numbers[TRAFFIC_PRICE])
    has_prices, has_domains, has_homes = len(tables.size_E) > 0, len(tables.domain_E) > 0, len(home_T) > 0
    ranks_K, outcome_K = np.empty(num_slots, dtype=np.int64), np.empty(num_slots, dtype=np.int64)
    visits_K, new_weights_K = np.empty(num_slots, dtype=np.int64), np.empty(num_slots, dtype=np.float32)
    substitute_E, similarity_E = np.full(num_experts, NOT_LOOKED_UP), np.empty(num_experts, dtype=np.float32)
    for token in range(len(ids_TK)):
        if not valid_T[token]:
            continue
        home = np.int64(home_T[token]) if has_homes else NOWHERE
        if has_domains:
            find_visits(ids_TK[token], tables.domain_E, visits_K)
            count_visits(visits_K, home, counters, 0)
            if not acts:
                count_visits(visits_K, home, counters, 1)
        if not acts:
            continue
        heaviest_slot = 0
        if has_prices:
            rank_slots(weights_TK[token], ranks_K)
        for slot in range(num_slots):
            expert, weight = np.int64(ids_TK[token, slot]), weights_TK[token, slot]
            if not 0 <= expert < num_experts:
                expert = -1
            outcome_K[slot], new_weights_K[slot] = expert, weight
            if has_prices and ranks_K[slot] == 0:
                heaviest_slot = slot
            stays = expert < 0 or (ranks_K[slot] < select_top_k if has_prices else primary_E[expert])
            if not stays:
                if substitute_E[expert] == NOT_LOOKED_UP:
                    found = substitute_of(expert, tables, primary_E, threshold)
                    substitute_E[expert], similarity_E[expert] = found
                stays = substitute_E[expert] == NO_SUBSTITUTE
                counters[CRITICAL] += stays
            if stays:
                ranks_K[slot] = -1  # it has no turn below
            elif not has_prices:
                outcome_K[slot] = substitute_E[expert]
            else:
                visits_K[slot] = NOWHERE  # until it is settled
        if has_prices:
            for turn in range(select_top_k, num_slots):  # by weight: a slot's choice may add a domain for the next
                for slot in range(num_slots):
                    if ranks_K[slot] != turn:
                        continue
                    expert, weight = outcome_K[slot], weights_TK[token, slot]
                    loss, nearest = (weight * weight) * tables.size_E[expert], substitute_E[expert]
                    choice, error = cheapest(
                        expert, loss, nearest, similarity_E[expert], tables, primary_E, price, visits_K, home, turn > 0
                    )
                    outcome_K[slot] = choice
                    if choice != expert:
                        counters[ESTIMATED_ERROR] += in_fixed_point(error, chance_T, token)
                    if choice < 0:
                        new_weights_K[slot] = ZERO
                    elif choice != expert:
                        new_weights_K[slot] = weight * tables.coefficient_EE[expert, choice]
                    if has_domains and choice >= 0:
                        visits_K[slot] = tables.domain_E[choice]
        for slot in range(num_slots):
            before, after = ids_TK[token, slot], outcome_K[slot]
            if after >= 0:
                runs_E[after] = True
                counters[REROUTED] += after != before
            elif 0 <= before < num_experts:
                counters[DROPPED] += 1
        if merges:
            counters[MERGED] += merge(new_weights_K, outcome_K)
        if has_domains:
            find_visits(outcome_K, tables.domain_E, visits_K)
            count_visits(visits_K, home, counters, 1)
        for slot in range(num_slots):
            if 0 <= ids_TK[token, slot] < num_experts:
                weights_TK[token, slot] = new_weights_K[slot]
                repeats = outcome_K[slot] < 0 and not merges
                ids_TK[token, slot] = outcome_K[heaviest_slot] if repeats else outcome_K[slot]


@compiled
def count_experts(active_E, rank_E, num_ranks, counters, when):
    """Counts the active experts, and those of the largest rank; behind the counters, those of every rank at the end."""
    by_rank_R = np.zeros(max(num_ranks, 1), dtype=np.int64)
    for expert in range(len(active_E)):
        if not active_E[expert]:
            continue
        rank = np.int64(rank_E[expert]) if num_ranks else 0
        if 0 <= rank < len(by_rank_R):
            by_rank_R[rank] += 1
    counters[ACTIVE + when] += by_rank_R.sum()
    counters[LARGEST_RANK + when] += by_rank_R.max()
    if when == 1:
        for rank in range(num_ranks):
            counters[len(COUNTERS) + rank] += by_rank_R[rank]


@compiled
def finish(slots, tables, numbers, rows, losses_E, chosen_E, counters):
    """Re-routes and counts a step, by the losses of all ranks."""
    if rows == 0:
        return
    select_top_k = np.int64(numbers[SELECT_TOP_K])
    prices = np.int64(numbers[EXPERT_PRICE]), np.int64(numbers[BALANCE_PRICE])
    primary_E = mark_primary(losses_E, tables, prices[0], prices[1], select_top_k == 0)
    is_on = (
        in_force(numbers, slots.ids_TK.shape[1], len(tables.size_E) > 0)
        and numbers[MIN_ROWS] <= rows <= numbers[MAX_ROWS]
    )
    acts = is_on and primary_E.any()
    runs_E = np.zeros(len(losses_E), dtype=np.bool_) if acts else chosen_E
    counters[STEPS] += 1
    counters[ROWS] += rows
    if acts or len(tables.domain_E):
        settle(slots, tables, primary_E, numbers, acts, runs_E, counters)
    num_ranks = len(counters) - len(COUNTERS)
    count_experts(chosen_E, tables.rank_E, num_ranks, counters, 0)
    count_experts(runs_E, tables.rank_E, num_ranks, counters, 1)


@compiled
def reroute_alone(slots, tables, numbers, counters):
    """Re-routes and counts a step in place, where no other rank has a say in what is primary."""
    losses_E = np.zeros(len(tables.neighbors_EE), dtype=np.int64)
    chosen_E = np.zeros(len(tables.neighbors_EE), dtype=np.bool_)
    rows = vote(slots, tables.size_E, numbers, losses_E, chosen_E)
    finish(slots, tables, numbers, rows, losses_E, chosen_E, counters)


class CpuLayer:
    """One MoE layer's tables, settings and counters, and what re-routes its steps. Off until the settings are set.

    Attributes:
        counters: int64 [len(COUNTERS) + num_ranks], summed over the steps; see `counters.count_step`.
    """

    def __init__(self, tables: LayerTables, places: ExpertPlaces | None = None, *, merges: bool = False):
        """With coefficients and sizes the layer follows policy projection, otherwise the paper's.

        Args:
            tables: on the CPU.
            places: where experts live; its tensors may be changed in place between steps. None: one rank holds all.
            merges: what a step ends in: `slots.merge_repeats`, or `slots.fill_dropped`.
        """
        places = places or ExpertPlaces()
        similarity_EE, coefficient_EE, size_E = tables.similarity_EE.float(), torch.empty(0, 0), torch.empty(0)
        if tables.coefficient_EE is not None and tables.size_E is not None:
            similarity_EE, coefficient_EE, size_E = projection_tables(tables)
        neighbors_EE, ranked_EE = ranked_neighbors(similarity_EE)
        self.counters = torch.zeros(len(COUNTERS) + places.num_ranks, dtype=torch.int64)
        of_layer = (neighbors_EE.short(), ranked_EE, coefficient_EE, size_E)
        where = (_integers(places.rank_E), _integers(places.domain_E))
        self._tables = Tables(*(table.contiguous().numpy() for table in (*of_layer, *where)))
        self._counters, self._numbers = self.counters.numpy(), np.zeros(8)
        self._numbers[MERGES] = merges

    def set(self, settings: Settings, *, enabled: bool = True, min_rows: int = 0, max_rows: int | None = None) -> None:
        """Sets the settings, whether re-routing is on, and the valid rows of a step between which it is."""
        select_top_k = settings.select_top_k if enabled else -1
        most = np.inf if max_rows is None else max_rows
        place = to_fixed_point(settings.balance_price) if len(self._tables.rank_E) else 0
        expert = to_fixed_point(settings.expert_price) or min(place, 1)  # as `projection.price_of_an_expert`
        prices = expert, place, settings.traffic_price
        self._numbers[:MERGES] = select_top_k, settings.threshold, *prices, min_rows, most

    def reroute(
        self, step: Step, all_reduce: Callable[[torch.Tensor], None] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns new weights and ids [T, K], and counts the step. The inputs are not changed.

        Args:
            step: float32 weights, int32 or int64 ids; the masks may be longer than the step.
            all_reduce: where ranks share one primary set: puts the sum over all ranks of the losses, int64 [E], in
                their place. Called once in every call, whatever the settings and the rows: the other ranks wait.
        """
        weights, ids = step.weights_TK.clone(), step.ids_TK.clone()
        valid_T = np.ones(len(ids), dtype=bool) if step.valid_T is None else step.valid_T.numpy()
        home_T = NO_HOME if step.home_T is None else step.home_T.numpy()
        chance_T = NO_CHANCE if step.chance_T is None else step.chance_T.numpy()
        runs_T = NO_ROW if step.runs_T is None else step.runs_T.numpy()
        slots = Slots(weights.numpy(), ids.numpy(), valid_T, home_T, chance_T, runs_T)
        if all_reduce is None:
            reroute_alone(slots, self._tables, self._numbers, self._counters)
            return weights, ids
        num_experts = len(self._tables.neighbors_EE)
        losses_E, chosen_E = torch.zeros(num_experts, dtype=torch.int64), np.zeros(num_experts, dtype=bool)
        rows = vote(slots, self._tables.size_E, self._numbers, losses_E.numpy(), chosen_E)
        all_reduce(losses_E)
        finish(slots, self._tables, self._numbers, rows, losses_E.numpy(), chosen_E, self._counters)
        return weights, ids


def _integers(table_E: torch.Tensor | None) -> torch.Tensor:
    """Returns a table of places as int16, the very tensor where it is that; an empty one for None."""
    return torch.empty(0, dtype=torch.int16) if table_E is None else table_E.short()

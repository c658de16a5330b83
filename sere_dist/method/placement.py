"""Which rank should hold which expert, so that a token's experts are on few ranks and the ranks' loads are even.

Under a traffic price a token's lesser slots go where its primary experts are. What it still sends is then decided by
whether its primary experts share a rank. So experts of high affinity, those that tokens use together, should share one,
or at least a node. Where ranks have room for more, experts of high load get replicas, among which a token's load is
split evenly, as vLLM's EPLB does it.

Pure functions on tensors. Shape suffixes: E experts of the layer, P physical experts (with replicas), R ranks.
"""

import torch

MAX_LOAD = 1.1  # default: tokens routed to the largest rank's experts, over the mean of the ranks
STARTS, MANY_EXPERTS = 4, 256  # searches for a map; more gain little. Of layers with more experts: one, it takes longer
SWAPS_OF_A_RANK = 4  # experts that a round of swaps looks at first, for each rank
APART = -1e3  # affinity of two replicas of an expert, by the largest of two experts


def linear_ranks(num_experts: int, num_ranks: int) -> torch.Tensor:
    """Returns int64 [E], vLLM's linear placement: E // R experts in a row on each rank, one more on the first E % R."""
    sizes_R = torch.full((num_ranks,), num_experts // num_ranks) + (torch.arange(num_ranks) < num_experts % num_ranks)
    return torch.arange(num_ranks).repeat_interleave(sizes_R)


def rank_loads(load_E: torch.Tensor, rank_E: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Returns float64 [R]: the load of each rank relative to the mean."""
    load_R = torch.zeros(num_ranks, dtype=torch.float64).index_add_(0, rank_E, load_E.double())
    return load_R / load_R.mean()


def share_within_ranks(affinity_EE: torch.Tensor, rank_E: torch.Tensor) -> float:
    """Returns the share of the affinity between different experts that lies within ranks."""
    between_EE = affinity_EE.double().clone().fill_diagonal_(0)
    total = between_EE.sum()
    return float((between_EE * (rank_E[:, None] == rank_E)).sum() / total) if total > 0 else 0.0


def expected_remote_domains(affinity_EE: torch.Tensor, rank_E: torch.Tensor, num_ranks: int) -> float:
    """Returns how many ranks other than its own a token visits if two experts serve it, any pair as often as it has
    affinity, and its own rank is any of them.
    """
    return (1 - 1 / num_ranks) * (2 - share_within_ranks(affinity_EE, rank_E))


def rank_sizes(num_experts: int, num_ranks: int) -> torch.Tensor:
    """Returns int64 [R]: how many experts each rank holds under linear placement."""
    return linear_ranks(num_experts, num_ranks).bincount(minlength=num_ranks)


def spread_by_load(load_E: torch.Tensor, room_R: torch.Tensor, logical_E: torch.Tensor | None = None) -> torch.Tensor:
    """Returns int64 [E]: each expert, the heaviest first, on the least loaded rank that has room.

    Args:
        load_E: [E], at least 0.
        room_R: how many experts each rank holds.
        logical_E: which experts are replicas of one. A rank gets a second one only where there is no other room.
    """
    room, load = room_R.tolist(), [0.0] * len(room_R)
    holders: dict[int, set[int]] = {}
    loads, logical = load_E.tolist(), list(range(len(load_E))) if logical_E is None else logical_E.tolist()
    rank_E = torch.empty(len(load_E), dtype=torch.int64)
    for expert in load_E.argsort(descending=True, stable=True).tolist():
        taken = holders.setdefault(logical[expert], set())
        free = [rank for rank, left in enumerate(room) if left]
        rank = min([rank for rank in free if rank not in taken] or free, key=load.__getitem__)
        taken.add(rank)
        room[rank] -= 1
        load[rank] += loads[expert]
        rank_E[expert] = rank
    return rank_E


def lower_peak(
    load_E: torch.Tensor,
    rank_E: torch.Tensor,
    num_ranks: int,
    logical_E: torch.Tensor | None = None,
    enough: float = 1.0,
) -> torch.Tensor:
    """Returns int64 [E]: `rank_E` after swaps with the most loaded rank, until it carries no more than `enough` times
    the mean, or none lowers its load.

    No swap brings two replicas of an expert (`logical_E`) to one rank.
    """
    load_E, rank_E = load_E.double(), rank_E.clone()
    load_R = torch.zeros(num_ranks, dtype=torch.float64).index_add_(0, rank_E, load_E)
    least = 1e-9 * float(load_R.mean())  # less is rounding, and could be gained for ever
    while load_R.max() > enough * load_R.mean():
        peak = int(load_R.argmax())
        own = (rank_E == peak).nonzero().flatten()
        less_AE = load_E[own][:, None] - load_E  # what the peak loses with the swap, and the other rank gains
        worst_AE = torch.maximum(load_R[peak] - less_AE, load_R[rank_E] + less_AE)
        worst_AE[:, own] = torch.inf
        if logical_E is not None:
            worst_AE.masked_fill_(_clashes(rank_E, logical_E, own), torch.inf)
        if worst_AE.min() >= load_R[peak] - least:
            break
        row, j = divmod(int(worst_AE.argmin()), len(rank_E))
        i = int(own[row])
        rank_E[[i, j]] = rank_E[[j, i]]
        load_R = torch.zeros(num_ranks, dtype=torch.float64).index_add_(0, rank_E, load_E)
    return rank_E


def _clashes(rank_E: torch.Tensor, logical_E: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Returns bool [A, E]: swaps of an expert of a rank (`own` [A]) with any, after which one has two replicas."""
    theirs_AE = logical_E[own][:, None] == logical_E  # replicas of those that would leave
    ranks_AR = torch.zeros(len(own), int(rank_E.max()) + 1).index_add_(1, rank_E, theirs_AE.float()) > 0
    comes_AE = ranks_AR[:, rank_E]  # the rank that would get it has one
    here_E = torch.isin(logical_E, logical_E[own])  # the rank that would get this one has one
    return comes_AE | here_E


def swap_experts(
    affinity_EE: torch.Tensor, load_E: torch.Tensor, rank_E: torch.Tensor, num_ranks: int, max_load: float
) -> torch.Tensor:
    """Returns int64 [E]: `rank_E` after swaps of two experts, until none brings more together.

    Swaps are made in rounds: the best first, and no rank twice in a round, so that none changes what another one gains.
    Of many experts a round looks at those that gain most elsewhere, and at all where these find nothing.
    `affinity_EE` is symmetric. Only swaps that leave both ranks with at most `max_load` times the mean load count.
    """
    affinity_EE = affinity_EE.double().clone().fill_diagonal_(0)
    affinity_EE /= affinity_EE.max().clamp(min=1e-30)
    load_E = load_E.double() / (load_E.double().sum() / num_ranks).clamp(min=1e-30)  # a rank's mean load is 1
    rank_E = rank_E.clone()
    while True:
        load_R = torch.zeros(num_ranks, dtype=torch.float64).index_add_(0, rank_E, load_E)
        to_rank_ER = torch.zeros(len(rank_E), num_ranks, dtype=torch.float64).index_add_(1, rank_E, affinity_EE)
        moves_ER = to_rank_ER - to_rank_ER.gather(1, rank_E[:, None])  # what an expert gains on another rank
        found = {}
        few = len(rank_E) if len(rank_E) <= MANY_EXPERTS else min(SWAPS_OF_A_RANK * num_ranks, len(rank_E))
        for count in dict.fromkeys((few, len(rank_E))):
            own_A = moves_ER.amax(dim=1).topk(count).indices
            # A swap is two moves; the affinity of the two themselves is not gained.
            gain_AE = moves_ER[own_A][:, rank_E] + moves_ER.T[rank_E[own_A]] - 2 * affinity_EE[own_A]
            more_AE = load_E - load_E[own_A][:, None]  # load that the rank of the first gets
            larger_AE = torch.maximum(load_R[rank_E[own_A]][:, None] + more_AE, load_R[rank_E] - more_AE)
            allowed_AE = (larger_AE <= max_load + 1e-9) & (rank_E[own_A][:, None] != rank_E)
            best_A = gain_AE.masked_fill_(~allowed_AE, -torch.inf).max(dim=1)
            order = best_A.values.argsort(descending=True, stable=True)
            order = order[best_A.values[order] > 1e-9]  # less is rounding, and could be gained for ever
            if len(order):
                found = dict(zip(own_A[order].tolist(), best_A.indices[order].tolist(), strict=True))
                break
        if not found:
            return rank_E
        ranks, busy = rank_E.tolist(), set()
        for i, j in found.items():
            if not busy & {ranks[i], ranks[j]}:
                busy |= {ranks[i], ranks[j]}
                rank_E[i], rank_E[j] = ranks[j], ranks[i]


def _together(
    affinity_EE: torch.Tensor,
    load_E: torch.Tensor,
    room_R: torch.Tensor,
    max_load: float,
    starts: int,
    logical_E: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the map of `place` for ranks, or nodes, that have this room."""
    num_ranks = len(room_R)
    even_E = lower_peak(load_E, spread_by_load(load_E, room_R, logical_E), num_ranks, logical_E)
    limit = max(max_load, float(rank_loads(load_E, even_E, num_ranks).max()))
    random, best_E, most = torch.Generator().manual_seed(0), even_E, -1.0
    apart_EE = affinity_EE.clamp(max=0)  # of replicas
    for start in range(starts):
        start_E = even_E
        if start > 0:
            chance_EE = torch.rand(affinity_EE.shape, generator=random)
            start_E = swap_experts(chance_EE + chance_EE.T + apart_EE, load_E, even_E, num_ranks, limit)
        rank_E = swap_experts(affinity_EE, load_E, start_E, num_ranks, limit)
        if (share := share_within_ranks(affinity_EE, rank_E)) > most:
            best_E, most = rank_E, share
    return best_E


def place(
    affinity_EE: torch.Tensor,
    load_E: torch.Tensor,
    num_ranks: int,
    max_load: float = MAX_LOAD,
    starts: int | None = None,
    num_nodes: int = 1,
    logical_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns int64 [E]: the rank of each expert, so that experts of high affinity share one and loads are even.

    Args:
        affinity_EE: [E, E], at least 0: what is gained by having two experts on one rank.
        load_E: [E], at least 0: what each expert adds to the load of its rank.
        num_ranks: R; each gets as many experts as under linear placement.
        max_load: the most that a rank may carry, relative to the mean; where loads can't be spread so evenly, what the
            most even map that is found comes to.
        starts: searches, the first from the most even map and others from random ones within the limit; the best end is
            returned, the same in every run. None: as many as are worth their time.
        num_nodes: nodes of as many ranks each, in order. Experts of high affinity come to one node first, and to one of
            its ranks then. A node may carry half of what is above the mean.
        logical_E: which experts are replicas of one: these are kept on different ranks, and nodes.
    """
    starts = starts or (STARTS if len(load_E) <= MANY_EXPERTS else 1)
    affinity_EE = (affinity_EE.double() + affinity_EE.T) / 2
    if logical_E is not None:
        replicas_EE = logical_E[:, None] == logical_E
        affinity_EE = affinity_EE.masked_fill(replicas_EE, 0)
        affinity_EE = affinity_EE.masked_fill(replicas_EE, APART * float(affinity_EE.max().clamp(min=1e-30)))
        affinity_EE.fill_diagonal_(0)
    room_R = rank_sizes(len(load_E), num_ranks)
    if num_nodes == 1:
        return _together(affinity_EE, load_E, room_R, max_load, starts, logical_E)
    by_node_NR = room_R.view(num_nodes, -1)
    node_E = _together(affinity_EE, load_E, by_node_NR.sum(dim=1), (1 + max_load) / 2, starts, logical_E)
    rank_E, ranks = torch.empty_like(node_E), by_node_NR.shape[1]
    for node in range(num_nodes):
        own = (node_E == node).nonzero().flatten()
        mean = float(load_E[own].double().sum() * num_nodes / load_E.double().sum().clamp(min=1e-30))
        part = (affinity_EE[own][:, own], load_E[own], by_node_NR[node], max_load / max(mean, 1e-30), starts)
        rank_E[own] = node * ranks + _together(*part, None if logical_E is None else logical_E[own])
    rank_E = lower_peak(load_E, rank_E, num_ranks, logical_E, enough=max_load)
    return _swap_ranks(affinity_EE, load_E, rank_E, room_R, num_nodes, (1 + max_load) / 2)


def _swap_ranks(
    affinity_EE: torch.Tensor,
    load_E: torch.Tensor,
    rank_E: torch.Tensor,
    room_R: torch.Tensor,
    num_nodes: int,
    max_load: float,
) -> torch.Tensor:
    """Returns `rank_E` after swaps of whole ranks between nodes, which swaps of experts do not find.

    Where ranks hold unequal numbers of experts they stay where they are.
    """
    if len(room_R.unique()) > 1:
        return rank_E
    num_ranks = len(room_R)
    member_RE = torch.nn.functional.one_hot(rank_E, num_ranks).T.double()
    between_RR, load_R = member_RE @ affinity_EE @ member_RE.T, member_RE @ load_E.double()
    node_R = torch.arange(num_ranks) // (num_ranks // num_nodes)
    limit = max(max_load, float(rank_loads(load_R, node_R, num_nodes).max()))
    node_R = swap_experts(between_RR, load_R, node_R, num_nodes, limit)
    return node_R.argsort(stable=True).argsort()[rank_E]  # the ranks of a node in a row


def replicate(load_E: torch.Tensor, redundant: int, most: int) -> torch.Tensor:
    """Returns int64 [P], sorted: the logical expert of each physical one, with `redundant` replicas more than experts.

    One after the other, the expert whose replicas carry most gets one more, up to `most` replicas: then the largest
    load of a replica is as small as it can be.
    """
    count_E = torch.ones(len(load_E), dtype=torch.int64)
    for _ in range(redundant):
        each_E = (load_E.double() / count_E).masked_fill(count_E >= most, -1)
        count_E[each_E.argmax()] += 1
    return torch.arange(len(load_E)).repeat_interleave(count_E)


def place_replicas(
    affinity_EE: torch.Tensor,
    load_E: torch.Tensor,
    num_ranks: int,
    redundant: int,
    max_load: float = MAX_LOAD,
    num_nodes: int = 1,
) -> torch.Tensor:
    """Returns int64 [P]: the logical expert in each physical place, ranks in order, as vLLM's EPLB has it.

    Arguments as in `place`; `redundant` is P - E. A token uses one of an expert's replicas, any of them as often.
    """
    logical_P = replicate(load_E, redundant, most=num_ranks)
    rank_P = place(*of_replicas(affinity_EE, load_E, logical_P), num_ranks, max_load, None, num_nodes, logical_P)
    return logical_P[rank_P.argsort(stable=True)]


def of_replicas(
    affinity_EE: torch.Tensor, load_E: torch.Tensor, logical_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the affinity [P, P] and the load [P] of physical experts, where tokens use replicas equally often."""
    share_P = 1 / logical_P.bincount()[logical_P].double()
    affinity_PP = affinity_EE.double()[logical_P][:, logical_P] * share_P[:, None] * share_P
    return affinity_PP.masked_fill(logical_P[:, None] == logical_P, 0), load_E[logical_P] * share_P

"""Which rank should hold which expert, so that a token's experts are on few ranks and the ranks' loads are even.

Under a traffic price a token's lesser slots go where its primary experts are. What it still sends is then decided by
whether its primary experts share a rank. So experts of high affinity, those that tokens use together, should share one.

Pure functions on tensors. Shape suffixes: E experts of the layer, R ranks.
"""

import torch

MAX_LOAD = 1.1  # default: tokens routed to the largest rank's experts, over the mean of the ranks
STARTS = 4  # searches for a map; more gain little


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


def spread_by_load(load_E: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Returns int64 [E]: each expert, the heaviest first, on the least loaded rank that has room.

    Ranks have room for as many experts as linear placement gives them.
    """
    room_R = linear_ranks(len(load_E), num_ranks).bincount(minlength=num_ranks)
    load_R = torch.zeros(num_ranks, dtype=torch.float64)
    rank_E = torch.empty(len(load_E), dtype=torch.int64)
    for expert in load_E.argsort(descending=True, stable=True).tolist():
        rank = int(load_R.masked_fill(room_R == 0, torch.inf).argmin())
        rank_E[expert] = rank
        room_R[rank] -= 1
        load_R[rank] += load_E[expert]
    return rank_E


def swap_experts(
    affinity_EE: torch.Tensor, load_E: torch.Tensor, rank_E: torch.Tensor, num_ranks: int, max_load: float
) -> torch.Tensor:
    """Returns int64 [E]: `rank_E` after swaps of two experts, the best first, until none brings more together.

    `affinity_EE` is symmetric. Only swaps that leave both ranks with at most `max_load` times the mean load count.
    """
    affinity_EE = affinity_EE.double().clone().fill_diagonal_(0)
    affinity_EE /= affinity_EE.max().clamp(min=1e-30)
    load_E = load_E.double() / (load_E.double().sum() / num_ranks).clamp(min=1e-30)  # a rank's mean load is 1
    rank_E = rank_E.clone()
    while True:
        load_R = torch.zeros(num_ranks, dtype=torch.float64).index_add_(0, rank_E, load_E)
        to_rank_ER = torch.zeros(len(rank_E), num_ranks, dtype=torch.float64).index_add_(1, rank_E, affinity_EE)
        # What expert i gains on the rank of j. A swap is two moves; the affinity of the two themselves is not gained.
        moves_EE = to_rank_ER[:, rank_E] - to_rank_ER.gather(1, rank_E[:, None])
        gain_EE = moves_EE + moves_EE.T - 2 * affinity_EE
        fits_EE = load_R[rank_E][:, None] - load_E[:, None] + load_E <= max_load + 1e-9  # the rank of i, with j for i
        allowed_EE = fits_EE & fits_EE.T & (rank_E[:, None] != rank_E)
        gain_EE = gain_EE.masked_fill(~allowed_EE, -torch.inf)
        if gain_EE.max() <= 1e-9:  # less is rounding, and could be gained for ever
            return rank_E
        i, j = divmod(int(gain_EE.argmax()), len(rank_E))
        rank_E[[i, j]] = rank_E[[j, i]]


def place(
    affinity_EE: torch.Tensor, load_E: torch.Tensor, num_ranks: int, max_load: float = MAX_LOAD, starts: int = STARTS
) -> torch.Tensor:
    """Returns int64 [E]: the rank of each expert, so that experts of high affinity share one and loads are even.

    Args:
        affinity_EE: [E, E], at least 0: what is gained by having two experts on one rank.
        load_E: [E], at least 0: what each expert adds to the load of its rank.
        num_ranks: R; each gets as many experts as under linear placement.
        max_load: the most that a rank may carry, relative to the mean; where `spread_by_load` can't keep to it, what it
            comes to.
        starts: searches, from random maps within the limit; the best end is returned, the same in every run.
    """
    affinity_EE = (affinity_EE + affinity_EE.T) / 2
    even_E = spread_by_load(load_E, num_ranks)
    limit = max(max_load, float(rank_loads(load_E, even_E, num_ranks).max()))
    random, best_E, most = torch.Generator().manual_seed(0), even_E, -1.0
    for _ in range(starts):
        chance_EE = torch.rand(affinity_EE.shape, generator=random)
        start_E = swap_experts(chance_EE + chance_EE.T, load_E, even_E, num_ranks, limit)
        rank_E = swap_experts(affinity_EE, load_E, start_E, num_ranks, limit)
        if (share := share_within_ranks(affinity_EE, rank_E)) > most:
            best_E, most = rank_E, share
    return best_E

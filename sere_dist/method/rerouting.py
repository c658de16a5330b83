"""Re-routing (SERE, arXiv 2602.07616): send each token's lesser experts to similar ones that the batch runs anyway.

Pure functions on tensors: no Ray, vLLM, CUDA or files. Shape suffixes: T tokens in the step, K experts a token,
E experts of the layer. Every comparison is in float32, so that all backends agree to the bit;
`kernels/reroute.cu` computes the same on a GPU.
"""

import torch

# What `step_counts` counts in a step. Experts are those of valid rows; "before" is what the router chose, "after" what
# runs. The largest rank is the one with the most active experts; domains and slots are summed over tokens. A domain is
# remote if it is not the token's home.
COUNTERS = (
    "steps",
    "rows",
    "rerouted_slots",
    "critical_slots",
    "dropped_slots",
    "active_experts_before",
    "active_experts_after",
    "largest_rank_before",
    "largest_rank_after",
    "domains_before",
    "domains_after",
    "remote_domains_before",
    "remote_domains_after",
    "remote_slots_before",
    "remote_slots_after",
)

# What speaks for an expert to be primary, counted in integers: in whatever order they are added, the sum is the same.
FIXED_POINT_ONE = 2**24  # for an error of 1, in the unit of (w w) size
ALWAYS_PRIMARY = 2**40  # of a slot, or of a price


def slots_by_weight(topk_weights_TK: torch.Tensor) -> torch.Tensor:
    """Returns int64 [T, K]: each token's slots, the largest weight first (equal weights: the lower slot).

    The columns need not be sorted by weight: vLLM's CPU router and its grouped router return them unsorted.
    """
    return topk_weights_TK.float().sort(dim=1, descending=True, stable=True).indices


def primary_slots(topk_weights_TK: torch.Tensor, select_top_k: int) -> torch.Tensor:
    """Returns bool [T, K]: each token's `select_top_k` slots of largest weight."""
    return slots_by_weight(topk_weights_TK).argsort(dim=1) < select_top_k


def active_experts(topk_ids_TK: torch.Tensor, counted_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Returns bool [E]: the experts named in the slots of `counted_TK` (bool [T, K]); an id of -1 names none."""
    ids = torch.where(counted_TK & (topk_ids_TK >= 0), topk_ids_TK, num_experts).long()
    active = torch.zeros(num_experts + 1, dtype=torch.bool, device=topk_ids_TK.device)
    return active.index_fill(0, ids.flatten(), True)[:num_experts]


def to_fixed_point(expert_price: float) -> int:
    """Returns how many votes make an expert primary, 1 to ALWAYS_PRIMARY: the price rounded to float32, then in votes.

    No price (0) and one that is too large for votes are ALWAYS_PRIMARY: only a token's heaviest slots have that many.
    """
    votes = float(torch.tensor(expert_price, dtype=torch.float32)) * FIXED_POINT_ONE
    return max(1, round(min(votes, ALWAYS_PRIMARY))) if expert_price > 0 else ALWAYS_PRIMARY


def losses_without_each_expert(
    topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor, size_E: torch.Tensor, counted_TK: torch.Tensor
) -> torch.Tensor:
    """Returns int64 [E]: the error that the slots of `counted_TK` (bool [T, K]) would make without each expert.

    A slot's is (w w) size in float32, rounded to a whole number of votes (half to even; NaN: none).
    """
    num_experts, weights_TK = len(size_E), topk_weights_TK.float()
    losses_TK = (weights_TK * weights_TK) * size_E.float()[topk_ids_TK.clamp(min=0).long()]
    votes_TK = (losses_TK * FIXED_POINT_ONE).round().nan_to_num(0).clamp(0, ALWAYS_PRIMARY).long()
    ids = torch.where(counted_TK & (topk_ids_TK >= 0), topk_ids_TK, num_experts).long()
    votes = torch.zeros(num_experts + 1, dtype=torch.int64, device=topk_ids_TK.device)
    return votes.index_add(0, ids.flatten(), votes_TK.flatten())[:num_experts]


def primary_votes(
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    num_experts: int,
    *,
    select_top_k: int,
    expert_price: float = 0.0,
    size_E: torch.Tensor | None = None,
    valid_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns int64 [E]: what the valid tokens of a step say for each expert to be primary.

    ALWAYS_PRIMARY for an expert in one of their `select_top_k` heaviest slots; for any other, if there is an
    `expert_price`, the `losses_without_each_expert` of all their slots (needs `size_E`). Nothing where `select_top_k`
    means off. Ranks that share one primary set add these up.
    """
    votes_E = torch.zeros(num_experts, dtype=torch.int64, device=topk_ids_TK.device)
    if not 0 < select_top_k < topk_ids_TK.shape[1]:
        return votes_E
    valid_TK = torch.ones_like(topk_ids_TK, dtype=torch.bool) if valid_T is None else valid_T[:, None]
    if to_fixed_point(expert_price) < ALWAYS_PRIMARY:
        votes_E = losses_without_each_expert(topk_weights_TK, topk_ids_TK, size_E, valid_TK)
    heaviest_TK = primary_slots(topk_weights_TK, select_top_k)
    return votes_E.masked_fill(active_experts(topk_ids_TK, heaviest_TK & valid_TK, num_experts), ALWAYS_PRIMARY)


def primary_experts(
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    num_experts: int,
    *,
    select_top_k: int,
    expert_price: float = 0.0,
    size_E: torch.Tensor | None = None,
    valid_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns bool [E]: the experts with votes that suffice, see `primary_votes`.

    Without an `expert_price` that is the union of the experts in every valid token's `select_top_k` heaviest slots.
    No expert where `select_top_k` means off.
    """
    settings = {"select_top_k": select_top_k, "expert_price": expert_price, "size_E": size_E, "valid_T": valid_T}
    votes_E = primary_votes(topk_weights_TK, topk_ids_TK, num_experts, **settings)
    return votes_E >= to_fixed_point(expert_price)


def ranked_neighbors(similarity_EE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns, for each expert, all experts from the most similar on (int64 [E, E]), and their similarities.

    An expert's substitute is the first of them that is primary: what the kernels look up where `reroute` compares.
    """
    # Equal similarities keep their order: the lowest id first.
    ranked = similarity_EE.float().sort(dim=1, descending=True, stable=True)
    return ranked.indices, ranked.values


def reroute(
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    similarity_EE: torch.Tensor,
    *,
    select_top_k: int,
    threshold: float = 0.0,
    valid_T: torch.Tensor | None = None,
    primary_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Re-routes one decode step of one layer; the router's weights stay as they are.

    The union of the experts in every valid token's `select_top_k` heaviest slots is *primary*. Any other slot of a
    valid token keeps its expert if that is primary, and otherwise takes the primary expert most similar to it (ties:
    the lowest id), unless even that one's similarity is below a positive `threshold`: then the expert is *critical*
    and stays.

    Args:
        topk_weights_TK: router weights [T, K], any float dtype, slots in any order.
        topk_ids_TK: logical expert ids [T, K], int32 or int64; -1 marks an empty slot, which stays -1.
        similarity_EE: [E, E]; row e holds the similarity of e to each possible substitute.
        select_top_k: S, slots a token keeps. S <= 0 and S >= K change nothing.
        threshold: rho, rounded to float32 like the similarities; 0 or less: every slot is substitutable.
        valid_T: bool [T]; invalid tokens (prefill rows, padding) keep their experts and add none to the union.
        primary_E: bool [E], the primary experts where more ranks than this one have a say: those whose
            `primary_votes`, added up, suffice. None: those of this step.

    Returns:
        New ids [T, K] in the dtype of `topk_ids_TK`. The inputs are not changed.
    """
    num_slots = topk_ids_TK.shape[1]
    if not 0 < select_top_k < num_slots:
        return topk_ids_TK.clone()
    num_experts = similarity_EE.shape[0]
    filled_TK = topk_ids_TK >= 0
    if valid_T is not None:
        filled_TK = filled_TK & valid_T[:, None]

    primary_TK = primary_slots(topk_weights_TK, select_top_k)
    if primary_E is None:
        primary_E = active_experts(topk_ids_TK, primary_TK & filled_TK, num_experts)

    candidates_EE = similarity_EE.float().masked_fill(~primary_E, -torch.inf)
    best_E = candidates_EE.max(dim=1)  # of equal values, the first: the lowest id
    rho = torch.tensor(threshold, dtype=torch.float32, device=best_E.values.device)
    critical_E = (rho > 0) & (best_E.values < rho)
    moves_E = ~primary_E & ~critical_E & primary_E.any()

    experts_TK = topk_ids_TK.clamp(min=0).long()
    moves_TK = filled_TK & ~primary_TK & moves_E[experts_TK]
    return torch.where(moves_TK, best_E.indices[experts_TK].to(topk_ids_TK.dtype), topk_ids_TK)


def reroute_projection(
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    similarity_EE: torch.Tensor,
    coefficient_EE: torch.Tensor,
    size_E: torch.Tensor,
    *,
    select_top_k: int,
    threshold: float = 0.0,
    expert_price: float = 0.0,
    traffic_price: float = 0.0,
    domain_E: torch.Tensor | None = None,
    home_T: torch.Tensor | None = None,
    valid_T: torch.Tensor | None = None,
    primary_E: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Re-routes one decode step of one layer by what each change costs, in error of the output and in traffic.

    Primary and critical slots are those of `reroute`, and stay. With an `expert_price`, experts without which the step
    would lose that much are primary too (`losses_without_each_expert`). A token's other slots are settled in order
    of weight, each by the cheapest of: substitute a primary expert p, at (w w) size[e] (1 - similarity[e, p]), the
    squared error that remains, plus `traffic_price` if the token has no other business in p's domain; or drop the slot, at (w w) size[e].
    Equal costs: the larger similarity, then the lower id, dropping last. A substituted slot's weight becomes
    w coefficient[e, p]. This policy is not in the paper.

    Args:
        topk_weights_TK, topk_ids_TK, select_top_k, threshold, valid_T, primary_E: as in `reroute`.
        similarity_EE, coefficient_EE, size_E: of `similarity.expert_projection`; diagonals count as 1.
        expert_price: what one more active expert costs, in the unit of (w w) size; 0: only slots of largest weight
            make an expert primary. Has no say where `primary_E` is given.
        traffic_price: what one more visited domain costs, in the same unit; 0: quality alone.
        domain_E: int [E], where each expert lives: a rank or a node. None: one domain, nothing has a price.
        home_T: int [T], the domain where a token's attention ran, which it visits anyway; None: none.

    Returns:
        New weights and ids [T, K], in the dtypes given. A dropped slot has id -1 and weight 0. The inputs are not
        changed.
    """
    num_slots = topk_ids_TK.shape[1]
    if not 0 < select_top_k < num_slots:
        return topk_weights_TK.clone(), topk_ids_TK.clone()
    weights_TK, ids_TK = topk_weights_TK.float(), topk_ids_TK
    num_experts = similarity_EE.shape[0]
    itself_EE = torch.eye(num_experts, dtype=torch.bool, device=similarity_EE.device)
    similarity_EE = similarity_EE.float().masked_fill(itself_EE, 1)
    coefficient_EE = coefficient_EE.float().masked_fill(itself_EE, 1)
    filled_TK = topk_ids_TK >= 0
    if valid_T is not None:
        filled_TK = filled_TK & valid_T[:, None]

    order_TK = slots_by_weight(weights_TK)
    primary_TK = order_TK.argsort(dim=1) < select_top_k
    if primary_E is None:
        votes = {"select_top_k": select_top_k, "expert_price": expert_price, "size_E": size_E, "valid_T": valid_T}
        primary_E = primary_experts(weights_TK, ids_TK, num_experts, **votes)
    candidates_EE = similarity_EE.masked_fill(~primary_E, -torch.inf)
    rho = torch.tensor(threshold, dtype=torch.float32, device=similarity_EE.device)
    critical_E = ~primary_E & (rho > 0) & (candidates_EE.amax(dim=1) < rho)
    experts_TK = topk_ids_TK.clamp(min=0).long()
    settles_TK = filled_TK & ~primary_TK & ~critical_E[experts_TK] & primary_E.any()

    if domain_E is not None:
        price = torch.tensor(traffic_price, dtype=torch.float32, device=similarity_EE.device)
        neighbour_EE = domain_E[:, None] == domain_E[None]  # lives in the same domain
        kept_TKE = neighbour_EE[experts_TK] & (filled_TK & ~settles_TK)[:, :, None]
        visited_TE = kept_TKE.any(dim=1)  # token t goes to the domain of expert e anyway
        if home_T is not None:
            visited_TE = visited_TE | (home_T[:, None] == domain_E[None])

    for slot_T1 in order_TK[:, select_top_k:].split(1, dim=1):
        expert_T, weight_T = (tensor.gather(1, slot_T1).squeeze(1) for tensor in (experts_TK, weights_TK))
        loss_T = (weight_T * weight_T) * size_E.float()[expert_T]
        cost_TE = loss_T[:, None] * (1 - similarity_EE[expert_T])
        if domain_E is not None:
            cost_TE = cost_TE + torch.where(visited_TE, torch.zeros_like(price), price)
        least_T = cost_TE.masked_fill(~primary_E, torch.inf).amin(dim=1)
        cheapest_TE = candidates_EE[expert_T].masked_fill(cost_TE > least_T[:, None], -torch.inf)
        substitute_T = cheapest_TE.max(dim=1).indices  # of equal values, the first: the lowest id

        settles_T = settles_TK.gather(1, slot_T1).squeeze(1)
        drops_T = settles_T & (loss_T < least_T)
        takes_T = settles_T & ~drops_T
        new_weight_T = torch.where(takes_T, weight_T * coefficient_EE[expert_T, substitute_T], weight_T)
        new_id_T = torch.where(takes_T, substitute_T.to(ids_TK.dtype), ids_TK.gather(1, slot_T1).squeeze(1))
        weights_TK = weights_TK.scatter(1, slot_T1, new_weight_T.masked_fill(drops_T, 0)[:, None])
        ids_TK = ids_TK.scatter(1, slot_T1, new_id_T.masked_fill(drops_T, -1)[:, None])
        if domain_E is not None:
            visited_TE = visited_TE | (neighbour_EE[substitute_T] & takes_T[:, None])
    changed_TK = weights_TK != topk_weights_TK.float()
    return torch.where(changed_TK, weights_TK.to(topk_weights_TK.dtype), topk_weights_TK), ids_TK


def repeat_dropped(topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor, new_ids_TK: torch.Tensor) -> torch.Tensor:
    """Returns new ids in which a dropped slot, of weight 0, repeats its token's heaviest expert.

    For expert kernels that can't skip a slot. `topk_weights_TK` and `topk_ids_TK` are the router's.
    """
    heaviest_T1 = topk_ids_TK.gather(1, slots_by_weight(topk_weights_TK)[:, :1])
    return torch.where((new_ids_TK < 0) & (topk_ids_TK >= 0), heaviest_T1, new_ids_TK)


def is_remote(topk_ids_TK: torch.Tensor, domain_E: torch.Tensor, home_T: torch.Tensor | None = None) -> torch.Tensor:
    """Returns bool [T, K]: slots whose expert lives in another domain than the token's home (-1: no expert or home)."""
    domains_TK = domain_E[topk_ids_TK.clamp(min=0).long()]
    filled_TK = topk_ids_TK >= 0
    return filled_TK if home_T is None else filled_TK & (domains_TK != home_T[:, None])


def remote_domains(
    topk_ids_TK: torch.Tensor, domain_E: torch.Tensor, home_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns int64 [T]: the distinct domains other than its home that each token visits; without homes, all (C_T)."""
    domains_TK = domain_E[topk_ids_TK.clamp(min=0).long()].masked_fill(~is_remote(topk_ids_TK, domain_E, home_T), -1)
    in_order_TK = domains_TK.sort(dim=1).values
    new_TK = in_order_TK != torch.nn.functional.pad(in_order_TK[:, :-1], (1, 0), value=-1)
    return (new_TK & (in_order_TK >= 0)).sum(dim=1)


def step_counts(
    topk_weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    new_ids_TK: torch.Tensor,
    *,
    select_top_k: int,
    num_experts: int,
    expert_price: float = 0.0,
    size_E: torch.Tensor | None = None,
    valid_T: torch.Tensor | None = None,
    primary_E: torch.Tensor | None = None,
    rank_E: torch.Tensor | None = None,
    num_ranks: int = 0,
    domain_E: torch.Tensor | None = None,
    home_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns int64 [len(COUNTERS) + num_ranks]: what one step of one layer adds to its counters.

    `topk_weights_TK` and `ids_TK` are the router's, `new_ids_TK` what became of them by `select_top_k` (0: off) and
    `primary_E` (None: the `primary_experts` of these rows, at this `expert_price`). A step without a valid row counts
    nothing. `rank_E` says which of `num_ranks` ranks holds each expert (None: one holds all); behind the counters stand
    the active experts of each, after re-routing. Without `domain_E` no domain and no slot is counted. Experts are those
    that these rows choose: ranks that have other rows may run more.
    """
    valid_TK = torch.ones_like(ids_TK, dtype=torch.bool) if valid_T is None else valid_T[:, None].expand_as(ids_TK)
    if primary_E is None:
        votes = {"select_top_k": select_top_k, "expert_price": expert_price, "size_E": size_E, "valid_T": valid_T}
        primary_E = primary_experts(topk_weights_TK, ids_TK, num_experts, **votes)
    changed_TK = ids_TK != new_ids_TK
    dropped_TK = changed_TK & (new_ids_TK < 0)
    # What still runs outside the primary union stayed there because nothing was similar enough.
    is_on = primary_E.any() & (0 < select_top_k < ids_TK.shape[1])
    critical_TK = valid_TK & (new_ids_TK >= 0) & ~primary_E[new_ids_TK.clamp(min=0).long()] & is_on
    slots = [(changed_TK & ~dropped_TK).sum(), critical_TK.sum(), dropped_TK.sum()]

    active_EN = torch.stack([active_experts(ids, valid_TK, num_experts) for ids in (ids_TK, new_ids_TK)], dim=1).long()
    ranks = torch.zeros(num_experts, dtype=torch.int64, device=ids_TK.device) if rank_E is None else rank_E.long()
    by_rank_RN = active_EN.new_zeros(max(num_ranks, 1), 2).index_add_(0, ranks, active_EN)
    pairs = [active_EN.sum(dim=0), by_rank_RN.amax(dim=0), *active_EN.new_zeros(3, 2)]
    if domain_E is not None:
        for when, ids in enumerate((ids_TK, new_ids_TK)):
            ids_of_valid_TK = ids.masked_fill(~valid_TK, -1)
            pairs[2][when] = remote_domains(ids_of_valid_TK, domain_E).sum()
            pairs[3][when] = remote_domains(ids_of_valid_TK, domain_E, home_T).sum()
            pairs[4][when] = is_remote(ids_of_valid_TK, domain_E, home_T).sum()
    rows = valid_TK[:, 0].sum()
    counts = torch.cat([torch.stack([torch.ones_like(rows), rows, *slots]), *pairs, by_rank_RN[:num_ranks, 1]])
    return counts * (rows > 0)


def dispatch_bytes(
    tokens: float, remote_domains: float, remote_slots: float, *, num_ranks: int, hidden_size: int, element_size: int
) -> dict[str, float]:
    """Returns the bytes of hidden states that tokens send and receive in a layer, both together, by kind of dispatch.

    `all_gather`: all-gather and reduce-scatter, vLLM's default: every token goes to every rank, whatever its experts.
    `per_rank`: once to each remote rank (DeepEP high-throughput). `per_slot`: once for each remote slot (DeepEP
    low-latency). `remote_domains` and `remote_slots` are summed over the tokens; domains are ranks.
    """
    copies = {"all_gather": tokens * (num_ranks - 1), "per_rank": remote_domains, "per_slot": remote_slots}
    return {kind: 2 * count * hidden_size * element_size for kind, count in copies.items()}

"""Re-routing (SERE, arXiv 2602.07616): send each token's lesser experts to similar ones that the batch runs anyway.

Pure functions on tensors: no Ray, vLLM, CUDA or files. Shape suffixes: T tokens in the step, K experts a token,
E experts of the layer. Every comparison is in float32, so that all backends agree to the bit.
"""

import torch


def primary_slots(topk_weights_TK: torch.Tensor, select_top_k: int) -> torch.Tensor:
    """Returns bool [T, K]: each token's `select_top_k` slots of largest weight (equal weights: the lower slot).

    The columns need not be sorted by weight: vLLM's CPU router and its grouped router return them unsorted.
    """
    order_TK = topk_weights_TK.float().sort(dim=1, descending=True, stable=True).indices
    rank_TK = order_TK.argsort(dim=1)
    return rank_TK < select_top_k


def active_experts(topk_ids_TK: torch.Tensor, counted_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Returns bool [E]: the experts named in the slots of `counted_TK` (bool [T, K]); an id of -1 names none."""
    ids = torch.where(counted_TK & (topk_ids_TK >= 0), topk_ids_TK, num_experts).long()
    active = torch.zeros(num_experts + 1, dtype=torch.bool, device=topk_ids_TK.device)
    return active.index_fill_(0, ids.flatten(), True)[:num_experts]


def reroute(
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    similarity_EE: torch.Tensor,
    *,
    select_top_k: int,
    threshold: float = 0.0,
    valid_T: torch.Tensor | None = None,
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
    primary_E = active_experts(topk_ids_TK, primary_TK & filled_TK, num_experts)

    candidates_EE = similarity_EE.float().masked_fill(~primary_E, -torch.inf)
    best_E = candidates_EE.max(dim=1)  # of equal values, the first: the lowest id
    rho = torch.tensor(threshold, dtype=torch.float32, device=best_E.values.device)
    critical_E = (rho > 0) & (best_E.values < rho)
    moves_E = ~primary_E & ~critical_E & primary_E.any()

    experts_TK = topk_ids_TK.clamp(min=0).long()
    moves_TK = filled_TK & ~primary_TK & moves_E[experts_TK]
    return torch.where(moves_TK, best_E.indices[experts_TK].to(topk_ids_TK.dtype), topk_ids_TK)

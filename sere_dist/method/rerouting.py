"""Re-routing as in SERE (arXiv 2602.07616, section 3): one decode step of one layer, as functions on tensors.

Every token keeps its S heaviest experts. Together these are the step's *primary* experts, P: they run anyway. Any other
expert e that a token chose is replaced by the primary expert that is most similar to it,

    substitute(e) = argmax over p in P of similarity[e, p],

unless even that similarity is below rho: then e is *critical* and stays. The router's weights do not change.

Shape suffixes: T tokens of the step, K experts per token, E experts of the layer. Comparisons are in float32 and ties
go to the lower index, so that `kernels/reroute.cu` agrees to the bit.
"""

import torch


def reroute(
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    similarity_EE: torch.Tensor,
    *,
    select_top_k: int,
    threshold: float = 0.0,
    valid_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns new expert ids [T, K] in the dtype of `topk_ids_TK`. The inputs are not changed.

    Args:
        topk_weights_TK: router weights [T, K], any float dtype, slots in any order.
        topk_ids_TK: logical expert ids [T, K], int32 or int64; -1 marks an empty slot and stays -1.
        similarity_EE: [E, E]; row e holds the similarity of e to each possible substitute.
        select_top_k: S, the experts that a token keeps. S <= 0 and S >= K change nothing.
        threshold: rho. 0: every expert may be replaced.
        valid_T: bool [T]; rows that are not valid (prefill, padding) keep their experts and add none to P.
    """
    if not 0 < select_top_k < topk_ids_TK.shape[1]:
        return topk_ids_TK.clone()
    primary_E = primary_experts(topk_weights_TK, topk_ids_TK, len(similarity_EE), select_top_k, valid_T)
    return replace_experts(topk_ids_TK, substitutes(similarity_EE, primary_E, threshold), valid_T)


def primary_experts(
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    num_experts: int,
    select_top_k: int,
    valid_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns P, bool [E]: the experts in the S heaviest slots of every valid token."""
    keeps_TK = heaviest_slots(topk_weights_TK, select_top_k) & filled_slots(topk_ids_TK, valid_T)
    return active_experts(topk_ids_TK, keeps_TK, num_experts)


def substitutes(similarity_EE: torch.Tensor, primary_E: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
    """Returns int64 [E]: what runs in place of each expert. It is the expert itself if that is primary or critical, or
    if there is no primary expert."""
    best = similarity_EE.float().masked_fill(~primary_E, -torch.inf).max(dim=1)  # of equal values the first
    rho = torch.tensor(threshold, dtype=torch.float32, device=primary_E.device)
    critical_E = (best.values == -torch.inf) | ((rho > 0) & (best.values < rho))
    itself_E = torch.arange(len(primary_E), device=primary_E.device)
    return torch.where(primary_E | critical_E, itself_E, best.indices)


def replace_experts(
    topk_ids_TK: torch.Tensor, substitute_E: torch.Tensor, valid_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the ids [T, K] with the expert of every filled slot of a valid token looked up in `substitute_E`."""
    new_ids_TK = substitute_E.to(topk_ids_TK.dtype)[topk_ids_TK.clamp(min=0).long()]
    return torch.where(filled_slots(topk_ids_TK, valid_T), new_ids_TK, topk_ids_TK)


def slots_by_weight(topk_weights_TK: torch.Tensor) -> torch.Tensor:
    """Returns int64 [T, K]: each token's slots, the largest weight first; of equal weights the lower slot.

    The columns need not be sorted by weight: vLLM's CPU router and its grouped router return them unsorted.
    """
    return topk_weights_TK.float().sort(dim=1, descending=True, stable=True).indices


def heaviest_slots(topk_weights_TK: torch.Tensor, select_top_k: int) -> torch.Tensor:
    """Returns bool [T, K]: each token's S slots of largest weight."""
    return slots_by_weight(topk_weights_TK).argsort(dim=1) < select_top_k


def filled_slots(topk_ids_TK: torch.Tensor, valid_T: torch.Tensor | None = None) -> torch.Tensor:
    """Returns bool [T, K]: the slots of valid tokens that name an expert."""
    filled_TK = topk_ids_TK >= 0
    return filled_TK if valid_T is None else filled_TK & valid_T[:, None]


def active_experts(topk_ids_TK: torch.Tensor, counted_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Returns bool [E]: the experts that the slots of `counted_TK` (bool [T, K]) name; an id of -1 names none."""
    ids_TK = torch.where(counted_TK & (topk_ids_TK >= 0), topk_ids_TK, num_experts).long()  # one place for "none"
    active = torch.zeros(num_experts + 1, dtype=torch.bool, device=topk_ids_TK.device)
    return active.index_fill(0, ids_TK.flatten(), True)[:num_experts]

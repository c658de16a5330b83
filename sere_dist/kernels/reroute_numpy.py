"""The paper's policy for a decode step on a CPU, in numpy, in as few calls as it takes.

Between two layers' routers hundreds of megabytes of weights pass through the caches, so every call of a library,
however small its work, costs tens of microseconds. numpy gets by with a third of the calls that torch needs, each
cheaper. Computes what `method.rerouting.reroute` and `method.counters.count_step` do. Shape suffixes: T tokens of the
step, S experts that each keeps, K experts per token, E experts of the layer.
"""

import numpy as np
import torch

from sere_dist.method.records import Settings, Step


def reroute_step(
    step: Step, neighbors: tuple[torch.Tensor, torch.Tensor], settings: Settings, counters: torch.Tensor
) -> torch.Tensor:
    """Returns the new ids [T, K] of a step, `step.ids_TK` itself if none is new, and counts the step.

    Counts no domains; one rank holds all experts.

    Args:
        step: what the router chose.
        neighbors: those of `neighbors.ranked_neighbors`.
        settings: S and rho; prices have no effect.
        counters: int64, those of COUNTERS first; added to in place.
    """
    topk_weights_TK, topk_ids_TK, valid_T, _home_T = step
    if valid_T is not None:
        new_ids_TK = topk_ids_TK.clone()
        of_valid = Step(topk_weights_TK[valid_T], topk_ids_TK[valid_T])
        new_ids_TK[valid_T] = reroute_step(of_valid, neighbors, settings, counters)
        return new_ids_TK
    neighbors_EE, ranked_similarity_EE = neighbors
    select_top_k, threshold, *_prices = settings
    ids_TK, neighbor_EE, num_experts = topk_ids_TK.numpy(), neighbors_EE.numpy(), len(neighbors_EE)
    if not len(ids_TK):
        return topk_ids_TK
    # One place more than there are experts: empty slots (-1) fall into the last.
    chosen = np.zeros(num_experts + 1, dtype=bool)
    chosen[ids_TK] = True
    chosen[-1] = False
    active_before = active = np.count_nonzero(chosen)
    rerouted = critical_slots = 0
    if 0 < select_top_k < ids_TK.shape[1]:
        heaviest_TS = np.argsort(-topk_weights_TK.float().numpy(), axis=1, kind="stable")[:, :select_top_k]
        primary = np.zeros(num_experts + 1, dtype=bool)
        primary[np.take_along_axis(ids_TK, heaviest_TS, axis=1)] = True
        primary[-1] = False
        others = np.flatnonzero(chosen > primary)
        if 0 < len(others) < active:  # there is something to replace, and something to replace it by
            active -= len(others)
            first = primary[neighbor_EE[others]].argmax(axis=1)
            substitute = np.arange(num_experts + 1, dtype=ids_TK.dtype)
            substitute[-1] = -1
            substitute[others] = neighbor_EE[others, first]
            if threshold > 0:
                critical = others[ranked_similarity_EE.numpy()[others, first] < np.float32(threshold)]
                substitute[critical] = critical
                critical_slots = np.count_nonzero(np.isin(ids_TK, critical))
                active += len(critical)
            new_ids_TK = substitute[ids_TK]
            rerouted = np.count_nonzero(new_ids_TK != ids_TK)
            topk_ids_TK = torch.from_numpy(new_ids_TK)
    # In the order of COUNTERS, up to the largest rank: here it has all active experts.
    counts = (1, len(ids_TK), rerouted, critical_slots, 0, 0, active_before, active, active_before, active)
    counters.numpy()[: len(counts)] += counts
    return topk_ids_TK

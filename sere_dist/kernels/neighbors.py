"""The table that kernels look substitutes up in, where `method.rerouting` compares. Shape suffix: E experts."""

import torch


def ranked_neighbors(similarity_EE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns, for each expert, all experts from the most similar on (int64 [E, E]), and their similarities.

    An expert's substitute is the first of them that is primary.
    """
    # Equal similarities keep their order: the lowest id first.
    ranked = similarity_EE.float().sort(dim=1, descending=True, stable=True)
    return ranked.indices, ranked.values

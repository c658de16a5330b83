"""How surely a calibration knows which experts are alike: how much its similarities would differ on other texts.

The texts are in disjoint groups, and `OfGroups` has the sums of each. So what other groups would give needs no second
pass over the texts. Shape suffixes: E experts, R similarities that lack one group each.
"""

from itertools import combinations
from typing import NamedTuple

import torch

from sere_dist.method.similarity import OfGroups

GROUPS = 8  # of texts


class Certainty(NamedTuple):
    """Of one layer, over different experts.

    Attributes:
        similarity_error: the standard error, over texts, of an expert's similarity to its most similar expert; the
            median over experts.
        same_substitute: the share of experts whose most similar expert is the same by either half of the texts.
        substitute_kept: how good the substitutes are that one half chose, by the similarities of the other half: 1 is
            as good as that half's own, and 0 as good as others at random.
    """

    similarity_error: float
    same_substitute: float
    substitute_kept: float


def certainty_of(similarity_of: OfGroups, num_groups: int) -> Certainty | None:
    """Returns how surely a layer's similarities are known, None where all texts are one group.

    The groups, an even number of about one size each, stand for the texts. The standard error is the jackknife's, where
    each group is left out once. Halves are all that the groups can make.
    """
    if num_groups == 1:
        return None
    everything = range(num_groups)
    similarity_REE = torch.stack([similarity_of([g for g in everything if g != out]) for out in everything])
    different_EE = ~torch.eye(similarity_REE.shape[1], dtype=torch.bool, device=similarity_REE.device)
    best_E1 = similarity_of(everything).fill_diagonal_(-torch.inf).argmax(dim=1, keepdim=True)
    error_EE = ((num_groups - 1) * similarity_REE.double().var(dim=0, correction=0)).sqrt()
    same, chosen, best = [], [], []
    for rest in combinations(everything[1:], num_groups // 2 - 1):
        half = (0, *rest)
        one_EE, other_EE = (
            similarity_of(groups).double().masked_fill(~different_EE, -torch.inf)
            for groups in (half, [g for g in everything if g not in half])
        )
        same.append((one_EE.argmax(dim=1) == other_EE.argmax(dim=1)).double().mean())
        for chooses_EE, judges_EE in ((one_EE, other_EE), (other_EE, one_EE)):
            mean = judges_EE[different_EE].mean()
            chosen.append(judges_EE.gather(1, chooses_EE.argmax(dim=1, keepdim=True)).mean() - mean)
            best.append(judges_EE.amax(dim=1).mean() - mean)
    most = float(torch.stack(best).sum())
    kept = float(torch.stack(chosen).sum()) / most if most > 0 else 1.0  # all alike: no choice is worse
    return Certainty(float(error_EE.gather(1, best_E1).median()), float(torch.stack(same).mean()), kept)

"""How surely a calibration knows which experts are alike: how much its similarities would differ on other texts.

The texts are in disjoint groups, and `OfGroups` has the sums of each. So what other groups would give needs no second
pass over the texts. Shape suffixes: E experts, R similarities that lack one group each.
"""

from collections.abc import Iterator, Sequence
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
    same, worth = [], []
    for halves in all_halves(num_groups):
        one_EE, other_EE = (similarity_of(half).double().masked_fill(~different_EE, -torch.inf) for half in halves)
        one_E1, other_E1 = (each_EE.argmax(dim=1, keepdim=True) for each_EE in (one_EE, other_EE))
        same.append((one_E1 == other_E1).double().mean())
        worth += [worth_of((one_E1, other_E1), other_EE), worth_of((other_E1, one_E1), one_EE)]
    chosen, best = (float(torch.stack(each).sum()) for each in zip(*worth, strict=True))
    kept = chosen / best if best > 0 else 1.0  # all alike: no choice is worse
    return Certainty(float(error_EE.gather(1, best_E1).median()), float(torch.stack(same).mean()), kept)


def all_halves(num_groups: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields each way to part an even number of groups into two halves, once."""
    for rest in combinations(range(1, num_groups), num_groups // 2 - 1):
        yield (0, *rest), tuple(group for group in range(1, num_groups) if group not in rest)


def worth_of(choices: Sequence[torch.Tensor], judges_EE: torch.Tensor) -> list[torch.Tensor]:
    """Returns what each choice of substitutes is worth: how much more similar they are than others at random, the mean
    over experts.

    Args:
        choices: int64 [E, 1] each: the substitute of each expert.
        judges_EE: the similarities to judge by, -inf on the diagonal.
    """
    at_random = judges_EE[judges_EE > -torch.inf].mean()
    return [judges_EE.gather(1, choice_E1).mean() - at_random for choice_E1 in choices]

"""How well one calibration on texts of several sources serves each of them, such as chats, code and tool calls.

A calibration chooses one substitute for each expert. A source whose own texts would choose others is served worse. What
a choice is worth to a source is measured on texts of the source that took no part in it: a choice by all sources, and
one by the source alone. Few texts make both worth less, a source that differs makes the first alone worth less. As in
`certainty`, this takes no second pass over the texts. Shape suffix: E experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sere_dist.method.certainty import GROUPS, all_halves, worth_of
from sere_dist.method.similarity import OfGroups

# Groups of all sources together. Each has sums of its own, for projection two of [E, E] in float64: with 512 experts,
# 64 groups take 0.3 GB, and with 896 experts 0.8 GB.
MOST_GROUPS = 64


class SourceFit(NamedTuple):
    """How well a layer's substitutes serve one source, by the source's own similarities.

    The first two are measured on halves of the texts: one half chooses, the source's texts in the other half judge. 1
    is as good as the judges' own choice, and 0 is as good as others at random.

    Attributes:
        substitute_kept: what the substitutes are worth that all sources chose together.
        own_kept: what those are worth that the source's own texts chose. More than `substitute_kept` by what the source
            loses to the others; less where the others' texts, being more, help.
        same_substitute: the share of experts whose substitute a calibration on this source alone would choose, too. It
            leaves out experts that the source says nothing about.
    """

    substitute_kept: float
    own_kept: float
    same_substitute: float


def groups_per_source(num_sources: int) -> int:
    """Returns how many groups the texts of each source make; 0 where there are too many sources to tell them apart."""
    return min(GROUPS, MOST_GROUPS // num_sources // 2 * 2)


def of_all_sources(similarity_of: OfGroups, members: Sequence[tuple[int, str]]) -> tuple[OfGroups, int]:
    """Returns the similarities as a function of groups, each with its texts of all sources, and how many groups there
    are; see `fits_of_sources`.
    """

    def of(chosen: Sequence[int]) -> torch.Tensor:
        return similarity_of([place for place, (group, _) in enumerate(members) if group in chosen])

    return of, len({group for group, _ in members})


def fits_of_sources(similarity_of: OfGroups, members: Sequence[tuple[int, str]]) -> dict[str, SourceFit | None]:
    """Returns how well a layer's substitutes serve each source; None for a source whose texts are all in one group.

    Args:
        similarity_of: gives the similarities by some of the members, named by their places.
        members: a group of texts, from 0 on, and a source: the texts of this source in this group. The number of groups
            is even; halves are all that they can make.
    """
    groups_of: dict[str, set[int]] = {}
    for group, source in members:
        groups_of.setdefault(source, set()).add(group)
    everything = range(len(set().union(*groups_of.values())))
    fits: dict[str, SourceFit | None] = dict.fromkeys(groups_of)
    if len(everything) == 1:
        return fits

    def similarity_by(groups: Sequence[int], source: str | None = None) -> torch.Tensor:
        """By one source or all of them; -inf on the diagonal."""
        places = [place for place, (group, name) in enumerate(members) if group in groups and source in (None, name)]
        return similarity_of(places).double().fill_diagonal_(-torch.inf)

    worth: dict[str, list[list[torch.Tensor]]] = {source: [] for source in groups_of}
    for halves in all_halves(len(everything)):
        together_E1, together_too_E1 = (_best(similarity_by(half)) for half in halves)
        for source, groups in groups_of.items():
            if any(groups.isdisjoint(half) for half in halves):
                continue
            one_EE, other_EE = (similarity_by(half, source) for half in halves)
            one_E1, other_E1 = _best(one_EE), _best(other_EE)
            worth[source] += [
                worth_of((together_E1, one_E1, other_E1), other_EE),
                worth_of((together_too_E1, other_E1, one_E1), one_EE),
            ]
    whole_E1 = _best(similarity_by(everything))
    for source in (source for source in groups_of if worth[source]):
        kept, own_kept, best = (float(torch.stack(each).sum()) for each in zip(*worth[source], strict=True))
        if best <= 0:  # all alike: no choice is worse
            kept = own_kept = best = 1.0
        same = _share_of_same(similarity_by(everything, source), whole_E1)
        fits[source] = SourceFit(kept / best, own_kept / best, same)
    return fits


def _best(similarity_EE: torch.Tensor) -> torch.Tensor:
    """Returns [E, 1], each expert's most similar other."""
    return similarity_EE.argmax(dim=1, keepdim=True)


def _share_of_same(own_EE: torch.Tensor, whole_E1: torch.Tensor) -> float:
    """Returns the share of experts for which both name the same substitute, of those that the source tells about: by
    projection, an expert that no token reached is as similar to one as to any other.
    """
    lowest_E = own_EE.clone().fill_diagonal_(torch.inf).amin(dim=1)
    is_same_E = (_best(own_EE) == whole_E1).flatten()[own_EE.amax(dim=1) > lowest_E]
    return float(is_same_E.double().mean()) if len(is_same_E) else 1.0

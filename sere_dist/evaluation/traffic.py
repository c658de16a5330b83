"""What decode steps cost under expert parallelism: where tokens go, what they carry there, and how even the ranks are.

A domain is a rank here. Shape suffixes: D decode steps, B sequences, K experts per token, E experts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sere_dist.evaluation.lockstep import Rerouter, Routed, active_by_step
from sere_dist.method.counters import is_remote, remote_domains


@dataclass(frozen=True)
class Layout:
    """Where experts and tokens live. Sequence b of a batch has its attention on rank b mod `num_ranks`."""

    num_ranks: int
    rank: Mapping[int, torch.Tensor]  # decoder layer index -> int64 [E], the rank that holds each expert
    home: int | None = None  # the rank of all sequences instead: a batch is then what one rank decodes

    def homes(self, batch: int) -> torch.Tensor:
        """Returns int64 [B]: data-parallel attention spreads the requests of a batch."""
        if self.home is not None:
            return torch.full((batch,), self.home)
        return torch.arange(batch) % self.num_ranks


@dataclass(frozen=True)
class Traffic:
    """Means over decode steps and layers: what a token of each sequence visits, what a step of each batch runs."""

    domains: tuple[float, ...]  # of each sequence: C_T, the distinct domains of a token
    remote_domains: tuple[float, ...]  # likewise, other than its home
    remote_slots: tuple[float, ...]  # slots whose expert is in a remote domain
    active_experts: tuple[float, ...]  # of each batch
    largest_rank: tuple[float, ...]  # active experts on the rank that has the most

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(mine + others for mine, others in zip(vars(self).values(), vars(other).values(), strict=True)))


def traffic(ids: Mapping[int, torch.Tensor], layout: Layout) -> Traffic:
    """Measures one batch. `ids`: decoder layer index -> the expert ids that run [D, B, K], -1 where none does."""
    measures: list[tuple[torch.Tensor, ...]] = []
    for layer, ids_DBK in ids.items():
        rank_E, (steps, batch, _) = layout.rank[layer], ids_DBK.shape
        slots, homes = ids_DBK.flatten(0, 1), layout.homes(batch).repeat(steps)
        of_tokens = [remote_domains(slots, rank_E), remote_domains(slots, rank_E, homes)]
        of_tokens.append(is_remote(slots, rank_E, homes).sum(dim=1))
        active_DE = active_by_step(ids_DBK, len(rank_E)).long()
        active_DR = active_DE.new_zeros(steps, layout.num_ranks).index_add_(1, rank_E, active_DE)
        of_steps = [active_DE.sum(dim=1), active_DR.amax(dim=1)]
        means_B = (measure.view(steps, batch).double().mean(dim=0) for measure in of_tokens)
        measures.append((*means_B, *(measure.double().mean(dim=0, keepdim=True) for measure in of_steps)))
    return Traffic(*(tuple(torch.stack(layers).mean(dim=0).tolist()) for layers in zip(*measures, strict=True)))


def recorded(rerouter: Rerouter, ids: dict[int, torch.Tensor]) -> Rerouter:
    """Returns the rerouter, leaving in `ids` by layer what it lets run: what `traffic` measures."""

    def recording(
        layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, scores_DBE: torch.Tensor | None
    ) -> Routed:
        routed = rerouter(layer, weights_DBK, ids_DBK, scores_DBE)
        ids[layer] = routed[1]
        return routed

    return recording


def uniform_domains(num_experts: int, num_experts_per_token: int, num_ranks: int) -> float:
    """Returns C_T where every set of experts is equally likely and every rank holds equally many: a closed form."""
    elsewhere = math.comb(num_experts - num_experts // num_ranks, num_experts_per_token)
    return num_ranks * (1 - elsewhere / math.comb(num_experts, num_experts_per_token))

"""Synthetic routers that choose experts as a recorded one does: for shapes that no model here has.

A token's logits are a bias per expert (skew: some experts are popular), the product of a random topic of the token and
a random direction of the expert (co-activation: some experts go together), and noise. It takes the K largest; its
weights are the softmax of these logits times a sharpness. So three numbers describe a router, and `fit` finds those
with which the statistics of a synthetic router equal the recorded one's.

What is kept for other shapes are the three numbers. That they do not change with the number of experts is assumed.

Shape suffixes: N tokens, D decode steps, B rows, K slots, E experts, G groups, F numbers of a topic.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from sere_dist.evaluation.lockstep import Routed

FACTORS = 8  # numbers of a topic
FIT_TOKENS, FIT_ROUNDS, HALVINGS, BIAS_ROUNDS = 4096, 2, 10, 6


class Statistics(NamedTuple):
    """What a fit makes equal."""

    skew: float  # sum of the experts' squared shares of slots, times E: 1 if all are equally popular
    coactivation: float  # sum over pairs of P(both)², over that of (P(one) P(other))²
    heaviest: float  # share of a token's weight in its heaviest slot, the mean


@dataclass(frozen=True)
class SyntheticRouter:
    """Standard deviations of an expert's bias, and of what a topic adds; and the factor of logits in weights."""

    bias: float
    topic: float
    sharpness: float

    def route(
        self,
        steps: int,
        rows: int,
        num_experts: int,
        top_k: int,
        random: torch.Generator,
        groups: int = 1,
        bias_E: torch.Tensor | None = None,
    ) -> Routed:
        """Returns weights and ids [D, B, K] of tokens that have nothing to do with each other, slots by weight.

        `groups`: the router takes experts from half of so many groups only, those whose two best logits are largest
        together, as in DeepSeek-V3. 1: it does not. `bias_E`: the experts' biases, from `biases`; None: drawn.
        """
        quantiles_E = torch.special.ndtri((torch.arange(num_experts) + 0.5) / num_experts)
        drawn_E = self.bias * quantiles_E[torch.randperm(num_experts, generator=random)]
        directions_FE = normalize(torch.randn(FACTORS, num_experts, generator=random), dim=0)
        topics_DBF = torch.randn(steps, rows, FACTORS, generator=random)
        noise_DBE = -torch.empty(steps, rows, num_experts).exponential_(generator=random).log()
        logits_DBE = (drawn_E if bias_E is None else bias_E) + self.topic * (topics_DBF @ directions_FE) + noise_DBE
        if groups > 1:
            of_groups = logits_DBE.unflatten(2, (groups, -1))
            best_DBG = of_groups.topk(2, dim=3).values.sum(dim=3)
            chosen = torch.zeros_like(best_DBG, dtype=torch.bool).scatter_(2, best_DBG.topk(groups // 2).indices, True)
            logits_DBE = of_groups.masked_fill(~chosen[..., None], -torch.inf).flatten(2)
        best = logits_DBE.topk(top_k, dim=2)
        return (self.sharpness * best.values).softmax(dim=2), best.indices

    def biases(self, tokens_E: torch.Tensor, top_k: int, seed: int, groups: int = 1) -> torch.Tensor:
        """Returns [E]: the biases with which tokens use experts about as often as `tokens_E` counts.

        They belong to the topics of this seed: pass `route` a generator that starts with it.
        """
        wanted_E = tokens_E.float() + 0.5  # an expert that no token reached is rare, and not impossible
        wanted_E /= wanted_E.sum()
        bias_E = wanted_E.log()
        for _ in range(BIAS_ROUNDS):
            random = torch.Generator().manual_seed(seed)
            ids = self.route(1, FIT_TOKENS, len(tokens_E), top_k, random, groups, bias_E)[1]
            found_E = ids.flatten().bincount(minlength=len(tokens_E)) + 0.5
            bias_E = bias_E + (wanted_E / (found_E / found_E.sum())).log()
        return bias_E


def statistics(weights_NK: torch.Tensor, ids_NK: torch.Tensor, num_experts: int) -> Statistics:
    """Returns the statistics of one layer's routing. The tokens should be many times the experts."""
    uses_NE = torch.zeros(len(ids_NK), num_experts).scatter_(1, ids_NK.long(), 1.0)
    both_EE = (uses_NE.T @ uses_NE / len(ids_NK)).double()
    uses_E = both_EE.diagonal().clone()
    alone_EE = torch.outer(uses_E, uses_E)
    coactivation = both_EE.fill_diagonal_(0).square().sum() / alone_EE.fill_diagonal_(0).square().sum()
    skew = (uses_E / uses_E.sum()).square().sum() * num_experts
    heaviest_N = weights_NK.amax(dim=1) / weights_NK.sum(dim=1)
    return Statistics(float(skew), float(coactivation), float(heaviest_N.mean()))


def fit(target: Statistics, num_experts: int, top_k: int) -> SyntheticRouter:
    """Returns the router with these statistics at this shape, each of its numbers found by halving, in turns."""
    numbers = {"bias": 0.5, "topic": 0.5, "sharpness": 0.5}
    for _ in range(FIT_ROUNDS):
        for name, place in (("bias", 0), ("topic", 1), ("sharpness", 2)):
            low, high = 0.0, 6.0
            for _ in range(HALVINGS):
                numbers[name] = (low + high) / 2
                random = torch.Generator().manual_seed(0)
                weights, ids = SyntheticRouter(**numbers).route(1, FIT_TOKENS, num_experts, top_k, random)
                found = statistics(weights[0], ids[0], num_experts)[place]
                low, high = (low, numbers[name]) if found > target[place] else (numbers[name], high)
    return SyntheticRouter(**numbers)

"""Which experts run if what counts is the rank that runs most: the balance price.

At every layer all ranks wait for the slowest, and in decoding that is the one with the most active experts. So an
expert on another rank costs no time, and dropping it saves none. With loss(e) what a step loses without e, P the
experts that run, and two prices, the best P is the one with the least

    sum of loss(e) over e not in P  +  expert_price x |P|  +  balance_price x max over ranks of |P on the rank|.

It needs no search. Order the experts of each rank by their loss, and call a rank's n-th expert its n-th *place*. One
more place on the largest rank is room for one more expert on every rank, and is worth what they would save together:

    worth(n) = sum over ranks of (loss of the rank's n-th expert - expert_price).

As n grows, worth falls. So place n runs, on all ranks, if worth(n) >= balance_price. The first place is free: a step
has to run something. That is exact for losses that do not depend on what else runs. Where experts can stand in for one
another, `projection` takes what is left of the losses, in its order of experts.

All numbers are in fixed point, so the result does not depend on the order of additions, and ranks that share losses
agree.

Shape suffixes: E experts of the layer, R ranks.
"""

import torch

from sere_dist.method.fixed_point import ALWAYS_PRIMARY


def balanced_primary(
    losses_E: torch.Tensor, rank_E: torch.Tensor, *, expert_price: int, balance_price: int
) -> torch.Tensor:
    """Returns bool [E]: the experts that run.

    An expert without a loss never runs; one of at least ALWAYS_PRIMARY always does, and takes its place first.

    Args:
        losses_E: int64 [E], fixed point.
        rank_E: int [E], the rank that holds each expert.
        expert_price: what any active expert costs, in fixed point. 0: nothing.
        balance_price: what one more place costs, of all ranks together, from the second on, in fixed point. 0:
            nothing, so that the expert's price decides.
    """
    wanted_E = losses_E >= max(1, expert_price)
    gain_E = torch.where(losses_E >= ALWAYS_PRIMARY, losses_E, losses_E - expert_price).masked_fill(~wanted_E, -1)
    place_E = places(gain_E, rank_E)
    worth_E = torch.zeros_like(losses_E).index_add(0, place_E, gain_E.clamp(min=0))  # by place; no rank has more than E
    return wanted_E & ((place_E == 0) | (worth_E[place_E] >= balance_price))


def places(gain_E: torch.Tensor, rank_E: torch.Tensor) -> torch.Tensor:
    """Returns int64 [E]: how many experts of its rank come before each. The larger gain is first, then the lower id."""
    index_E = torch.arange(len(gain_E), device=gain_E.device)
    ahead_EE = gain_E > gain_E[:, None]
    ahead_EE = ahead_EE | ((gain_E == gain_E[:, None]) & (index_E < index_E[:, None]))
    return (ahead_EE & (rank_E == rank_E[:, None])).sum(dim=1)

"""How far re-routing may go now: a controller that follows the load along a ladder of expert prices.

It knows nothing of Ray: it is given what was measured in a period, and says which price holds in the next one, and why.
Where it can't see, or something is wrong, it goes towards quality.
"""

import math
from collections import deque
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SLOW_SHARE = 0.05  # of the tokens may be slower than the objective: it is one for the 95th percentile
CALM = 0.5  # of what the objective allows: below it a price may fall
PATIENCE = 3  # periods in which a smaller price would have been enough, before it falls
HEADROOM = 0.8  # of the throughput at which a price was too small: below it, it is enough
EASING = 0.9  # of the load of the period before: what is falling so fast needs no greater price
FORGET = 48  # periods after which what was too small, or cost too much, may be tried again: requests may be others
BLIND = 3  # periods without a measurement before re-routing goes off


class ControlConfig(BaseModel):
    """What the controller is to keep, and what it may spend for it. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prices: list[float] = Field(
        min_length=2,
        description="Values of `expert_price` to choose from, rising. With 0 as the first, slack means no re-routing.",
    )
    token_ms: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Milliseconds within which 95 of 100 output tokens come."
    )
    waiting: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Requests that may wait for a replica, as a mean."
    )
    max_kl: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Most `estimated_kl` that a price may cost, in nats per token. It needs a tuned artifact.",
    )
    period_s: float = Field(default=15, ge=10, le=600, description="Seconds between two decisions.")

    @model_validator(mode="after")
    def _can_work(self) -> Self:
        if self.token_ms is None and self.waiting is None:
            raise ValueError("the controller has no objective: set token_ms, waiting, or both")
        if any(price < 0 for price in self.prices) or self.prices != sorted(set(self.prices)):
            raise ValueError(f"prices must rise, and not be negative: {self.prices}")
        return self


class Load(NamedTuple):
    """What the replicas measured in a period, together; None where nothing was counted."""

    slow_share: float | None = None  # of the output tokens, those that took longer than `token_ms`
    waiting: float | None = None  # requests that waited for a replica, as a mean over its steps
    tokens_per_s: float = 0.0  # that a replica gave out, as a mean
    estimated_kl: float | None = None  # nats per token


class Decision(NamedTuple):
    """The place of a price on the ladder, and why it is that one."""

    place: int
    why: str


class Controller:
    """Goes up the ladder by as much as the objective is missed, and down to the least price that is believed enough.

    Up: one place, and one more for every doubling of the load over the objective. How fast a queue grows says only
    roughly what is missing, so this may be too far. Then the way down corrects it.

    Down: while the objective is kept, the throughput is what the load asks for, and not what the price allows. It is
    compared with the throughputs at which smaller prices were too small, and the least price that bears it is taken,
    however far below. A price of which nothing is known is tried when the load is low, if it is the next one. One that
    was too small for as much is not tried again soon: a steady load keeps the price that it needs.

    Attributes:
        place: of the price in force, on the ladder.
        calm: the throughputs of the last periods in which a smaller price would have been enough.
        blind: periods for which nothing was measured.
        before: the load of the last period, as a share of the objective.
        is_new: whether the price rose after the last period: it takes one to tell.
        too_small: the throughput at which the price of a place missed the objective, and the periods since.
        ceiling: the last place that may be taken, as a greater one cost too much, and the periods since; None: any may.
    """

    def __init__(self, config: ControlConfig, place: int = 0):
        self.config, self.place = config, place
        self.calm, self.blind, self.before, self.is_new = deque[float](maxlen=PATIENCE), 0, 0.0, False
        self.too_small: dict[int, tuple[float, int]] = {}
        self.ceiling: tuple[int, int] | None = None

    @property
    def price(self) -> float:
        return self.config.prices[self.place]

    @property
    def settings(self) -> dict[str, Any]:
        """What a replica is told: without a price nothing is re-routed."""
        return {"enabled": self.price > 0, "expert_price": self.price}

    def decide(self, load: Load) -> Decision:
        """Returns the price for the next period, after what the last one measured."""
        self._age()
        pressure = self._pressure(load)
        if pressure is None:
            return self._unseen()
        self.blind = 0
        is_easing, self.before = pressure < EASING * self.before, pressure
        is_new, self.is_new = self.is_new, False
        limit, cost = self.config.max_kl, load.estimated_kl
        if limit is not None and cost is not None and cost > limit and self.place:
            self.ceiling = self.place - 1, 0
            why = f"an estimated KL divergence of {cost:.3g} is over {limit:g}"
            return self._go(self.place - places_of(cost / limit), why)
        why = f"the load is {pressure:.2f} of the objective"
        if pressure <= 1:
            return self._kept(load.tokens_per_s, pressure < CALM, why)
        self.calm.clear()
        if is_new or is_easing:
            return Decision(self.place, f"{why}, and {'the price is new' if is_new else 'falling'}")
        self.too_small[self.place] = load.tokens_per_s, 0
        last = len(self.config.prices) - 1 if self.ceiling is None else self.ceiling[0]
        if self.place >= last:
            return Decision(self.place, f"{why}, and no greater price is allowed")
        self.is_new = True
        return self._go(min(last, self.place + places_of(pressure)), why)

    def _kept(self, rate: float, is_low: bool, why: str) -> Decision:
        """Returns the price after a period that kept the objective, at so many tokens per second."""
        if self._enough(rate, is_low) == self.place:
            self.calm.clear()
            if is_low and self.place:
                why += f", but a smaller price was not enough for {rate:.3g} tokens per second and replica"
            return Decision(self.place, why)
        self.calm.append(rate)
        enough = self._enough(max(self.calm), is_low)
        if len(self.calm) < PATIENCE or enough == self.place:
            return Decision(self.place, why)
        return self._go(enough, f"{why}, and a smaller price has been enough for {PATIENCE} periods")

    def _enough(self, rate: float, is_low: bool) -> int:
        """Returns the least place that is believed enough for so many tokens per second, up to the one in force.

        `is_low` says whether the load is so low that the place below may be tried, if nothing is known of it.
        """
        borne, barred = [self.place], [0]
        if is_low:
            borne.append(max(0, self.place - 1))
        for place, (least, periods) in self.too_small.items():
            if place < self.place and rate <= HEADROOM * least:
                borne.append(place)
            elif place < self.place and periods < FORGET:
                barred.append(place + 1)
        return max(min(borne), *barred)

    def _age(self) -> None:
        self.too_small = {place: (rate, periods + 1) for place, (rate, periods) in self.too_small.items()}
        if self.ceiling is not None:
            place, periods = self.ceiling
            self.ceiling = (place, periods + 1) if periods < FORGET else None

    def _pressure(self, load: Load) -> float | None:
        """Returns the load as a share of what the objective allows, of two that which is nearer; None if unseen."""
        found = []
        if self.config.token_ms is not None and load.slow_share is not None:
            found.append(load.slow_share / SLOW_SHARE)
        if self.config.waiting is not None and load.waiting is not None:
            found.append(load.waiting / self.config.waiting)
        return max(found, default=None)

    def _unseen(self) -> Decision:
        self.blind += 1
        self.is_new = False
        self.calm.clear()
        if self.blind < BLIND:
            return Decision(self.place, "nothing was measured")
        return self._go(0, f"nothing was measured for {self.blind} periods")

    def _go(self, place: int, why: str) -> Decision:
        self.place = max(0, place)
        self.calm.clear()
        return Decision(self.place, why)


def places_of(miss: float) -> int:
    """Returns how many places a limit that is exceeded by this factor is worth: one, and one more for every doubling,
    as each price of a usual ladder is about twice the one before."""
    return 1 + int(math.log2(miss))

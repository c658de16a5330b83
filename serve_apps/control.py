"""How far re-routing may go now: a controller that follows the load along a ladder of expert prices.

It knows nothing of Ray: it is given what was measured in a period, and says which price holds in the next one, and why.
Where it can't see, or something is wrong, it goes towards quality.
"""

from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SLOW_SHARE = 0.05  # of the tokens may be slower than the objective: it is one for the 95th percentile
CALM = 0.5  # of what the objective allows: below it a price may fall
PATIENCE = 3  # calm periods before it falls
HEADROOM = 0.9  # of the throughput at which the price below was too small: above it a price does not fall
EASING = 0.9  # of the load of the period before: what is falling so fast needs no greater price
FORGET = 48  # periods after which such a throughput is no longer believed, as requests may be others by now
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
    tokens_per_s: float | None = None  # that a replica gave out, as a mean
    estimated_kl: float | None = None  # nats per token


class Decision(NamedTuple):
    """The place of a price on the ladder, and why it is that one."""

    place: int
    why: str


class Controller:
    """Takes the next price when the objective is missed, and the one before after a while of calm.

    It remembers at what throughput a price was too small, and does not go back to that price for as much again: a
    steady load that needs a price keeps it.

    Attributes:
        place: of the price in force, on the ladder.
        calm: periods for which the load has been low.
        blind: periods for which nothing was measured.
        before: the load of the last period, as a share of the objective.
        is_new: whether the price rose after the last period: it takes one to tell.
        too_small: the throughput at which the price of a place missed the objective, and the periods since.
        ceiling: the last place that may be taken, as a greater one cost too much, and the periods since; None: any may.
    """

    def __init__(self, config: ControlConfig, place: int = 0):
        self.config, self.place = config, place
        self.calm, self.blind, self.before, self.is_new = 0, 0, 0.0, False
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
        self.calm = self.calm + 1 if pressure < CALM else 0
        limit, cost = self.config.max_kl, load.estimated_kl
        if limit is not None and cost is not None and cost > limit and self.place:
            self.ceiling = self.place - 1, 0
            return self._go(self.place - 1, f"an estimated KL divergence of {cost:.3g} is over {limit:g}")
        why = f"the load is {pressure:.2f} of the objective"
        if pressure > 1 and (is_new or is_easing):
            return Decision(self.place, f"{why}, and {'the price is new' if is_new else 'falling'}")
        if pressure > 1:
            last = len(self.config.prices) - 1 if self.ceiling is None else self.ceiling[0]
            if load.tokens_per_s is not None:
                self.too_small[self.place] = load.tokens_per_s, 0
            if self.place >= last:
                return Decision(self.place, f"{why}, and no greater price is allowed")
            self.is_new = True
            return self._go(self.place + 1, why)
        if not self.place or self.calm < PATIENCE:
            return Decision(self.place, why)
        below, rate = self.too_small.get(self.place - 1), load.tokens_per_s
        if below is not None and rate is not None and rate > HEADROOM * below[0]:
            return Decision(self.place, f"{why}, but at {below[0]:.3g} tokens per second the price below was too small")
        return self._go(self.place - 1, f"{why}, for {self.calm} periods")

    def _age(self) -> None:
        self.too_small = {
            place: (rate, periods + 1) for place, (rate, periods) in self.too_small.items() if periods < FORGET
        }
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
        self.calm = 0
        if self.blind < BLIND:
            return Decision(self.place, "nothing was measured")
        return self._go(0, f"nothing was measured for {self.blind} periods")

    def _go(self, place: int, why: str) -> Decision:
        self.place, self.calm = place, 0
        return Decision(place, why)

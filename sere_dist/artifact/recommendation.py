"""The settings that a tuning recommends for an artifact: what each layer does, and what it was seen to cost."""

import math
import statistics
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sere_dist.method.records import Settings


class LayerSetting(BaseModel):
    """The settings of one layer; see `config.ReroutingConfig`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    select_top_k: int = Field(ge=1)
    threshold: float = Field(default=0.0, ge=0.0, le=1.0)
    expert_price: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)

    @property
    def numbers(self) -> Settings:
        """The same as re-routing takes it."""
        return Settings(self.select_top_k, self.threshold, self.expert_price)

    def __str__(self) -> str:
        others = {"rho": self.threshold, "expert price": self.expert_price}
        return f"S = {self.select_top_k}" + "".join(f", {name} {value:g}" for name, value in others.items() if value)


class Outcome(BaseModel):
    """What a setting came to on some texts, in batches of `batch`; see `evaluation.outcome`.

    Errors are standard errors over texts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    HEADINGS: ClassVar = ("active experts", "KL", "loss", "perplexity", "likeliest token kept")

    batch: int
    active_experts: float  # that a layer runs in a step, the mean over layers and steps
    kl: float  # from the model as it is, nats a token
    kl_error: float
    loss_rise: float  # over the model as it is, nats a token
    loss_rise_error: float
    perplexity: float
    top1: float  # share of the steps whose likeliest token stays
    top1_error: float
    # That re-routing is estimated to make, per token, summed over layers, in the unit of w² n. None: not estimated, as
    # under the paper's policy and by older versions.
    estimated_error: float | None = None

    def cells(self, off: "Outcome | None" = None) -> list[str]:
        """The outcome as people read it, below `HEADINGS`; beside `off`, the outcome of the model as it is."""
        active = f"{self.active_experts:.1f}" + (f" of {off.active_experts:.1f}" if off else "")
        kl = f"{self.kl:.4f} ±{self.kl_error:.4f}"
        rise = f"{self.loss_rise:+.4f} ±{self.loss_rise_error:.4f}"
        return [active, kl, rise, f"{self.perplexity:.2f}", f"{self.top1:.1%} ±{self.top1_error:.1%}"]


class KlEstimate(BaseModel):
    """What the errors that an engine estimates come to in KL divergence, as a tuning saw it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nats: float  # of KL divergence per token, by an estimated error of 1 per token, summed over layers
    spread: float  # the factor by which that was off, up or down: one standard deviation of the ratios' logarithms
    layers: int

    def of(self, error: float, rows: float) -> float:
        """Returns nats per token. `error` is summed over rows and layers, and `rows` are counted in each layer."""
        return self.nats * error * self.layers / rows


class Recommendation(BaseModel):
    """The content of `recommended.json`."""

    model_config = ConfigDict(extra="forbid")

    tensors_sha256: str  # of the artifact's matrices
    policy: Literal["sere", "projection"]
    layers: dict[int, LayerSetting]
    batch: int  # that it was tuned for
    budget: str  # in words
    texts: str  # that it was tuned and measured on, in words
    curve: list[Outcome]  # the settings that were weighed against each other, on the texts for tuning
    tuned: Outcome  # the recommended one of them
    off: list[Outcome]  # from here on on other texts: the model as it is, by batch
    recommended: list[Outcome]  # the recommended one
    uniform: dict[int, Outcome]  # S, and nothing else, in all layers: at the tuned batch, by S
    versions: dict[str, str]

    @model_validator(mode="after")
    def _by_batch(self) -> "Recommendation":
        if [outcome.batch for outcome in self.off] != [outcome.batch for outcome in self.recommended]:
            raise ValueError("off and recommended must have the same batches")
        if self.batch not in [outcome.batch for outcome in self.off]:
            raise ValueError(f"nothing was measured at the batch of {self.batch} that it was tuned for")
        return self

    @property
    def kl_estimate(self) -> KlEstimate | None:
        """What estimated errors come to: the geometric mean over the settings that were measured.

        None: no two of them have both an estimated error and a KL divergence that is more than twice its own error.
        """
        measured = [*self.curve, self.tuned, *self.recommended]
        logs = [
            math.log(each.kl / each.estimated_error)
            for each in measured
            if each.estimated_error and each.kl > 2 * each.kl_error
        ]
        if len(logs) < 2:
            return None
        nats, spread = math.exp(statistics.fmean(logs)), math.exp(statistics.stdev(logs))
        return KlEstimate(nats=nats, spread=spread, layers=len(self.layers))

    def at(self, outcomes: list[Outcome]) -> Outcome:
        """Returns that of these outcomes which is of the tuned batch."""
        return next(outcome for outcome in outcomes if outcome.batch == self.batch)

    def held_out(self) -> Iterator[list[str]]:
        """Yields what was measured on held-out texts as people read it: a setting, and its cells."""
        for off, ours in zip(self.off, self.recommended, strict=True):
            yield [f"recommended, batch {ours.batch}", *ours.cells(off)]
        for keep, outcome in self.uniform.items():
            yield [f"S = {keep}, batch {outcome.batch}", *outcome.cells(self.at(self.off))]

    def __str__(self) -> str:
        off, ours = self.at(self.off), self.at(self.recommended)
        return (
            f"for batch {self.batch} and {self.budget}, policy {self.policy}: {ours.active_experts:.1f} of "
            f"{off.active_experts:.1f} active experts at a KL of {ours.kl:.4f} +- {ours.kl_error:.4f} nats a token, "
            f"loss {ours.loss_rise:+.4f} +- {ours.loss_rise_error:.4f}"
        )

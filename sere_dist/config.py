"""What a user may set about re-routing, checked once, here: `additional_config={"sere": {...}}` in vLLM."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# Settings that may change in a running engine.
CHANGEABLE = ("enabled", "rows", "min_rows", "max_rows", "select_top_k", "threshold", "expert_price", "traffic_price")

# Settings that policy `recommended` takes, for each layer, from the artifact; it was measured without a traffic_price.
RECOMMENDED = ("policy", "select_top_k", "threshold", "expert_price", "traffic_price")

MAX_ROWS = 2**31 - 1  # of a step, as the kernel counts them


class ReroutingConfig(BaseModel):
    """Settings of re-routing in one engine. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    artifact: Path = Field(description="Folder that a calibration wrote.")
    select_top_k: int | None = Field(
        default=None, ge=1, description="S: experts that every token keeps; the model's own top-k means off."
    )
    threshold: float = Field(
        default=0.0, ge=0.0, le=1.0, description="rho: an expert with no active substitute this similar stays; 0: none."
    )
    rows: Literal["decode", "all"] = Field(default="decode", description="Re-route decode rows only, or prefill too.")
    min_rows: int = Field(
        default=1, ge=0, le=MAX_ROWS, description="Leave steps alone in which fewer rows could be re-routed."
    )
    max_rows: int | None = Field(
        default=None, ge=0, le=MAX_ROWS, description="Leave steps alone in which more rows could be."
    )
    enabled: bool = Field(default=True, description="Start with re-routing on; it can be switched while serving.")
    policy: Literal["sere", "projection", "recommended"] = Field(
        default="sere",
        description="The paper's policy, the cheapest of all substitutes and dropping (needs method projection), or "
        "what a tuning wrote into the artifact for each layer.",
    )
    expert_price: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Of policy projection: the error that one expert less to run is worth; 0: S alone says what runs.",
    )
    traffic_price: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Of policy projection under expert parallelism: the error that one domain less to visit is worth.",
    )
    domain: Literal["rank", "node"] = Field(default="rank", description="Between what traffic has its price.")
    primary_scope: Literal["rank", "group"] = Field(
        default="rank",
        description="Of data-parallel attention: whose tokens' top experts are primary, each rank's own or all ranks'.",
    )
    cpu_dispatch: Literal["all_gather", "all_to_all"] = Field(
        default="all_gather",
        description="Of data-parallel attention on CPUs: tokens go to every rank, or only where their experts are.",
    )
    placement: Path | None = Field(
        default=None, description="Of expert parallelism: file of `sere-dist place`, which expert lives on which rank."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "ReroutingConfig":
        if self.max_rows is not None and self.max_rows < self.min_rows:
            raise ValueError(f"max_rows ({self.max_rows}) must not be less than min_rows ({self.min_rows})")
        if self.policy == "recommended":
            if given := [name for name in RECOMMENDED[1:] if getattr(self, name)]:
                raise ValueError(
                    f"policy: recommended leaves no choice of {', '.join(given)}: set another policy for it"
                )
            return self
        if self.select_top_k is None:
            raise ValueError("select_top_k is missing; only policy: recommended brings its own")
        for name in ("expert_price", "traffic_price"):
            if getattr(self, name) and self.policy != "projection":
                raise ValueError(f"{name} ({getattr(self, name)}) needs policy: projection, not {self.policy}")
        return self

    def resolved(self) -> "ReroutingConfig":
        """Returns the same with absolute paths: other processes may run elsewhere."""
        paths = {name: path.resolve() for name in ("artifact", "placement") if (path := getattr(self, name))}
        return self.model_copy(update=paths)

    def check_top_k(self, num_experts_per_token: int) -> None:
        """Raises ValueError if `select_top_k` is more than the experts that the model uses a token."""
        if self.select_top_k is not None and self.select_top_k > num_experts_per_token:
            raise ValueError(
                f"select_top_k ({self.select_top_k}) must be between 1 and the model's experts a token "
                f"({num_experts_per_token})"
            )

    def changed(self, changes: Mapping[str, Any], num_experts_per_token: int) -> "ReroutingConfig":
        """Returns these settings with others of `CHANGEABLE`, for a model that uses so many experts a token.

        Raises:
            ValueError: a value is out of range, or can't be changed in a running engine; one line for each.
        """
        if fixed := sorted(changes.keys() - CHANGEABLE):
            raise ValueError(f"{', '.join(fixed)} can't be changed while serving; {', '.join(CHANGEABLE)} can")
        if self.policy == "recommended" and (taken := sorted(changes.keys() & RECOMMENDED)):
            raise ValueError(
                f"policy: recommended leaves no choice of {', '.join(taken)}; start with another policy to set that"
            )
        try:
            settings = ReroutingConfig.model_validate({**self.model_dump(), **changes})
        except ValidationError as error:
            wrong = (".".join(map(str, each["loc"])) + f": {each['msg']}" for each in error.errors())
            raise ValueError("\n".join(line.removeprefix(": ") for line in wrong)) from error
        settings.check_top_k(num_experts_per_token)
        return settings

"""What a user may set: `additional_config={"sere": {...}}` in vLLM. It is checked once, here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sere_dist.files import ArtifactName, FilePath, HubName
from sere_dist.method.records import Settings

# Settings that may change in a running engine.
CHANGEABLE = (
    "enabled",
    "rows",
    "min_rows",
    "max_rows",
    "select_top_k",
    "threshold",
    "expert_price",
    "traffic_price",
    "balance_price",
    "share",
    "shadow_share",
)

# Settings that policy `recommended` takes, for each layer, from the artifact; it was measured without the prices of
# groups of ranks.
RECOMMENDED = ("policy", "select_top_k", "threshold", "expert_price", "traffic_price", "balance_price")

MAX_ROWS = 2**31 - 1  # Rows of a step, as the kernel counts them.


class PolicyConfig(BaseModel):
    """What the experts of one model are re-routed by. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    artifact: ArtifactName = Field(
        description="Folder of the artifact that a calibration wrote, or `hf://ORG/NAME` or `hf://ORG/NAME@REVISION` "
        "for one on the Hugging Face Hub."
    )
    policy: Literal["sere", "projection", "recommended"] = Field(
        default="sere",
        description="`sere` is the paper's policy. `projection` changes each slot as cheaply as possible, and needs an "
        "artifact of `--method projection`. `recommended` is what a tuning added to the artifact, per layer.",
    )
    select_top_k: int | None = Field(
        default=None,
        ge=0,
        description="S: number of experts that every token keeps. With the model's own top-k, nothing is re-routed. "
        "With 0, `expert_price` and `balance_price` alone decide which experts run.",
    )
    threshold: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="rho: the lowest similarity at which a substitute is accepted. An expert without such a substitute "
        "stays. With 0, any primary expert is accepted.",
    )
    expert_price: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Error that running one expert less is worth, for policy projection. With 0, S alone decides.",
    )

    @model_validator(mode="after")
    def _has_what_the_policy_needs(self) -> Self:
        if self.policy == "recommended":
            if given := [name for name in RECOMMENDED[1:] if getattr(self, name, None)]:
                raise ValueError(
                    f"policy: recommended leaves no choice of {', '.join(given)}: set another policy for it"
                )
            return self
        if self.select_top_k is None:
            raise ValueError("select_top_k is missing; only policy: recommended brings its own")
        for name in ("expert_price", "traffic_price", "balance_price"):
            if (price := getattr(self, name, 0)) and self.policy != "projection":
                raise ValueError(f"{name} ({price}) needs policy: projection, not {self.policy}")
        priced = self.expert_price or getattr(self, "balance_price", 0)
        if self.select_top_k == 0 and not priced and getattr(self, "enabled", True):
            raise ValueError("with select_top_k 0 prices alone decide what runs: set expert_price or balance_price")
        return self

    def check_top_k(self, num_experts_per_token: int) -> None:
        """Raises ValueError if `select_top_k` is more than the experts that the model uses per token."""
        if self.select_top_k is not None and self.select_top_k > num_experts_per_token:
            raise ValueError(
                f"select_top_k ({self.select_top_k}) must be at most the model's experts per token "
                f"({num_experts_per_token})"
            )


class ReroutingConfig(PolicyConfig):
    """Settings of re-routing in one engine. Unknown keys are refused."""

    rows: Literal["decode", "all"] = Field(
        default="decode", description="Rows to re-route: those that decode, or all, which includes prompts."
    )
    min_rows: int = Field(
        default=1, ge=0, le=MAX_ROWS, description="Steps with fewer rows that could be re-routed are left alone."
    )
    max_rows: int | None = Field(
        default=None, ge=0, le=MAX_ROWS, description="Steps with more rows that could be re-routed are left alone."
    )
    enabled: bool = Field(
        default=True, description="Whether re-routing is on. It can be switched while the engine serves."
    )
    share: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="Share of the sequences that are re-routed, by chance. The others are answered as if they opted "
        "out.",
    )
    shadow_share: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Share of the re-routed decode steps that also run without re-routing, to measure the KL "
        "divergence. Set it, to 0 for none yet, so that it may change while serving.",
    )
    traffic_price: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Error that visiting one domain less is worth, for policy projection with expert parallelism.",
    )
    balance_price: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Error that running one expert less on the rank with most is worth, for policy projection with "
        "expert parallelism.",
    )
    domain: Literal["rank", "node"] = Field(
        default="rank", description="Whether `traffic_price` counts ranks or nodes."
    )
    primary_scope: Literal["rank", "group"] = Field(
        default="rank",
        description="Whose tokens decide which experts are primary, with data-parallel attention: those of each rank "
        "alone, or those of the whole group.",
    )
    cpu_dispatch: Literal["all_gather", "all_to_all"] = Field(
        default="all_gather",
        description="How tokens reach their experts, with data-parallel attention on CPUs: `all_gather` sends them to "
        "every rank, `all_to_all` only to the ranks of their experts.",
    )
    exact_cache: bool = Field(
        default=False,
        description="Whether vLLM's prefix cache keeps prompts alone, so that no value of a re-routed row outlives its "
        "request. The next turn of a conversation then computes the earlier answers again, without re-routing.",
    )
    placement: FilePath | None = Field(
        default=None,
        description="File of `sere-dist place`, which says which rank holds which expert under expert parallelism.",
    )
    draft: PolicyConfig | None = Field(
        default=None,
        description="Settings for the experts of the draft model, in speculative decoding with `draft_model`: "
        "its own `artifact`, `policy`, `select_top_k`, `threshold` and `expert_price`. Without it they are left alone.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_rows is not None and self.max_rows < self.min_rows:
            raise ValueError(f"max_rows ({self.max_rows}) must not be less than min_rows ({self.min_rows})")
        if self.exact_cache and self.rows == "all":
            raise ValueError("exact_cache keeps prompts, which rows: all re-routes too: set rows: decode, or remove it")
        return self

    @property
    def numbers(self) -> Settings:
        """The same as re-routing takes it; S = 0 (off) where policy `recommended` brings its own."""
        prices = (self.expert_price, self.traffic_price, self.balance_price)
        return Settings(self.select_top_k or 0, self.threshold, *prices)

    def resolved(self) -> "ReroutingConfig":
        """Returns the same with absolute paths: other processes may run elsewhere. Names on the Hub stay."""
        paths: dict[str, Any] = {"artifact": absolute(self.artifact)}
        if self.placement is not None:
            paths["placement"] = self.placement.resolve()
        if self.draft is not None:
            paths["draft"] = self.draft.model_copy(update={"artifact": absolute(self.draft.artifact)})
        return self.model_copy(update=paths)

    def of_draft(self) -> "ReroutingConfig | None":
        """Returns what the draft model is re-routed by, if it is."""
        if self.draft is None:
            return None
        return ReroutingConfig(**self.draft.model_dump(), enabled=self.enabled)

    def changed(self, changes: Mapping[str, Any], num_experts_per_token: int) -> "ReroutingConfig":
        """Returns these settings with others of `CHANGEABLE`, for a model that uses so many experts per token.

        Raises:
            ValueError: a value is out of range, or can't be changed in a running engine; one line for each.
        """
        if fixed := sorted(changes.keys() - CHANGEABLE):
            raise ValueError(f"{', '.join(fixed)} can't be changed while serving; {', '.join(CHANGEABLE)} can")
        if self.policy == "recommended" and (taken := sorted(changes.keys() & RECOMMENDED)):
            raise ValueError(
                f"policy: recommended leaves no choice of {', '.join(taken)}; start with another policy to set that"
            )
        shadow_share = changes.get("shadow_share", self.shadow_share)
        if (shadow_share is None) != (self.shadow_share is None):
            raise ValueError(
                "shadow_share can't be changed while serving to a number or from one to none: start with shadow_share: "
                "0, and set it to 0 to stop the checks"
            )
        try:
            settings = ReroutingConfig.model_validate({**self.model_dump(), **changes})
        except ValidationError as error:
            raise ValueError(explain(error)) from error
        settings.check_top_k(num_experts_per_token)
        return settings


def absolute(artifact: str) -> str:
    """Returns the absolute path of an artifact, or its name on the Hub."""
    return artifact if HubName.parse(artifact) else str(Path(artifact).resolve())


def explain(error: ValidationError) -> str:
    """Returns what is wrong with which field, one line for each."""
    wrong = (".".join(map(str, each["loc"])) + f": {each['msg']}" for each in error.errors())
    return "\n".join(line.removeprefix(": ") for line in wrong)

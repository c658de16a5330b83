"""What a user may set about re-routing, checked once, here: `additional_config={"sere": {...}}` in vLLM."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sere_dist.method.records import Settings

# Every environment variable of this project, and what it does. A malformed value raises.
ALLOW_UNTESTED_VLLM = "SERE_ALLOW_UNTESTED_VLLM"  # 1: start on a vLLM release that the plugin was not tested with
API_KEY = "SERE_API_KEY"  # keys that the Serve application's clients must give; or SERE_API_KEY_FILE, a file with them
ADMIN_TOKEN = "SERE_ADMIN_TOKEN"  # tokens that open its /sere/settings; or SERE_ADMIN_TOKEN_FILE

PLUGIN = "sere_dist"  # the name of the entry point that vLLM loads

# Settings that may change in a running engine.
CHANGEABLE = ("enabled", "rows", "min_rows", "max_rows", "select_top_k", "threshold", "expert_price", "traffic_price")

# Settings that policy `recommended` takes, for each layer, from the artifact; it was measured without a traffic_price.
RECOMMENDED = ("policy", "select_top_k", "threshold", "expert_price", "traffic_price")

MAX_ROWS = 2**31 - 1  # of a step, as the kernel counts them

OPT_OUT = "sere"  # a request's own `extra_args` (`vllm_xargs` over HTTP)

# The reference implementation's `hf_overrides`: its architectures, and its S where none is named.
REFERENCE_ARCHITECTURES = {
    f"{name}SERE": name for name in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM")
}
REFERENCE_SELECT_TOP_K = 4


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

    @property
    def numbers(self) -> Settings:
        """The same as re-routing takes it; S = 0 (off) where policy `recommended` brings its own."""
        return Settings(self.select_top_k or 0, self.threshold, self.expert_price, self.traffic_price)

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


def environment_secrets(name: str) -> tuple[str, ...]:
    """Returns the words of an environment variable, or of the file that `<name>_FILE` names; none if neither is set.

    Several words are several secrets, any of which will do: an old and a new one while they are exchanged.

    Raises:
        ValueError: both are set, or what is set can't be read or holds nothing.
    """
    file_name = f"{name}_FILE"
    given = [variable for variable in (name, file_name) if variable in os.environ]
    if not given:
        return ()
    if len(given) > 1:
        raise ValueError(f"{name} and {file_name} are both set: unset one")
    text = os.environ[given[0]]
    if given[0] == file_name:
        try:
            text = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file_name}: {text} can't be read: {error}") from error
    if not text.split():
        raise ValueError(f"{given[0]} is set but holds nothing: give it a secret, or unset it")
    return tuple(text.split())


def environment_flag(name: str) -> bool:
    """Returns whether an environment variable of this project is 1; unset and 0 are False.

    Raises:
        ValueError: it is set to anything else.
    """
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, not {value!r}")
    return value == "1"


def plugin_is_disabled(vllm_plugins: str | None) -> bool:
    """Says whether this value of `VLLM_PLUGINS` keeps vLLM from loading the plugin, of which vLLM says nothing."""
    return vllm_plugins is not None and PLUGIN not in vllm_plugins.split(",")


def opts_out(extra_args: dict[str, Any] | None) -> bool:
    """Says whether a request's extra arguments have `sere` off: its rows then neither change nor vote.

    Off is "off", "false", 0 or False. Anything else leaves re-routing as it is: a request can't switch it on.
    """
    return bool(extra_args) and str(extra_args.get(OPT_OUT, "")).lower() in ("off", "false", "0")


def settings_from_overrides(
    hf_overrides: Any, additional_config: Mapping[str, Any], model: str
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Returns `hf_overrides` and `additional_config` as sere_dist means them; None if they aren't the reference's.

    `select_top_k` and `threshold` become settings of `additional_config["sere"]`, whose own entries win; the artifact
    is the model's folder, where the reference implementation saved the matrices.

    Raises:
        ValueError: an architecture that the reference implementation does not have.
    """
    if not isinstance(hf_overrides, dict):
        return None
    names = hf_overrides.get("architectures") or []
    if not any(name.endswith("SERE") for name in names):
        return None
    if unknown := [name for name in names if name not in REFERENCE_ARCHITECTURES]:
        raise ValueError(
            f"hf_overrides names {', '.join(unknown)}; the reference has {', '.join(REFERENCE_ARCHITECTURES)}"
        )
    overrides = {key: value for key, value in hf_overrides.items() if key not in ("select_top_k", "threshold")}
    overrides["architectures"] = [REFERENCE_ARCHITECTURES[name] for name in names]
    ours = additional_config.get("sere", {})
    of_reference = {"select_top_k": REFERENCE_SELECT_TOP_K} if ours.get("policy") != "recommended" else {}
    of_reference |= {name: hf_overrides[name] for name in ("select_top_k", "threshold") if name in hf_overrides}
    return overrides, {**additional_config, "sere": {"artifact": model, **of_reference, **ours}}

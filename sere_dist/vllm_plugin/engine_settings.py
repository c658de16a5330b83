"""The settings on their way from vLLM's front end to its workers."""

from typing import Any

from vllm.config import ModelConfig, VllmConfig

import sere_dist
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.reference import load_artifact
from sere_dist.config import ReroutingConfig
from sere_dist.moe import MoeShape


class EngineSettings(str):
    """What stands in vLLM's `additional_config["sere"]` once the front end has checked it.

    vLLM makes `additional_config` part of the key of its compile cache. So the text says only what compiled code
    depends on, and a start with other numbers does not compile the model anew.

    Attributes:
        settings: all settings, in JSON's types.
    """

    settings: dict[str, Any]


def engine_settings(settings: ReroutingConfig, policy: str) -> EngineSettings:
    """Returns the settings for the workers; `policy` is the one that the layers follow, "sere" or "projection"."""
    what = f"policy {policy}, primary_scope {settings.primary_scope}"
    if settings.draft is not None:
        what += ", draft model re-routed"
    text = EngineSettings(f"sere_dist {sere_dist.__version__}: {what}")
    text.settings = settings.model_dump(mode="json")
    return text


def settings_of(sere: Any) -> ReroutingConfig:
    """Returns the settings in `additional_config["sere"]`: as a user wrote them, or as the front end left them."""
    return ReroutingConfig.model_validate(sere.settings if isinstance(sere, EngineSettings) else sere)


def artifact_of(settings: ReroutingConfig, model: ModelConfig) -> Artifact:
    """Returns the artifact that these settings name for a model of the engine."""
    return load_artifact(settings.artifact, MoeShape.from_config(model.hf_config), model.model)


def returns_routed_experts(vllm_config: VllmConfig) -> bool:
    """Says whether the engine returns the experts that each token was routed to."""
    outputs: Any = getattr(vllm_config, "aux_output_config", vllm_config.model_config)  # there in vLLM 0.30
    return outputs.enable_return_routed_experts

"""The Ray Serve application: vLLM replicas that re-route, behind the OpenAI API.

    serve run serve_apps/tiny_moe.yaml

`build_app` checks its arguments, and leaves the serving to Ray Serve LLM.
"""

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_openai_app
from transformers import AutoConfig

from sere_dist.config import ReroutingConfig
from sere_dist.moe import MoeShape
from sere_dist.reference import load_artifact

PLUGIN = "sere_dist"  # the name of the entry point that vLLM loads


class AppConfig(BaseModel):
    """Arguments of the application. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(description="Checkpoint folder or Hugging Face model id.")
    model_id: str | None = Field(default=None, description="The name that clients use; default: the model's own.")
    rerouting: ReroutingConfig | None = Field(default=None, description="None serves the model as it is.")
    accelerator_type: str | None = Field(default=None, description="Ray's name of the GPU; None: CPU replicas.")
    engine: dict[str, Any] = Field(default_factory=dict, description="vLLM's engine arguments.")
    deployment: dict[str, Any] = Field(default_factory=dict, description="Ray Serve's deployment options.")
    ingress: dict[str, Any] = Field(default_factory=dict, description="The same, of the HTTP ingress.")
    environment: dict[str, str] = Field(default_factory=dict, description="Environment variables of the replicas.")


def build_app(args: dict[str, Any]) -> Application:
    """Builds the application from the `args` of a Serve configuration file.

    Raises:
        ValueError: an argument is unknown or out of range, or the artifact is not for the model.
    """
    config = AppConfig.model_validate(args)
    engine = dict(config.engine)
    if "sere" in engine.get("additional_config", {}):
        raise ValueError("re-routing is set by `rerouting`, not in the engine's additional_config")
    if config.rerouting is not None:
        plugins = config.environment.get("VLLM_PLUGINS", os.environ.get("VLLM_PLUGINS"))
        if plugins is not None and PLUGIN not in plugins.split(","):
            raise ValueError(f"VLLM_PLUGINS is {plugins!r} and leaves {PLUGIN} out: the model would not be re-routed")
        model_config = AutoConfig.from_pretrained(config.model)
        shape = MoeShape.from_config(model_config)
        config.rerouting.check_top_k(shape.num_experts_per_token)
        revision = getattr(model_config, "_commit_hash", None)
        artifact = load_artifact(config.rerouting.artifact, shape, config.model)
        artifact.check_serves(shape, config.model, revision)
        rerouting = config.rerouting.model_copy(update={"artifact": config.rerouting.artifact.resolve()})
        additional = engine.get("additional_config", {})
        engine["additional_config"] = {**additional, "sere": rerouting.model_dump(mode="json")}
    model = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    placement = {}
    if config.accelerator_type is None:
        workers = engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1)
        placement = {"placement_group_config": {"bundles": [{"CPU": 1}] * workers}}
    llm_config = LLMConfig(
        model_loading_config={"model_id": config.model_id or Path(config.model).name, "model_source": model},
        engine_kwargs=engine,
        accelerator_type=config.accelerator_type,
        deployment_config=config.deployment,
        runtime_env={"env_vars": config.environment},
        # Serve LLM's default of 50 ms gathers streamed tokens: it adds to the time to the first one.
        experimental_configs={"stream_batching_interval_ms": 0},
        **placement,
    )
    return build_openai_app({"llm_configs": [llm_config], "ingress_deployment_config": config.ingress})

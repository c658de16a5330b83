"""The Ray Serve application: vLLM replicas that re-route, behind the OpenAI API.

    serve run serve_apps/tiny_moe.yaml

`build_app` checks its arguments, and leaves the serving to Ray Serve LLM.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.llm import LLMConfig, build_dp_deployment, build_llm_deployment

from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.hub import pinned
from sere_dist.artifact.recommendation import KlEstimate
from sere_dist.artifact.reference import load_artifact_of
from sere_dist.config import ReroutingConfig
from sere_dist.environment import ADMIN_TOKEN, API_KEY, EXACT_API_KEY, PLUGIN, plugin_is_disabled
from serve_apps.control import ControlConfig
from serve_apps.ingress import HEADER, OPT_OUT_BY, OptOutBy, build_ingress
from serve_apps.server import DECODE_SERVERS, PREFILL_SERVERS, SERVERS
from serve_apps.settings import KEEPER, DeployedKeeper

NAME_PREFIX, PREFILL_PREFIX = "LLMServer:", "Prefill:"  # of the deployments; the model's name follows
DECODE_NIXL_PORT = 22000  # where Ray Serve LLM puts it too: its default, 20000, is the prefill pool's on the same node
# What Ray Serve LLM's router lets an answer take. Replicas and ingresses that are replaced, scaled down or drained have
# as long for the answers that they have begun; Ray Serve's own default, 20 s, cuts them off.
LONGEST_ANSWER_SECONDS = 600
ENGINE_REQUESTS = 4096  # that an engine takes, to run or to wait; more are refused, so that clients know
SECRETS = {API_KEY, EXACT_API_KEY, ADMIN_TOKEN, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN", "api_key"}

# What has an argument of its own, and so may not be given in another place too.
OF_ENGINE = {
    "model": "model",
    "served_model_name": "model_id",
    "tensor_parallel_size": "tensor_parallel_size",
    "data_parallel_size": "data_parallel_size",
    "enable_expert_parallel": "expert_parallel",
}
OF_DEPLOYMENT = {"num_replicas": "num_replicas", "autoscaling_config": "autoscaling"}


class Arguments(BaseModel):
    """Unknown keys are refused."""

    # Errors don't quote the input: somebody may have put a secret there.
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), hide_input_in_errors=True)


class Pool(Arguments):
    """Replicas that are alike: how many, on what, and the engine in each."""

    accelerator_type: str | None = Field(default=None, description="Ray's name of the GPU, such as H100; CPUs if none.")
    tensor_parallel_size: int = Field(
        default=1, ge=1, description="Number of workers that share each layer of a replica."
    )
    data_parallel_size: int = Field(default=1, ge=1, description="Number of replicas that share the experts.")
    expert_parallel: bool = Field(default=False, description="Whether workers hold whole experts, not slices.")
    num_replicas: int | None = Field(
        default=None, ge=1, description="Number of replicas, or of data-parallel groups; 1 by default."
    )
    autoscaling: AutoscalingConfig | None = Field(
        default=None, description="Autoscaling of Ray Serve, instead of num_replicas."
    )
    engine: dict[str, Any] = Field(default_factory=dict, description="Further engine arguments of vLLM.")
    deployment: dict[str, Any] = Field(default_factory=dict, description="Further deployment options of the replicas.")
    environment: dict[str, str] = Field(default_factory=dict, description="Environment variables of the replicas.")

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        for name, given, own in (("engine", self.engine, OF_ENGINE), ("deployment", self.deployment, OF_DEPLOYMENT)):
            for key in given.keys() & own.keys():
                raise ValueError(f"{name} has {key}: set the application's own {own[key]} instead")
        if "sere" in (self.engine.get("additional_config") or {}):
            raise ValueError("re-routing is set by `rerouting`, not in the engine's additional_config")
        if self.num_replicas is not None and self.autoscaling is not None:
            raise ValueError("num_replicas and autoscaling exclude each other: remove one")
        if self.autoscaling is not None and "target_ongoing_requests" not in self.autoscaling.model_fields_set:
            raise ValueError(
                "autoscaling has no target_ongoing_requests, without which no replica is ever added: set it, for "
                "instance to half of the engine's max_num_seqs"
            )
        if unread := sorted(
            {f"{name}_FILE" for name in (API_KEY, EXACT_API_KEY, ADMIN_TOKEN)} & self.environment.keys()
        ):
            raise ValueError(
                f"environment has {', '.join(unread)}, but is the replicas'; the ingress reads it. Set it in "
                "ingress.ray_actor_options.runtime_env.env_vars, or in the environment in which Ray starts"
            )
        return self


class AppConfig(Pool):
    """Arguments of the application: what is served, to whom, and the pool that serves it."""

    model: str = Field(min_length=1, description="Checkpoint folder or Hugging Face id of the model.")
    model_id: str | None = Field(
        default=None, min_length=1, description="Name of the model for clients. By default, the last part of `model`."
    )
    rerouting: ReroutingConfig | None = Field(default=None, description="Settings of re-routing; none by default.")
    prefill: Pool | None = Field(
        default=None,
        description="A pool of its own for prompts, without re-routing; none by default. Both pools then need a "
        "`kv_transfer_config` in `engine`.",
    )
    control: ControlConfig | None = Field(
        default=None,
        description="Lets `expert_price` follow the load, for policy projection; fixed by default.",
    )
    ingress: dict[str, Any] = Field(default_factory=dict, description="Deployment options of the HTTP ingress.")
    stream_batching_interval_ms: float = Field(
        default=0, ge=0, allow_inf_nan=False, description="Milliseconds for which streamed tokens are gathered."
    )
    require_api_key: bool = Field(
        default=False, description=f"Whether the ingress refuses to start without {API_KEY} or {API_KEY}_FILE."
    )
    engine_timeout_s: float = Field(
        default=60,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that an engine may take to answer between two steps. A replica whose engine does not, "
        "twice in a row, is replaced.",
    )
    max_body_bytes: int = Field(
        default=4 * 2**20, ge=1, description="Size of the largest request; a larger one is answered by 413."
    )
    max_requests: int | None = Field(
        default=None,
        ge=1,
        description="Requests that an ingress works on at a time. It refuses further ones at once, by 503. By default, "
        "as many as the engines of all replicas take.",
    )
    cache_per_key: bool = Field(
        default=False,
        description="Whether requests of different API keys share nothing of vLLM's prefix cache, so that its speed "
        "tells nobody what others have sent.",
    )
    opt_out_by: list[OptOutBy] = Field(
        default=list(OPT_OUT_BY),
        description=f"What may opt a request out of re-routing: `header` ({HEADER}), `body` (`vllm_xargs`). A request "
        f"that opts out by what is not in the list is answered by 403. Keys of {EXACT_API_KEY} always opt out.",
    )
    allow_origins: list[str] = Field(
        default_factory=list,
        description="Origins of the web pages that may use the API, such as https://chat.example; none by default.",
    )
    page: bool = Field(
        default=True,
        description="Whether `/` is a page on which to ask the model with and without re-routing. It holds no secret, "
        "and what it asks needs the same keys.",
    )
    max_answers: int = Field(default=64, ge=1, description="Most answers that one request may ask for (`n`).")
    max_prompts: int = Field(default=128, ge=1, description="Most prompts that one request may bring.")

    @model_validator(mode="before")
    @classmethod
    def _holds_no_secret(cls, arguments: Any) -> Any:
        if secrets := sorted(".".join(path) for path in paths_of(arguments) if path[-1] in SECRETS):
            raise ValueError(
                f"{', '.join(secrets)}: secrets don't belong in a configuration file. Set {API_KEY} and {ADMIN_TOKEN} "
                "in the environment in which Ray starts on the nodes of the ingress, or name files there: "
                f"{API_KEY}_FILE, {ADMIN_TOKEN}_FILE"
            )
        return arguments

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.rerouting is not None and self.data_parallel_size > 1:
            if not self.expert_parallel:
                raise ValueError("data_parallel_size needs expert_parallel: true, to re-route")
            if self.tensor_parallel_size > 1:
                raise ValueError("data and tensor parallelism together can't be re-routed yet: set one of them to 1")
        if self.prefill is not None:
            for name, pool in (("engine", self), ("prefill.engine", self.prefill)):
                if not pool.engine.get("kv_transfer_config"):
                    raise ValueError(
                        f"{name} has no kv_transfer_config: with a prefill pool both need one, which says how keys and "
                        "values get from one to the other"
                    )
        return self

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.model_id or Path(self.model).name


def paths_of(arguments: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the path of every key of nested mappings and lists."""
    pairs = arguments.items() if isinstance(arguments, dict) else ()
    for name, value in enumerate(arguments) if isinstance(arguments, list) else pairs:
        below = (*path, str(name))
        yield below
        yield from paths_of(value, below)


def check_plugin_loads(config: AppConfig) -> None:
    """Raises ValueError if the replicas' environment keeps vLLM from loading the plugin."""
    plugins = config.environment.get("VLLM_PLUGINS", os.environ.get("VLLM_PLUGINS"))
    if plugin_is_disabled(plugins):
        raise ValueError(f"VLLM_PLUGINS is {plugins!r} and leaves {PLUGIN} out: the model would not be re-routed")


def llm_config(config: AppConfig, prefill: Pool | None = None) -> LLMConfig:
    """Returns the application in Ray Serve LLM's terms, or its prefill pool.

    Raises:
        ValueError: Ray Serve LLM refuses an argument, or vLLM has none of that name.
    """
    pool = prefill or config
    engine = {
        "max_num_queued_reqs": ENGINE_REQUESTS,
        **pool.engine,
        "tensor_parallel_size": pool.tensor_parallel_size,
        "data_parallel_size": pool.data_parallel_size,
        "enable_expert_parallel": pool.expert_parallel,
    }
    if config.rerouting is not None and prefill is None:
        additional = engine.get("additional_config") or {}
        engine["additional_config"] = {**additional, "sere": config.rerouting.resolved().model_dump(mode="json")}
    deployment = {"graceful_shutdown_timeout_s": LONGEST_ANSWER_SECONDS, **pool.deployment}
    if pool.autoscaling is not None:
        deployment["autoscaling_config"] = pool.autoscaling.model_dump(exclude_unset=True)
    else:
        deployment["num_replicas"] = pool.num_replicas or 1
    placement: dict[str, Any] = {}
    if pool.accelerator_type is None:
        workers = pool.tensor_parallel_size * engine.get("pipeline_parallel_size", 1)
        placement = {"placement_group_config": {"bundles": [{"CPU": 1}] * workers}}
    experimental: dict[str, Any] = {
        # Serve LLM's own default of 50 ms adds to the time to the first token.
        "stream_batching_interval_ms": config.stream_batching_interval_ms
    }
    if config.prefill is not None and prefill is None:
        experimental["NIXL_SIDE_CHANNEL_PORT_BASE"] = DECODE_NIXL_PORT
    translated = LLMConfig(
        model_loading_config={
            "model_id": config.name,
            "model_source": str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model,
        },
        engine_kwargs=engine,
        accelerator_type=pool.accelerator_type,
        deployment_config=deployment,
        runtime_env={"env_vars": pool.environment},
        experimental_configs=experimental,
        **placement,
    )
    translated.get_engine_config()  # names an engine argument that vLLM does not have
    return translated


def build_app(args: dict[str, Any]) -> Application:
    """Builds the application from the `args` of a Serve configuration file.

    An artifact on the Hub is pinned to its commit of this moment. So a replica that starts later loads what its
    siblings did, whatever is pushed meanwhile.

    Raises:
        ValueError: an argument is unknown or out of range, or the artifact is not for the model.
    """
    config = AppConfig.model_validate(args)
    keeper, shape, watched = None, None, {"engine_timeout_s": config.engine_timeout_s}
    arguments: dict[str, Any] = dict(watched)
    if config.rerouting is not None:
        check_plugin_loads(config)
        config.rerouting = pinned(config.rerouting)
        artifact = load_artifact_of(config.rerouting.artifact, config.model)
        shape = {name: getattr(artifact.config, name) for name in ("num_experts", "num_experts_per_token")}
        keeper, of_rerouting = rerouting_arguments(config, config.rerouting, artifact)
        arguments |= of_rerouting
    elif config.control is not None:
        raise ValueError("control changes how requests are re-routed: set rerouting too, or leave control out")
    elif "opt_out_by" in config.model_fields_set:
        raise ValueError("opt_out_by says who may opt out of re-routing: set rerouting too, or leave opt_out_by out")
    if config.prefill is not None:
        arguments["prefill_server"] = build_servers(
            llm_config(config, config.prefill), PREFILL_PREFIX, PREFILL_SERVERS, watched
        )
    kinds = SERVERS if config.prefill is None else DECODE_SERVERS
    translated = llm_config(config)
    servers = build_servers(translated, NAME_PREFIX, kinds[config.rerouting is not None], arguments)
    return build_ingress(
        translated,
        servers,
        {"graceful_shutdown_timeout_s": LONGEST_ANSWER_SECONDS, **config.ingress},
        keeper,
        shape,
        has_page=config.page,
        require_api_key=config.require_api_key,
        cache_per_key=config.cache_per_key,
        opt_out_by=config.opt_out_by,
        allow_origins=config.allow_origins,
        max_body_bytes=config.max_body_bytes,
        max_requests=config.max_requests or requests_of_engines(config),
        bounds={"n": config.max_answers, "prompt": config.max_prompts},
    )


def rerouting_arguments(
    config: AppConfig, rerouting: ReroutingConfig, artifact: Artifact
) -> tuple[Application, dict[str, Any]]:
    """Returns the keeper of the settings, and what the servers of re-routed engines are given.

    Raises:
        ValueError: the settings are not for this artifact, or the controller could not work with them.
    """
    top_k, tuned = artifact.config.num_experts_per_token, artifact.recommended
    rerouting.check_top_k(top_k)
    artifact.settings_by_layer(rerouting)
    kl_estimate = None if tuned is None else tuned.kl_estimate
    check_control(config, artifact.policy(rerouting), kl_estimate)
    deployed = serve.deployment(
        name=KEEPER, num_replicas=1, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0}
    )
    keeper = deployed(DeployedKeeper).bind(
        rerouting.model_dump(mode="json"),
        top_k,
        NAME_PREFIX,
        is_group=config.data_parallel_size > 1,
        kl_estimate=kl_estimate,
        control=config.control,
    )
    return keeper, {
        "keeper": keeper,
        "artifact": {"artifact": artifact.config.tensors_sha256[:12], "method": artifact.config.method},
        "kl_estimate": kl_estimate,
        "tuned_kl": None if tuned is None else tuned.at(tuned.recommended).kl,
        "slow_ms": None if config.control is None else config.control.token_ms,
    }


def check_control(config: AppConfig, policy: str, kl_estimate: KlEstimate | None) -> None:
    """Raises ValueError if the controller could not change the price, or not see what it costs."""
    if config.control is None:
        return
    assert config.rerouting is not None
    if policy != "projection" or config.rerouting.policy == "recommended":
        raise ValueError("control changes expert_price: set policy: projection in rerouting, or leave control out")
    if config.control.max_kl is not None and kl_estimate is None:
        raise ValueError(
            "control.max_kl needs an artifact that was tuned: run python -m calibration_jobs.tune, or leave max_kl out"
        )


def requests_of_engines(config: AppConfig) -> int | None:
    """Returns how many requests the engines of all replicas take, to run or to wait, once all are up. None: any."""
    of_engine = config.engine.get("max_num_queued_reqs", ENGINE_REQUESTS)
    if of_engine is None:
        return None
    replicas = config.num_replicas or 1
    if config.autoscaling is not None:
        replicas = config.autoscaling.max_replicas
    return replicas * config.data_parallel_size * of_engine


def build_servers(
    translated: LLMConfig, prefix: str, classes: tuple[type, type], arguments: dict[str, Any]
) -> Application:
    """Returns the deployment of a pool; `classes` are a replica with an engine of its own, and a data-parallel rank."""
    is_group = translated.engine_kwargs["data_parallel_size"] > 1
    build = build_dp_deployment if is_group else build_llm_deployment
    return build(translated, name_prefix=prefix, deployment_cls=classes[is_group], bind_kwargs=arguments)

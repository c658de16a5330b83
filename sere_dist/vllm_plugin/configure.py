"""The plugin in the front end: checks the settings against model and engine, and picks the worker that re-routes."""

from pathlib import Path

import vllm
from vllm import envs
from vllm.config import CompilationMode, ModelConfig, ParallelConfig, SchedulerConfig, SpeculativeConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.hub import pinned
from sere_dist.artifact.placement import Placement
from sere_dist.config import ReroutingConfig
from sere_dist.environment import ALLOW_UNTESTED_VLLM, environment_flag, is_tested_release
from sere_dist.moe import MoeShape
from sere_dist.vllm_plugin import TESTED_VLLM, WORKERS, shadow
from sere_dist.vllm_plugin.engine_settings import artifact_of, engine_settings, returns_routed_experts, settings_of

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name


def configure_engine(vllm_config: VllmConfig) -> None:
    """Checks the settings against the model and the engine, and has the engine use the worker that re-routes.

    Raises:
        ValueError: a setting, the artifact or a feature of the engine rules re-routing out. Nothing is ever served
            un-re-routed in silence.
    """
    if not is_tested_release(vllm.__version__, TESTED_VLLM) and not environment_flag(ALLOW_UNTESTED_VLLM):
        raise ValueError(
            f"sere_dist was tested with vLLM {', '.join(TESTED_VLLM)}, this is {vllm.__version__}. Install a tested "
            f"release, or set {ALLOW_UNTESTED_VLLM}=1 and check the counters."
        )
    additional = vllm_config.additional_config
    assert isinstance(additional, dict)  # it has a `sere` entry
    settings = pinned(settings_of(additional["sere"]))  # all workers load what is checked here
    artifact = checked_artifact(settings, vllm_config.model_config)
    shape = artifact.config.shape
    for unsupported, advice in unsupported_features(vllm_config):
        if unsupported:
            raise ValueError(f"sere_dist does not re-route yet with {advice}, or remove 'sere' from additional_config")
    parallel = vllm_config.parallel_config
    if settings.placement is not None:
        check_placement(settings.placement, shape, set(artifact.layers), vllm_config)
    if (of_draft := settings.of_draft()) is not None:
        check_draft(of_draft, vllm_config.speculative_config)
    if settings.shadow_share is not None:
        for unsupported, what in shadow.unsupported_features(vllm_config):
            if unsupported:
                raise ValueError(f"shadow_share does not work with {what}: change that, or remove 'shadow_share'")
    if settings.exact_cache:
        if vllm_config.kv_transfer_config is not None:
            raise ValueError("exact_cache does not reach what a KV connector stores: remove kv_transfer_config, or it")
        vllm_config.scheduler_config.scheduler_cls = scheduler_of(vllm_config.scheduler_config)
    keeps_more = settings.expert_price or settings.balance_price or settings.threshold
    if settings.select_top_k == 1 < shape.num_experts_per_token and not keeps_more:
        logger.warning(
            "sere_dist: select_top_k 1 leaves a token one expert of its own; quality falls steeply there. Compare "
            'with requests that opt out (extra_args {"sere": "off"}), set a threshold, or raise select_top_k'
        )
    if advice := saves_no_traffic(settings, parallel):
        logger.warning("sere_dist: no bytes between ranks are saved: %s", advice)
    if settings.balance_price and (advice := balances_nothing(settings, parallel)):
        logger.warning("sere_dist: balance_price %s", advice)
    parallel.worker_cls = WORKERS.get(parallel.worker_cls, parallel.worker_cls)
    vllm_config.additional_config = {**additional, "sere": engine_settings(settings, artifact.policy(settings))}


def checked_artifact(settings: ReroutingConfig, model: ModelConfig) -> Artifact:
    """Returns the artifact of these settings, for a model of the engine.

    Raises:
        ValueError: it is another model's, or the settings are not for this model or this artifact.
    """
    shape = MoeShape.from_config(model.hf_config)
    settings.check_top_k(shape.num_experts_per_token)
    artifact = artifact_of(settings, model)
    artifact.check_serves(shape, model.model, getattr(model.hf_config, "_commit_hash", None))
    artifact.settings_by_layer(settings)
    return artifact


def check_draft(draft: ReroutingConfig, speculation: SpeculativeConfig | None) -> None:
    """Raises ValueError if these settings are not for what drafts in this engine."""
    if speculation is None or speculation.method != "draft_model":
        raise ValueError(
            "draft is for the experts of a draft model: set method to draft_model in speculative_config, or remove "
            "'draft'. MTP layers and EAGLE heads can't be calibrated, and always keep their experts"
        )
    checked_artifact(draft, speculation.draft_model_config)


def check_placement(path: Path, shape: MoeShape, layers: set[int], vllm_config: VllmConfig) -> None:
    """Raises ValueError if vLLM would not load a model's experts as this placement says."""
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size * parallel.data_parallel_size if parallel.enable_expert_parallel else 1
    Placement.load(path).check_serves(shape, layers, ranks)
    for wrong, advice in (
        (parallel.enable_eplb, "EPLB moves experts: set enable_eplb=False"),
        (parallel.expert_placement_strategy != "linear", "set expert_placement_strategy='linear'"),
        (parallel.enable_ep_weight_filter, "set enable_ep_weight_filter=False"),
        (returns_routed_experts(vllm_config), "set enable_return_routed_experts=False"),
        (vllm_config.weight_transfer_config is not None, "remove weight_transfer_config"),
    ):
        if wrong:
            raise ValueError(f"a placement permutes the model's experts; {advice}, or remove 'placement'")


def scheduler_of(config: SchedulerConfig) -> str:
    """Returns the name of the scheduler class whose prefix cache holds prompts alone. Only the engine imports it.

    Raises:
        ValueError: the engine has another scheduler than vLLM's.
    """
    if config.scheduler_cls is not None:
        raise ValueError(f"exact_cache works with vLLM's own scheduler, not {config.scheduler_cls}: remove one of them")
    name = "AsyncPromptCacheScheduler" if config.async_scheduling else "PromptCacheScheduler"
    return f"sere_dist.vllm_plugin.scheduler.{name}"


def unsupported_features(vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    """Returns, for each feature of vLLM that re-routing can't follow yet, whether it is on and what to set."""
    parallel, speculation = vllm_config.parallel_config, vllm_config.speculative_config
    is_data_parallel = parallel.data_parallel_size > 1
    compiles = vllm_config.compilation_config.mode != CompilationMode.NONE
    return [
        (
            is_data_parallel and not parallel.enable_expert_parallel,
            "data-parallel attention without expert parallelism: set enable_expert_parallel=True",
        ),
        (
            is_data_parallel and parallel.tensor_parallel_size > 1,
            "data and tensor parallelism together (sequence-parallel MoE): set tensor_parallel_size=1",
        ),
        (
            is_data_parallel and current_platform.is_cpu() and compiles,
            "compiled data-parallel attention on CPUs: set enforce_eager=True",
        ),
        (
            getattr(speculation, "enable_adaptive_verification", False),  # not there in vLLM 0.30
            "rows that vLLM deals out on the GPU: set enable_adaptive_verification to false in speculative_config",
        ),
        (
            speculation is not None and speculation.method == "extract_hidden_states",
            "hidden states as a product, which would be those of re-routed experts: remove speculative_config",
        ),
        (
            vllm_config.model_config.runner_type != "generate",
            "a model that answers with embeddings or scores, and so decodes nothing: serve it to generate",
        ),
        (
            vllm_config.lora_config is not None,
            "LoRA adapters, which may change experts and run in other kernels: remove enable_lora, or serve the "
            "adapter merged into the model",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            "prefill context parallelism: set prefill_context_parallel_size=1",
        ),
        (parallel.use_ubatching, "micro-batches: remove enable_dbo and ubatch_size"),
        (parallel.enable_elastic_ep, "elastic expert parallelism: set enable_elastic_ep=False"),
        (
            vllm_config.cache_config.kv_sharing_fast_prefill,
            "layers that get some of a step's rows: set kv_sharing_fast_prefill=False",
        ),
        (
            envs.VLLM_BATCH_INVARIANT,
            "outputs that must not depend on the batch, which re-routing looks at: unset VLLM_BATCH_INVARIANT",
        ),
        (
            parallel.distributed_executor_backend == "ray"
            and not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True),  # 0.33 has the second executor alone
            "vLLM's first Ray executor, which goes around its workers: unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND",
        ),
        (
            parallel.worker_cls not in {*WORKERS, *WORKERS.values()},
            f"the worker {parallel.worker_cls}: use vLLM's CPU or CUDA worker",
        ),
    ]


def balances_nothing(settings: ReroutingConfig, parallel: ParallelConfig) -> str | None:
    """Says why a balance price can't balance the ranks of this engine, and what to set; None if it can."""
    if not parallel.enable_expert_parallel:
        return "has no effect: experts are not split between ranks; set enable_expert_parallel"
    if parallel.data_parallel_size > 1 and settings.primary_scope == "rank":
        return (
            "balances what the tokens of each rank run, not what they run together: set primary_scope: group, or "
            "leave it out"
        )
    return None


def saves_no_traffic(settings: ReroutingConfig, parallel: ParallelConfig) -> str | None:
    """Says why re-routing can't save traffic between the ranks of this engine, and what to set; None if it can."""
    if not parallel.enable_expert_parallel:
        if settings.traffic_price:
            return "experts are not split between ranks, traffic_price has no effect; set enable_expert_parallel"
        return None
    if parallel.data_parallel_size == 1:
        if settings.traffic_price:
            return (
                "under tensor parallelism every rank has every token, traffic_price only costs quality; set it to 0, "
                "or use data_parallel_size"
            )
        return None
    if current_platform.is_cpu():
        return None if settings.cpu_dispatch == "all_to_all" else "all_gather sends all; set cpu_dispatch: all_to_all"
    if parallel.all2all_backend == "allgather_reducescatter":
        return (
            "all-gather sends every token to every rank; set all2all_backend to deepep_v2 or, within one NVLink "
            "domain, to flashinfer_nvlink_one_sided. deepep_high_throughput saves traffic too, but switches CUDA "
            "graphs off"
        )
    return None

"""The vLLM plugin, front-end half: reads `additional_config["sere"]`, checks it, and picks the worker that re-routes.

This package is the only place that touches vLLM's internals: here `EngineArgs.create_engine_config`, in `worker` and
`backends` the MoE layers' routers, in `rows` the model runner's batch. vLLM finds `register` by the entry point
`vllm.general_plugins`.
"""

# vLLM logs a plugin whose import fails and goes on without it. So what could fail is imported when it is needed, where
# an error stops the engine.
from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import vllm
from vllm.engine.arg_utils import EngineArgs

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TESTED_VLLM = ("0.32.0",)
# vLLM's workers, and ours that take their place.
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "sere_dist.vllm_plugin.worker.ReroutingCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "sere_dist.vllm_plugin.worker.ReroutingGPUWorker",
}


def register() -> None:
    """Makes every engine whose `additional_config` has a `sere` entry re-route; others stay as they are."""
    original = EngineArgs.create_engine_config
    if getattr(original, "checks_sere", False):  # vLLM may load a plugin several times in a process
        return

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args, **kwargs) -> VllmConfig:
        from sere_dist.config import settings_from_overrides

        if translated := settings_from_overrides(self.hf_overrides, self.additional_config or {}, self.model):
            self.hf_overrides, self.additional_config = translated
        vllm_config = original(self, *args, **kwargs)
        if isinstance(vllm_config.additional_config, dict) and "sere" in vllm_config.additional_config:
            configure_engine(vllm_config)
        return vllm_config

    create_engine_config.checks_sere = True
    EngineArgs.create_engine_config = create_engine_config


def configure_engine(vllm_config: VllmConfig) -> None:
    """Checks the settings against the model and the engine, and has the engine use the worker that re-routes.

    Raises:
        ValueError: a setting, the artifact or a feature of the engine rules re-routing out. Nothing is ever served
            un-re-routed in silence.
    """
    from sere_dist.config import ALLOW_UNTESTED_VLLM, ReroutingConfig, environment_flag
    from sere_dist.moe import MoeShape
    from sere_dist.reference import load_artifact

    if vllm.__version__ not in TESTED_VLLM and not environment_flag(ALLOW_UNTESTED_VLLM):
        raise ValueError(
            f"sere_dist was tested with vLLM {', '.join(TESTED_VLLM)}, this is {vllm.__version__}. Install a tested "
            f"release, or set {ALLOW_UNTESTED_VLLM}=1 and check the counters."
        )
    settings = ReroutingConfig.model_validate(vllm_config.additional_config["sere"])
    settings = settings.model_copy(update={"artifact": settings.artifact.resolve()})
    model = vllm_config.model_config
    shape = MoeShape.from_config(model.hf_config)
    settings.check_top_k(shape.num_experts_per_token)
    artifact = load_artifact(settings.artifact, shape, model.model)
    artifact.check_serves(shape, model.model, getattr(model.hf_config, "_commit_hash", None))

    for unsupported, advice in unsupported_features(vllm_config):
        if unsupported:
            raise ValueError(f"sere_dist does not re-route yet with {advice}, or remove 'sere' from additional_config")
    parallel = vllm_config.parallel_config
    parallel.worker_cls = WORKERS.get(parallel.worker_cls, parallel.worker_cls)
    vllm_config.additional_config["sere"] = settings.model_dump(mode="json")


def unsupported_features(vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    """Returns, for each feature of vLLM that re-routing can't follow yet, whether it is on and what to set."""
    parallel = vllm_config.parallel_config
    return [
        (parallel.data_parallel_size > 1, "data-parallel attention: set data_parallel_size=1"),
        (parallel.enable_expert_parallel, "expert parallelism: set enable_expert_parallel=False"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism: set pipeline_parallel_size=1"),
        (vllm_config.speculative_config is not None, "speculative decoding: remove speculative_config"),
        (
            parallel.prefill_context_parallel_size > 1,
            "prefill context parallelism: set prefill_context_parallel_size=1",
        ),
        (parallel.use_ubatching, "micro-batches: remove enable_dbo and ubatch_size"),
        (
            parallel.worker_cls not in {*WORKERS, *WORKERS.values()},
            f"the worker {parallel.worker_cls}: use vLLM's CPU or CUDA worker",
        ),
    ]

"""The vLLM plugin, worker half: workers that re-route a loaded model, and answer questions about it.

Re-routing sits where vLLM's routers hand out logical expert ids: `BaseRouter._compute_routing`, before routed-expert
capture and EPLB's mapping.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from sere_dist.artifact import Artifact
from sere_dist.config import ReroutingConfig
from sere_dist.moe import MoeShape, by_layer
from sere_dist.reference import MATRIX, load_artifact
from sere_dist.rerouting import COUNTERS
from sere_dist.vllm_plugin.backends import Backend, CpuBackend, KernelBackend
from sere_dist.vllm_plugin.rows import Rows

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name

# What `sere_policy` may change in a running engine.
CHANGEABLE = ("enabled", "rows", "min_rows", "max_rows", "select_top_k", "threshold")


def rerouted_layers(model: torch.nn.Module, artifact: Artifact) -> dict[int, BaseRouter]:
    """Returns the router of every MoE layer of a loaded model, by decoder layer index.

    Raises:
        ValueError: a layer can't be re-routed, or the artifact's layers are not the model's.
    """
    found = by_layer((name, module) for name, module in model.named_modules() if isinstance(module, MoERunner))
    runners = {layer: runner for layer, (_name, runner) in found.items()}
    for layer, runner in runners.items():
        if runner.is_monolithic:
            raise ValueError(
                f"layer {layer} routes inside a monolithic kernel, which can't be re-routed: use weights that are not "
                "quantised, or another moe_backend"
            )
        if not isinstance(runner.router, BaseRouter):
            raise ValueError(f"layer {layer} routes through {type(runner.router).__name__}, not vLLM's BaseRouter")
    if runners.keys() != artifact.similarity.keys():
        raise ValueError(
            f"the model's MoE layers are {sorted(runners)}, the artifact has {sorted(artifact.similarity)}: "
            "calibrate this model"
        )
    return {layer: runner.router for layer, runner in runners.items()}


@contextmanager
def skipping_matrices() -> Iterator[None]:
    """Has vLLM's loader pass over the matrices in a checkpoint of the reference implementation."""
    original = DefaultModelLoader.get_all_weights

    def get_all_weights(self, model_config, model):
        return ((name, tensor) for name, tensor in original(self, model_config, model) if not name.endswith(MATRIX))

    DefaultModelLoader.get_all_weights = get_all_weights
    try:
        yield
    finally:
        DefaultModelLoader.get_all_weights = original


class Rerouting:
    """What re-routing adds to a worker of vLLM. Its `sere_` methods answer `LLM.collective_rpc`."""

    def load_model(self, **kwargs) -> None:
        settings = ReroutingConfig.model_validate(self.vllm_config.additional_config["sere"])
        model = self.vllm_config.model_config
        artifact = load_artifact(settings.artifact, MoeShape.from_config(model.hf_config), model.model)
        with skipping_matrices():
            super().load_model(**kwargs)
        routers = rerouted_layers(self.model_runner.get_model(), artifact)
        padding = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self.sere_rows = Rows(self.scheduler_config.max_num_batched_tokens + padding, self.device)
        self.sere_rows.follow(self.model_runner)
        self.sere_backend: Backend = self.sere_backend_class(artifact, self.sere_rows)
        self.sere_layers = {layer: self.sere_backend.attach(router, layer) for layer, router in routers.items()}
        self.sere_top_k = artifact.config.num_experts_per_token
        self.sere_seen_rerouting = False
        self._set_policy(settings)
        logger.info(
            "sere_dist re-routes %d MoE layers: select_top_k %d of %d, threshold %g, %s rows",
            len(routers),
            settings.select_top_k,
            self.sere_top_k,
            settings.threshold,
            settings.rows,
        )

    def execute_model(self, scheduler_output, *args, **kwargs):
        """Runs a step, and stops the engine if vLLM did not go through what re-routing hooked."""
        self.sere_rows.is_of_this_step = False
        output = super().execute_model(scheduler_output, *args, **kwargs)
        if scheduler_output.total_num_scheduled_tokens and not self.sere_rows.is_of_this_step:
            raise RuntimeError(
                "vLLM ran a step without preparing its batch where sere_dist looks: nothing would be re-routed. Use a "
                "tested vLLM release, or remove 'sere' from additional_config"
            )
        if not self.sere_seen_rerouting and self.sere_rows.count[1] > 0:
            for layer, counters in self.sere_layers.items():
                if counters[COUNTERS.index("steps")] == 0:
                    raise RuntimeError(
                        f"layer {layer} chose its experts without asking sere_dist: it would not be re-routed. Use a "
                        "tested vLLM release, or remove 'sere' from additional_config"
                    )
            self.sere_seen_rerouting = True
        return output

    def _set_policy(self, settings: ReroutingConfig) -> None:
        self.sere_settings = settings
        self.sere_rows.set_policy(settings)
        self.sere_backend.set_policy(settings)

    def sere_counters(self, reset: bool = False) -> dict[str, Any]:
        """Returns the counters of every layer of this worker, and sets them to 0 if asked to."""
        layers = {
            layer: dict(zip(COUNTERS, counters.tolist(), strict=True)) for layer, counters in self.sere_layers.items()
        }
        if reset:
            for counters in self.sere_layers.values():
                counters.zero_()
        return {"rank": self.rank, "layers": layers}

    def sere_policy(self, **changes: Any) -> dict[str, Any]:
        """Changes the policy from the next step on, if anything is given, and returns what is in force.

        Raises:
            ValueError: a value is out of range, or can't be changed in a running engine; nothing was changed.
        """
        if fixed := changes.keys() - CHANGEABLE:
            raise ValueError(f"{', '.join(sorted(fixed))} can't be changed while serving; {', '.join(CHANGEABLE)} can")
        settings = ReroutingConfig.model_validate({**self.sere_settings.model_dump(), **changes})
        settings.check_top_k(self.sere_top_k)
        self._set_policy(settings)
        return settings.model_dump(mode="json")


class ReroutingCPUWorker(Rerouting, CPUWorker):
    """vLLM's CPU worker, re-routing."""

    sere_backend_class = CpuBackend


class ReroutingGPUWorker(Rerouting, Worker):
    """vLLM's GPU worker, re-routing."""

    sere_backend_class = KernelBackend

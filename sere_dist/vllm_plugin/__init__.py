"""The vLLM plugin. vLLM finds `register` by the entry point `vllm.general_plugins`.

This package is the only place that touches vLLM's internals: here `EngineArgs.create_engine_config`, in `worker` and
`backend` the MoE layers' routers, in `rows` the model runner's batch, in `shadow` its forward pass.
"""

# vLLM logs a plugin whose import fails and goes on without it. So what could fail is imported when it is needed, where
# an error stops the engine.
from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from vllm.engine.arg_utils import EngineArgs

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TESTED_VLLM = ("0.30.0", "0.31.0", "0.32.0")  # the newest patch of each of three minor releases: make test-vllm
# vLLM's workers, and ours that take their place.
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "sere_dist.vllm_plugin.cpu_worker.ReroutingCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "sere_dist.vllm_plugin.gpu_worker.ReroutingGPUWorker",
}


def register() -> None:
    """Makes every engine whose `additional_config` has a `sere` entry re-route; others stay as they are."""
    original = EngineArgs.create_engine_config
    if getattr(original, "checks_sere", False):  # vLLM may load a plugin several times in a process
        return

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args, **kwargs) -> VllmConfig:
        from sere_dist.artifact.reference import settings_from_overrides

        if translated := settings_from_overrides(self.hf_overrides, self.additional_config or {}, self.model):
            self.hf_overrides, self.additional_config = translated
        vllm_config = original(self, *args, **kwargs)
        if isinstance(vllm_config.additional_config, dict) and "sere" in vllm_config.additional_config:
            from sere_dist.vllm_plugin.configure import configure_engine

            configure_engine(vllm_config)
        return vllm_config

    create_engine_config.checks_sere = True  # ty: ignore[missing-attribute]  # the mark that is looked for above
    EngineArgs.create_engine_config = create_engine_config  # ty: ignore[invalid-assignment]  # it takes the same

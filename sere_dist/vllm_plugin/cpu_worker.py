"""vLLM's CPU worker, re-routing.

Only CPU processes may import this module: vLLM's CPU worker replaces parts of `torch.cuda` on import.
"""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker  # isort: skip  (vLLM wants it before its other modules)
from vllm.config import set_current_vllm_config

from sere_dist.vllm_plugin import cpu_experts
from sere_dist.vllm_plugin.cpu_backend import CpuBackend
from sere_dist.vllm_plugin.worker import Rerouting


class ReroutingCPUWorker(Rerouting, CPUWorker):
    """vLLM's CPU worker, re-routing."""

    sere_backend_class = CpuBackend

    def load_model(self, **kwargs) -> None:
        if self.parallel_config.enable_expert_parallel:
            cpu_experts.provide()
        super().load_model(**kwargs)
        is_dispatched = self.sere_expert_map is not None and self.sere_expert_map.home is not None
        if is_dispatched and self.sere_config.cpu_dispatch == "all_to_all":
            with set_current_vllm_config(self.vllm_config):
                cpu_experts.send_sparsely(next(iter(self.sere_expert_map.rank.values())))

    def sere_counters(self, reset: bool = False) -> dict[str, Any]:
        """Adds `bytes_sent` to other ranks: by this worker, for all rows, prefill too."""
        counters = super().sere_counters(reset)
        if self.sere_expert_map is not None and self.sere_expert_map.home is not None:
            counters["bytes_sent"] = cpu_experts.bytes_sent
            if reset:
                cpu_experts.bytes_sent = 0
        return counters

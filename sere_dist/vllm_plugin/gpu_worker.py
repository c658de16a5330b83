"""vLLM's GPU worker, re-routing."""

from vllm.v1.worker.gpu_worker import Worker

from sere_dist.vllm_plugin.gpu_backend import GpuBackend
from sere_dist.vllm_plugin.worker import Rerouting


class ReroutingGPUWorker(Rerouting, Worker):
    """vLLM's GPU worker, re-routing."""

    sere_backend_class = GpuBackend

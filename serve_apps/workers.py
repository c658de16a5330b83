"""Reaching into the vLLM workers of a running application."""

from typing import Any

from ray.serve import get_deployment_handle


def worker_rpc(model_id: str, method: str, app: str = "sere", **kwargs: Any) -> list[Any]:
    """Calls a `sere_` method of every vLLM worker of one replica, from a process that is connected to the cluster.

    Returns what each worker returned. `sere_counters` is in `sere_dist.vllm_plugin.worker`.
    """
    deployment = "LLMServer:" + model_id.replace("/", "--").replace(".", "_")
    handle = get_deployment_handle(deployment, app)
    try:
        return handle.collective_rpc.remote(method, kwargs=kwargs).result()
    finally:
        handle.shutdown()

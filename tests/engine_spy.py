"""Looks over the engine's shoulder, inside its worker processes: what did the expert kernel really get?

Sent to the workers by `LLM.collective_rpc`. The kernel is watched at the dispatcher, below anything that sere_dist or
vLLM's Python does, so it sees compiled graphs too.
"""

import torch

KERNEL = "_C::cpu_fused_moe"
TOPK_IDS_ARGUMENT = 7

# Of this worker process: one entry a layer call.
kernel_ids: list[torch.Tensor] = []
rerouted: list[tuple] = []  # (topk_weights, topk_ids, valid_T) as the re-routing got them
_library = None


def watch(_worker) -> int:
    """Starts watching. Returns the worker's process id."""
    import os

    global _library
    from sere_dist.vllm_plugin import backends as plugin

    kernel = torch.library.get_kernel(KERNEL, "CPU")

    def spy(keyset, *arguments):
        kernel_ids.append(arguments[TOPK_IDS_ARGUMENT].clone())
        return kernel.call_boxed(keyset, *arguments)

    _library = torch.library.Library("_C", "IMPL")
    _library.impl("cpu_fused_moe", spy, "CPU", with_keyset=True, allow_override=True)

    original = plugin.reroute_step

    def spied(topk_weights, topk_ids, *tables, valid_T, **settings):
        valid = [True] * len(topk_ids) if valid_T is None else valid_T.tolist()
        rerouted.append((topk_weights.float().tolist(), topk_ids.tolist(), valid))
        return original(topk_weights, topk_ids, *tables, valid_T=valid_T, **settings)

    plugin.reroute_step = spied
    return os.getpid()


def take(_worker) -> tuple[list, list]:
    """Returns and forgets what was seen: the kernel's ids, and the re-routing's inputs."""
    seen = [ids.tolist() for ids in kernel_ids], list(rerouted)
    kernel_ids.clear()
    rerouted.clear()
    return seen


def run_the_kernel(worker, library: str) -> None:
    """Has the worker re-route by `KernelBackend`, as on a GPU; the kernel itself is the build for this CPU."""
    from pathlib import Path

    from sere_dist.kernels import reroute as kernel
    from sere_dist.moe import MoeShape
    from sere_dist.reference import load_artifact
    from sere_dist.vllm_plugin.backends import KernelBackend
    from sere_dist.vllm_plugin.worker import rerouted_layers
    from tests.host_kernels import HostKernels

    worker = worker.worker  # vLLM hands over a wrapper
    kernels = HostKernels(Path(library))
    kernel.kernels_for = lambda *_: kernels
    shape = MoeShape.from_config(worker.vllm_config.model_config.hf_config)
    artifact = load_artifact(worker.sere_settings.artifact, shape, "")
    worker.sere_backend = KernelBackend(artifact, worker.sere_rows)
    routers = rerouted_layers(worker.model_runner.get_model(), artifact)
    worker.sere_layers = {layer: worker.sere_backend.attach(router, layer) for layer, router in routers.items()}
    worker.sere_backend.set_policy(worker.sere_settings)


def forget_a_layer(worker) -> None:
    """Has a layer choose its experts as vLLM meant it to, as if another release had moved what the plugin hooks."""
    from sere_dist.artifact import Artifact
    from sere_dist.vllm_plugin.worker import rerouted_layers

    worker = worker.worker
    routers = rerouted_layers(worker.model_runner.get_model(), Artifact.load(worker.sere_settings.artifact))
    del vars(routers[2])["_compute_routing"]
    worker.sere_layers[2].zero_()
    worker.sere_seen_rerouting = False

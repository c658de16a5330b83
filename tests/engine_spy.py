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
    from sere_dist.vllm_plugin import worker as plugin

    kernel = torch.library.get_kernel(KERNEL, "CPU")

    def spy(keyset, *arguments):
        kernel_ids.append(arguments[TOPK_IDS_ARGUMENT].clone())
        return kernel.call_boxed(keyset, *arguments)

    _library = torch.library.Library("_C", "IMPL")
    _library.impl("cpu_fused_moe", spy, "CPU", with_keyset=True, allow_override=True)

    original = plugin.reroute

    def spied_reroute(topk_weights, topk_ids, similarity, *, valid_T, **settings):
        rerouted.append((topk_weights.float().tolist(), topk_ids.tolist(), valid_T.tolist()))
        return original(topk_weights, topk_ids, similarity, valid_T=valid_T, **settings)

    plugin.reroute = spied_reroute
    return os.getpid()


def take(_worker) -> tuple[list, list]:
    """Returns and forgets what was seen: the kernel's ids, and the re-routing's inputs."""
    seen = [ids.tolist() for ids in kernel_ids], list(rerouted)
    kernel_ids.clear()
    rerouted.clear()
    return seen

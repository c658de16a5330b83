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
    from sere_dist.vllm_plugin import cpu_backend as plugin

    kernel = torch.library.get_kernel(KERNEL, "CPU")

    def spy(keyset, *arguments):
        kernel_ids.append(arguments[TOPK_IDS_ARGUMENT].clone())
        return kernel.call_boxed(keyset, *arguments)

    _library = torch.library.Library("_C", "IMPL")
    _library.impl("cpu_fused_moe", spy, "CPU", with_keyset=True, allow_override=True)

    original = plugin.CpuLayer.reroute

    def spied(layer, step, *others):
        valid = step.valid_T[: len(step.ids_TK)].tolist()
        rerouted.append((step.weights_TK.tolist(), step.ids_TK.tolist(), valid))
        return original(layer, step, *others)

    plugin.CpuLayer.reroute = spied
    return os.getpid()


def take(_worker) -> tuple[list, list]:
    """Returns and forgets what was seen: the kernel's ids, and the re-routing's inputs."""
    seen = [ids.tolist() for ids in kernel_ids], list(rerouted)
    kernel_ids.clear()
    rerouted.clear()
    return seen


def capture(worker) -> None:
    """Has vLLM's routers hand out the experts that they return, as for `enable_return_routed_experts`.

    vLLM's CPU router has a token's slots in any order. Here they are in order of weight, as on GPUs.
    """
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    softmax_topk = cpu_router._softmax_topk

    def in_order(*args, **kwargs):
        weights, ids = softmax_topk(*args, **kwargs)
        weights, order = weights.sort(dim=1, descending=True)
        return weights, ids.gather(1, order)

    cpu_router._softmax_topk = in_order
    routed: dict[int, list[torch.Tensor]] = {layer: [] for layer in worker.worker.sere_runners}
    worker.worker.routed_for_tests = routed
    for layer, runner in worker.worker.sere_runners.items():
        runner.router.set_capture_fn(lambda ids, layer=layer: routed[layer].append(ids.clone()))


def captured(worker) -> dict[int, list]:
    """Returns the ids of each layer: for each step, [rows, K]."""
    return {layer: [ids.tolist() for ids in steps] for layer, steps in worker.worker.routed_for_tests.items()}


def kernel(worker, library: str) -> None:
    """Has the worker re-route by `GpuBackend`, as on a GPU; the kernel itself is the build for this CPU."""
    from pathlib import Path

    from sere_dist.kernels import reroute
    from sere_dist.vllm_plugin import cpu_backend, gpu_backend
    from tests.support.host_kernels import HostKernels

    kernels = HostKernels(Path(library))
    reroute.kernels_for = lambda *_: kernels
    gpu_backend.losses_all_reduce = lambda: cpu_backend.all_reduce_losses
    _attach_anew(worker.worker, gpu_backend.GpuBackend)


def pretend(worker, ranks: int, homes: list[int] | None) -> None:
    """Has a worker that holds all experts count and price as if they were split between ranks; row t lives at
    homes[t]."""
    from types import SimpleNamespace

    import torch

    from sere_dist.vllm_plugin.cpu_backend import CpuBackend
    from sere_dist.vllm_plugin.expert_map import ranks_of_placement

    worker = worker.worker
    experts = worker.sere_runners[0].router.global_num_experts
    rank = dict.fromkeys(worker.sere_runners, ranks_of_placement(experts, ranks, "linear"))
    home = None if homes is None else 0
    worker.sere_expert_map = SimpleNamespace(num_ranks=ranks, rank=rank, domain=rank, home=home, is_moving=False)
    _attach_anew(worker, CpuBackend)
    if homes is not None:
        worker.sere_backend.home[: len(homes)] = torch.tensor(homes)


def _attach_anew(worker, backend_class) -> None:
    from sere_dist.artifact.reference import load_artifact
    from sere_dist.moe import MoeShape
    from sere_dist.vllm_plugin.backend import shares_primary

    shape = MoeShape.from_config(worker.vllm_config.model_config.hf_config)
    artifact = load_artifact(worker.sere_config.artifact, shape, "")
    worker.sere_backend = backend_class(
        artifact,
        worker.sere_rows,
        worker.sere_config,
        worker.sere_expert_map,
        merges=False,
        shares_primary=shares_primary(worker.sere_config, worker.parallel_config),
    )
    worker.sere_layers = {
        layer: worker.sere_backend.attach(runner.router, layer) for layer, runner in worker.sere_runners.items()
    }
    worker.sere_backend.set_settings(artifact.settings_by_layer(worker.sere_config))


def forget_a_layer(worker) -> None:
    """Has a layer choose its experts as vLLM meant it to, as if another release had moved what the plugin hooks."""
    worker = worker.worker
    del vars(worker.sere_runners[2].router)["_compute_routing"]
    worker.sere_layers[2].zero_()
    worker.sere_seen_rerouting = False

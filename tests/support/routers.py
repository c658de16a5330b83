"""A router of vLLM whose choice a backend re-routes: two tokens, three slots each, no engine."""

from unittest import mock

import torch
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter

from sere_dist.config import ReroutingConfig
from sere_dist.vllm_plugin.backend import Backend
from sere_dist.vllm_plugin.rows import Rows
from tests.support.artifacts import small_artifact

WEIGHTS = torch.tensor([[0.4, 0.3, 0.3], [0.5, 0.3, 0.2]])
IDS = torch.tensor([[0, 2, 3], [1, 2, 3]], dtype=torch.int32)
CONFIG = ReroutingConfig(artifact="a", select_top_k=1)


def rerouted_router(
    backend: type[Backend], *, valid: int = 2, merges: bool = False
) -> tuple[CustomRoutingRouter, torch.Tensor]:
    """Returns a router that chooses WEIGHTS and IDS, which its model holds, and the similarity that it goes by."""
    artifact = small_artifact()
    layer = next(iter(artifact.layers))
    router = object.__new__(CustomRoutingRouter)
    rows = Rows(8)
    rows.valid[:valid] = True
    rows.count[:] = torch.tensor([2, valid])
    ours = backend(artifact, rows, CONFIG, None, merges=merges, shares_primary=False)
    with mock.patch.object(CustomRoutingRouter, "_compute_routing", lambda *_args, **_named: (WEIGHTS, IDS)):
        ours.attach(router, layer)
    ours.set_settings(artifact.settings_by_layer(CONFIG))
    return router, artifact.layers[layer].similarity_EE

"""Re-routing on a GPU, by the kernel of `sere_dist.kernels`.

The router runs inside vLLM's own opaque `moe_forward` op. Python runs at capture alone, and what may change afterwards
lies in device memory that the kernel reads.
"""

import torch
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from sere_dist.artifact.folder import Artifact
from sere_dist.config import ReroutingConfig
from sere_dist.kernels.reroute import DeviceSettings, LayerKernel
from sere_dist.method.records import LayerTables, Step
from sere_dist.vllm_plugin.backend import all_reduce_losses, homes_of, is_projection, places_of, replace_choice
from sere_dist.vllm_plugin.expert_map import ExpertMap
from sere_dist.vllm_plugin.rows import Rows


class GpuBackend:
    """A block of settings and a kernel for every layer."""

    def __init__(self, artifact: Artifact, rows: Rows, config: ReroutingConfig, expert_map: ExpertMap | None):
        self.rows = rows
        self.home = homes_of(rows, expert_map)
        self.all_reduce = all_reduce_losses if config.primary_scope == "group" else None
        self.settings: dict[int, DeviceSettings] = {}
        self.layers: dict[int, LayerKernel] = {}
        has_prices = is_projection(artifact, config)
        for layer, tables in artifact.tables.items():
            used = tables if has_prices else LayerTables(tables.similarity_EE)
            self.settings[layer] = DeviceSettings(rows.valid.device)
            self.layers[layer] = LayerKernel(
                used, self.settings[layer], places_of(expert_map, layer), repeats_dropped=True
            )

    def set_settings(self, settings: dict[int, ReroutingConfig]) -> None:
        for layer, own in settings.items():
            self.settings[layer].set(own.numbers, enabled=own.enabled, min_rows=own.min_rows, max_rows=own.max_rows)
            self.layers[layer].set_threshold(own.threshold)

    def attach(self, router: BaseRouter, layer: int) -> torch.Tensor:
        rows, kernel = self.rows, self.layers[layer]

        def rerouted(_router, weights, ids):
            if len(ids) > len(rows.valid):
                raise RuntimeError(
                    f"the router got {len(ids)} rows, a step has {len(rows.valid)} at most: not the batch's rows"
                )
            weights, ids = weights.contiguous(), ids.contiguous()
            kernel.reroute(Step(weights, ids, rows.valid, self.home), self.all_reduce)
            return weights, ids

        replace_choice(router, rerouted)
        return kernel.counters

"""Shapes and hardware that this machine cannot run: what the studies of groups of ranks simulate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from sere_dist.evaluation.traffic import Layout
from sere_dist.forecast import DEVICES, ModelCost
from sere_dist.method.placement import linear_ranks
from sere_dist.moe import MoeShape
from sere_dist.provenance import rounded
from sere_dist.simulation import NETWORKS, Backend, Group, GroupStep, simulate

CONTEXT = 4096  # tokens that a row has behind it
FP8, FP4 = 1.0, 0.5625  # bytes of a parameter; NVFP4 has a scale of one byte for 16 numbers
BACKENDS: tuple[Backend, ...] = ("all_gather", "per_rank", "per_slot")
PARTS = ("experts", "dispatch", "combine", "others", "attention", "waiting")


class Hardware(NamedTuple):
    device: str
    network: str
    expert_bytes: float
    faster: float  # than bfloat16, in the experts' precision
    memory: float  # bytes of a device


HARDWARE = {
    "H200, 8 to a node": Hardware("h200", "h100-400g", FP8, 2, 141e9),
    "GB200 NVL72": Hardware("b200", "gb200-nvl72", FP4, 4, 186e9),
}


class Model(NamedTuple):
    """A model's numbers that matter here, from its published configuration. All but its experts are on every rank."""

    experts: int
    top_k: int
    groups: int
    layers: int
    moe_layers: int
    sent: int  # numbers of a hidden state that goes to an expert
    expert: float  # parameters of one, in one layer
    others: float  # other parameters that a step reads
    cached: float  # numbers in the cache, per token
    attended: float  # multiplications of a row, per token
    stands_for: int = 1  # experts whose bytes one has; a slot computes as much as one of them

    def cost(self, bytes_per_parameter: float) -> ModelCost:
        """Experts have so many bytes a parameter, other weights one, and the cache two."""
        experts = self.expert * self.moe_layers
        return ModelCost(
            MoeShape("simulated", self.layers, self.sent, self.experts, self.top_k),
            expert_bytes=experts * self.stands_for * bytes_per_parameter,
            other_bytes=self.others * FP8,
            expert_operations=2 * experts,
            other_operations=2 * self.others,
            cache_bytes=2 * self.cached,
            attention_operations=2 * self.attended,
        )


LATENT = 2 * 512 + 64  # multiplications of latent attention, per head
MODELS = {
    "Qwen3-235B-A22B": Model(128, 8, 1, 94, 94, 4096, 3 * 4096 * 1536, 7.37e9, 96_256, 1_540_096),
    "DeepSeek-V3": Model(256, 8, 8, 61, 58, 7168, 3 * 7168 * 2048, 16.2e9, 61 * 576, 61 * 128 * LATENT),
    "Kimi-K2": Model(384, 8, 1, 61, 60, 7168, 3 * 7168 * 2048, 10.4e9, 61 * 576, 61 * 64 * LATENT),
    # Its other weights are taken to be split over 8 ranks, and one layer in four to attend to the whole context.
    "Kimi-K3": Model(896, 16, 1, 93, 92, 3584, 3 * 3584 * 3072, 55e9 / 8, 24 * 576, 24 * 64 * LATENT),
}
STAND_IN = MODELS["DeepSeek-V3"]._replace(experts=64, groups=1, stands_for=4)


def group_of(hardware: Hardware, model: Model, ranks: int, backend: Backend) -> Group:
    device = replace(DEVICES[hardware.device], speed=hardware.faster * DEVICES[hardware.device].speed)
    network, sizes = NETWORKS[hardware.network], {"dispatch_bytes": FP8, "combine_bytes": 2.0}
    return Group(device, network, ranks, backend, model.moe_layers, **sizes)


def times(ids: Mapping[int, torch.Tensor], layout: Layout, model: Model) -> dict[str, Any]:
    """Returns the steps on all hardware and by all backends: milliseconds, in all and of the parts."""
    found = {}
    for name, hardware in HARDWARE.items():
        for backend in BACKENDS:
            group = group_of(hardware, model, layout.num_ranks, backend)
            step = simulate(ids, layout, model.cost(hardware.expert_bytes), group, CONTEXT)
            found[f"{name}, {backend}"] = {part: rounded(1e3 * seconds) for part, seconds in parts_of(step).items()}
    return found


def parts_of(step: GroupStep) -> dict[str, float]:
    own = step.of_rank
    return {
        "seconds": step.seconds,
        "experts": own.experts,
        "dispatch": step.dispatch,
        "combine": step.combine,
        "others": own.others,
        "attention": own.attention,
        "waiting": own.waiting,
    }


def fits(model: Model, ranks: int, hardware: Hardware) -> bool:
    """Returns whether the weights leave a tenth of the memory."""
    cost = model.cost(hardware.expert_bytes)
    return math.ceil(model.experts / ranks) * cost.expert_bytes + cost.other_bytes < 0.9 * hardware.memory


def linear(layers: Sequence[int], num_experts: int, ranks: int) -> Layout:
    return Layout(ranks, dict.fromkeys(layers, linear_ranks(num_experts, ranks)))

"""How long a decode step takes, and how much of that re-routing can save, before anything is calibrated or tuned.

A step reads the weights of all active experts, all other weights, and the KV cache of each row; it computes each row
with the experts of its slots; and it waits between kernels. A processor that overlaps reading with computing takes the
longer of both for each part, one that does not takes both (`Device.overlaps`). The host prepares the next step beside
the device, so a step takes the longer of the two: where that is the host, fewer experts gain nothing.

Shape suffix: E experts of a layer.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sere_dist.moe import MoeShape, routed_experts


@dataclass(frozen=True)
class Device:
    """What a step runs on. Rates are those that large matrices reach, not those of a data sheet.

    Attributes:
        bandwidth: bytes per second that weights are read at.
        speed: floating-point operations per second of matrix products.
        layer_seconds: what a decoder layer takes beside both: kernel launches, small kernels, norms.
        step_seconds: what a step takes beside its layers: sampling, and what of the host is not hidden.
        overlaps: whether reading and computing go on at the same time.
        host_seconds: what the host takes for a step, beside the device; 0 where it is in `step_seconds`.
        uncertainty: by what factor the rates and times may be off, as a standard deviation of their logarithm.
        source: where the numbers come from, in words.
        memory: bytes of it. None: not known.
    """

    name: str
    bandwidth: float
    speed: float
    layer_seconds: float
    step_seconds: float
    overlaps: bool
    host_seconds: float
    uncertainty: float
    source: str
    memory: float | None = None

    def seconds(self, read: float, operations: float) -> float:
        """Returns what a part of a step takes that reads so many bytes and does so many operations."""
        both = read / self.bandwidth, operations / self.speed
        return max(both) if self.overlaps else sum(both)


def gpu(name: str, terabytes: float, teraflops: float, gigabytes: float) -> Device:
    """Returns a GPU by its data sheet: memory bandwidth, dense bfloat16 operations per second, and memory.

    Decode kernels reach about three quarters of the bandwidth and half the operations. Kernel gaps and the host's time
    are assumptions, for CUDA graphs and asynchronous scheduling; nothing of this was measured by this project.
    """
    return Device(
        name,
        bandwidth=0.75e12 * terabytes,
        speed=0.5e12 * teraflops,
        layer_seconds=25e-6,
        step_seconds=300e-6,
        overlaps=True,
        host_seconds=2e-3,
        uncertainty=0.3,
        source="by its data sheet; 75% of its bandwidth, 25 us per layer and 2 ms of the host are assumed",
        memory=1e9 * gigabytes,
    )


DEVICES = {
    device.name: device
    for device in (
        gpu("a100", 2.04, 312, 80),
        gpu("h100", 3.35, 989, 80),
        gpu("h200", 4.8, 989, 141),
        gpu("b200", 8.0, 2250, 180),
        gpu("l40s", 0.864, 362, 48),
        gpu("mi300x", 5.3, 1307, 192),
        gpu("mi350x", 8.0, 2300, 288),
        # By benchmarks.decode, shape cpu-small. `studies.forecast` holds it against other shapes.
        Device("2-cpu-cores", 18e9, 115e9, 1.3e-3, 2e-3, False, 0.0, 0.15, "fitted to vLLM 0.32 in eager mode"),
    )
}


@dataclass(frozen=True)
class ModelCost:
    """What a decode step of a model reads and computes.

    Attributes:
        expert_bytes: weights of one routed expert, summed over all MoE layers.
        other_bytes: all other weights that a step reads.
        expert_operations: of one slot in every MoE layer.
        other_operations: of one row, without its slots and its attention.
        cache_bytes: of the KV cache, per token of a row's context.
        attention_operations: of one row, per token of its context.
    """

    shape: MoeShape
    expert_bytes: float
    other_bytes: float
    expert_operations: float
    other_operations: float
    cache_bytes: float
    attention_operations: float

    @classmethod
    def of(cls, model: PreTrainedModel, bytes_per_parameter: float) -> "ModelCost":
        """Counts a model's parameters; it may be on the meta device."""
        shape = MoeShape.from_config(model.config)
        of_experts = sum(
            parameter.numel() for _, experts in routed_experts(model).values() for parameter in experts.parameters()
        )
        every = sum(parameter.numel() for parameter in model.parameters())  # those that are tied count once
        embedding, output = (layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
        assert isinstance(embedding, torch.Tensor)
        looked_up = 0 if embedding is output else embedding.numel()
        others, one_expert = every - of_experts - looked_up, of_experts / shape.num_experts
        cached, attended = _attention(model.config.get_text_config())
        return cls(
            shape,
            expert_bytes=one_expert * bytes_per_parameter,
            other_bytes=others * bytes_per_parameter,
            expert_operations=2 * one_expert,
            other_operations=2 * others,
            cache_bytes=2 * cached,
            attention_operations=2 * attended,
        )

    def on_ranks(self, ranks: int) -> "ModelCost":
        """Returns what each of so many tensor-parallel ranks has of it."""
        parts = ("expert_bytes", "other_bytes", "expert_operations", "other_operations")
        parts += ("cache_bytes", "attention_operations")
        return replace(self, **{name: getattr(self, name) / ranks for name in parts})


def _attention(config: PretrainedConfig) -> tuple[int, int]:
    """Returns the numbers that all layers' caches hold of a token, and multiply for it in one row's attention."""
    heads: int = config.num_attention_heads
    if rank := getattr(config, "kv_lora_rank", None):  # latent attention: one vector for all heads
        cached = rank + config.qk_rope_head_dim
        attended = heads * (2 * rank + config.qk_rope_head_dim)
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        cached = 2 * head_dim * (getattr(config, "num_key_value_heads", None) or heads)
        attended = 2 * head_dim * heads
    kinds: Any = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum("linear" not in kind for kind in kinds)  # the state of linear attention does not grow
    return cached * layers, attended * layers


def union(shares_E: torch.Tensor, rows: int) -> float:
    """Returns the active experts of a step of so many rows, each of which uses an expert with this probability [E].

    Rows are taken to choose independently of each other.
    """
    return float((1 - (1 - shares_E.double()) ** rows).sum())


def uniform_shares(shape: MoeShape) -> torch.Tensor:
    """Returns [E]: how likely a token uses each expert, where the router likes all of them alike."""
    return torch.full((shape.num_experts,), shape.num_experts_per_token / shape.num_experts)


@dataclass(frozen=True)
class Step:
    """A forecast of one decode step: seconds of its parts."""

    experts: float
    others: float
    attention: float
    waiting: float  # of the device: between kernels, and beside the layers
    host: float

    @property
    def seconds(self) -> float:
        return max(self.experts + self.others + self.attention + self.waiting, self.host)

    @property
    def is_host_bound(self) -> bool:
        return self.seconds == self.host


def decode_step(cost: ModelCost, device: Device, rows: int, active: float, context: int) -> Step:
    """Returns the forecast for a step of so many rows that runs `active` experts per layer.

    All slots are computed, whether they share an expert or not; `context` is a row's mean length in tokens.
    """
    slots = rows * cost.shape.num_experts_per_token
    return Step(
        experts=device.seconds(active * cost.expert_bytes, slots * cost.expert_operations),
        others=device.seconds(cost.other_bytes, rows * cost.other_operations),
        attention=device.seconds(rows * context * cost.cache_bytes, rows * context * cost.attention_operations),
        waiting=cost.shape.num_layers * device.layer_seconds + device.step_seconds,
        host=device.host_seconds,
    )


def prefill_seconds(cost: ModelCost, device: Device, tokens: int) -> float:
    """Returns what computing a prompt of so many tokens takes, attention left out."""
    operations = tokens * (cost.other_operations + cost.shape.num_experts_per_token * cost.expert_operations)
    return operations / device.speed

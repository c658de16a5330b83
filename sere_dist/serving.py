"""How a model can be split over GPUs in vLLM, whether it fits, and how long its decode steps then take.

A *split* is how one group of GPUs shares a model; further groups are replicas. In a group, tensor parallelism slices
attention, and experts unless expert parallelism gives each GPU whole ones. Data-parallel attention gives each GPU
requests of its own, and whole experts. The rules are those of vLLM 0.32 (`splits` names where it has them).

Steps are those of `sere_dist.simulation`, over routing that `evaluation.synthetic` draws and the policies re-route.

Shape suffixes: D decode steps, B rows of a group, K slots of a row, E experts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sere_dist.artifact.folder import Artifact
from sere_dist.evaluation.lockstep import Rerouter, Routed, unchanged
from sere_dist.evaluation.rerouters import of_layers, paper_rerouter, projection_rerouter
from sere_dist.evaluation.synthetic import SyntheticRouter
from sere_dist.evaluation.traffic import Layout
from sere_dist.forecast import Device, ModelCost, prefill_seconds
from sere_dist.method.placement import linear_ranks
from sere_dist.method.records import LayerTables, Settings
from sere_dist.method.similarity import random_similarity
from sere_dist.method.slots import merge_repeats
from sere_dist.moe import MoeShape, routed_experts
from sere_dist.simulation import Backend, Group, GroupStep, Loads, Network, group_step, loads

MEMORY_SHARE = 0.92  # of a GPU's memory that vLLM uses by default (gpu_memory_utilization)
OTHER_MEMORY = 4e9  # bytes of it for activations, CUDA graphs and buffers: assumed
# vLLM's all2all_backend -> what it sends. deepep_high_throughput is left out: vLLM then switches CUDA graphs off.
# flashinfer_nvlink_one_sided sends what deepep_v2 does, within one NVLink domain.
BACKENDS: dict[str, Backend] = {
    "allgather_reducescatter": "all_gather",
    "deepep_v2": "per_rank",
    "deepep_low_latency": "per_slot",
}
COMBINE_BYTES = 2.0  # of a number of a result on its way back: bfloat16
LOW_LATENCY_HIDDEN = 8192  # the largest hidden size that DeepEP's low-latency kernels are compiled for
# Fitted to the example model's routing by `studies.simulation`; what it is off by at other shapes is not known.
ROUTER = SyntheticRouter(bias=0.943, topic=5.221, sharpness=0.709)
OFF, RECOMMENDED = "off", "recommended"
SIMULATED_LAYERS = 3  # of an artifact, evenly spaced, which stand for all
SIMULATED_ROWS, SIMULATED_STEPS = 2048, 64  # enough steps for so many rows, and at most so many steps
MOST_COPIES = 2**24  # rows x ranks that a simulated step may have, which bounds memory
STEPS_AT_A_TIME = 16  # that are re-routed at once, which bounds memory


@dataclass(frozen=True)
class Architecture:
    """What decides how a model can be split: numbers of its configuration.

    Attributes:
        is_latent: whether all heads share one latent vector in the cache (MLA).
        expert_width: the inner size of a routed expert. None: the configuration does not name it.
        groups: of experts, half of which a token may use; 1 where the router has none.
    """

    shape: MoeShape
    heads: int
    kv_heads: int
    is_latent: bool
    expert_width: int | None
    groups: int = 1

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Architecture":
        text = config.get_text_config()
        groups, used = getattr(text, "n_group", None) or 1, getattr(text, "topk_group", None)
        return cls(
            MoeShape.from_config(config),
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            is_latent=bool(getattr(text, "kv_lora_rank", None)),
            expert_width=getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None),
            groups=groups if used and groups == 2 * used else 1,
        )


@dataclass(frozen=True)
class Split:
    """How a group of GPUs shares a model, and how many groups there are. `backend`: vLLM's all2all_backend, or none."""

    tensor_parallel: int
    data_parallel: int
    expert_parallel: bool
    backend: str | None
    replicas: int

    @property
    def ranks(self) -> int:
        """GPUs of a group, which under expert parallelism all hold experts of their own."""
        return self.tensor_parallel * self.data_parallel

    @property
    def engines(self) -> int:
        """Engines of the whole deployment, each with a batch of its own."""
        return self.replicas * self.data_parallel

    def __str__(self) -> str:
        sizes = {"TP": self.tensor_parallel, "DP": self.data_parallel, "EP": self.ranks * self.expert_parallel}
        parts = [f"{name} {size}" for name, size in sizes.items() if size > 1] or ["one GPU"]
        return f"{self.replicas} x {' '.join(parts)}" + (f", {self.backend}" if self.backend else "")


def splits(gpus: int, nodes: int, architecture: Architecture) -> tuple[list[Split], list[str]]:
    """Returns the splits of so many GPUs that vLLM and our plugin take, and why others are left out.

    Raises:
        ValueError: the GPUs are not shared evenly by the nodes.
    """
    if gpus % nodes:
        raise ValueError(f"{gpus} GPUs on {nodes} nodes: each node must have as many")
    on_node, found, why = gpus // nodes, [], []
    experts, kv_heads = architecture.shape.num_experts, architecture.kv_heads
    for size in divisors(on_node):  # tensor parallelism stays within a node
        if architecture.heads % size:  # vllm/config/model.py
            why.append(f"TP {size} does not divide {architecture.heads} attention heads.")
            continue
        if not architecture.is_latent and max(kv_heads, size) % min(kv_heads, size):  # vllm/model_executor/models
            why.append(f"TP {size} neither divides {kv_heads} key-value heads nor is a multiple of them.")
            continue
        if size > experts:  # vllm/model_executor/models
            why.append(f"TP {size} is more than the {experts} experts.")
            continue
        if (width := architecture.expert_width) and width % size:  # vllm/model_executor/layers/fused_moe/config.py
            why.append(f"TP {size} without expert parallelism does not divide an expert's inner size, {width}.")
        else:
            found.append(Split(size, 1, False, None, gpus // size))
        if size > 1:
            found.append(Split(size, 1, True, None, gpus // size))
    for size in divisors(gpus)[1:]:
        if on_node % size and size % on_node:  # a group fills nodes, or is within one
            continue
        if size > experts:
            why.append(f"DP {size} would leave ranks without one of the {experts} experts.")
            continue
        for backend in BACKENDS:
            if backend != "allgather_reducescatter" and experts % size:  # DeepEP
                why.append(f"{backend} needs as many experts on each rank: {size} does not divide {experts}.")
            elif backend == "deepep_low_latency" and architecture.shape.hidden_size > LOW_LATENCY_HIDDEN:
                why.append(f"{backend} has no kernel for hidden sizes above {LOW_LATENCY_HIDDEN}.")
            else:
                found.append(Split(1, size, True, backend, gpus // size))
    why.append("DP with TP in one group is not planned: the plugin does not re-route there.")
    return found, list(dict.fromkeys(why))


def divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU: weights, and room for the KV cache; `tokens` is what that holds of its engine's requests."""

    weights: float
    cache: float
    tokens: int


@dataclass(frozen=True)
class ServedModel:
    """A model as planning needs it: what a step costs, what its weights take, and how it can be split.

    Attributes:
        cost: of the whole model, for one GPU that had all of it.
        weights: bytes of all weights.
        layers: MoE layers.
        dispatch_bytes: of a number of a hidden state on its way to an expert.
    """

    architecture: Architecture
    cost: ModelCost
    weights: float
    layers: int
    dispatch_bytes: float

    @classmethod
    def of(cls, model: PreTrainedModel, bytes_per_parameter: float) -> "ServedModel":
        """Counts a model's parameters; it may be on the meta device. Results come back in bfloat16, and hidden states
        go out in FP8 where weights have no more than about 8 bits."""
        return cls(
            Architecture.of(model.config),
            ModelCost.of(model, bytes_per_parameter),
            model.num_parameters() * bytes_per_parameter,
            len(routed_experts(model)),
            dispatch_bytes=1.0 if bytes_per_parameter < 1.5 else 2.0,
        )

    def cost_of_rank(self, split: Split) -> ModelCost:
        """Returns what a rank has of the model. Whole experts stay whole: the simulation counts those of each rank."""
        slices = split.tensor_parallel
        kv_heads = 1 if self.architecture.is_latent else self.architecture.kv_heads
        cost = replace(
            self.cost,
            other_bytes=self.cost.other_bytes / slices,
            other_operations=self.cost.other_operations / slices,
            cache_bytes=self.cost.cache_bytes / min(slices, kv_heads),  # further ranks hold copies
            attention_operations=self.cost.attention_operations / slices,
        )
        if split.expert_parallel:
            return cost
        return replace(cost, expert_bytes=cost.expert_bytes / slices, expert_operations=cost.expert_operations / slices)

    def memory(self, split: Split, gpu: float) -> Memory:
        """Returns how a GPU of so many bytes is filled. The room is negative where the weights do not fit."""
        experts = self.architecture.shape.num_experts
        own_experts = math.ceil(experts / split.ranks) if split.expert_parallel else experts
        cost = self.cost_of_rank(split)
        others = (self.weights - experts * self.cost.expert_bytes) / split.tensor_parallel
        weights = others + own_experts * cost.expert_bytes
        room = MEMORY_SHARE * gpu - OTHER_MEMORY - weights
        return Memory(weights, room, max(0, int(room / cost.cache_bytes)))


@dataclass
class DrawnRouting:
    """Routing of decode steps, drawn for a model, and what re-routing makes of it under each setting.

    Attributes:
        rerouters: by setting; `off` changes nothing.
        biases: layer -> those of the experts [E], None where they are drawn too.
    """

    architecture: Architecture
    rerouters: Mapping[str, Rerouter]
    biases: Mapping[int, torch.Tensor | None]
    _kept: dict[tuple[int, int], dict[int, Routed]] = field(default_factory=dict, repr=False)

    def routed(self, rows: int, ranks: int, setting: str) -> dict[int, Routed]:
        """Returns weights and ids [D, B, K] of each layer, for so many rows on each data-parallel rank.

        Each rank has a primary set of its own (`primary_scope: rank`). Row b is on rank b mod `ranks`.
        """
        found = self._off(rows, ranks)
        if setting == OFF:
            return found
        return {layer: self._rerouted(setting, layer, *routed, ranks) for layer, routed in found.items()}

    def _off(self, rows: int, ranks: int) -> dict[int, Routed]:
        if (rows, ranks) not in self._kept:
            shape, batch = self.architecture.shape, rows * ranks
            steps = max(1, min(SIMULATED_STEPS, SIMULATED_ROWS // batch))
            size = (steps, batch, shape.num_experts, shape.num_experts_per_token)
            self._kept[rows, ranks] = {
                layer: ROUTER.route(*size, torch.Generator().manual_seed(layer), self.architecture.groups, bias_E)
                for layer, bias_E in self.biases.items()
            }
        return self._kept[rows, ranks]

    def _rerouted(
        self, setting: str, layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, ranks: int
    ) -> Routed:
        steps, batch, slots = ids_DBK.shape
        by_rank = [
            each.view(steps, batch // ranks, ranks, slots).transpose(1, 2).flatten(0, 1).split(STEPS_AT_A_TIME)
            for each in (weights_DBK, ids_DBK)
        ]
        done = [self.rerouters[setting](layer, *part, None) for part in zip(*by_rank, strict=True)]
        weights, ids = (
            torch.cat(each).view(steps, ranks, -1, slots).transpose(1, 2).flatten(1, 2)
            for each in zip(*done, strict=True)
        )
        return weights, ids


def drawn_routing(architecture: Architecture, artifact: Artifact | None) -> DrawnRouting:
    """Returns routing for a model, with the settings that are compared: off, S that halves the top-k, S = 1, and what
    a tuning recommends.

    With an artifact, experts are as popular as its calibration saw them, and re-routing follows its tables, by policy
    projection if it is of that method. Without one, substitutes are random.
    """
    top_k, experts = architecture.shape.num_experts_per_token, architecture.shape.num_experts
    if artifact is None:
        tables, biases = {0: LayerTables(random_similarity(experts, 0))}, {0: None}
    else:
        every = sorted(artifact.layers)
        count = min(SIMULATED_LAYERS, len(every))
        chosen = [every[(2 * place + 1) * len(every) // (2 * count)] for place in range(count)]
        tables = {layer: artifact.tables[layer] for layer in chosen}
        biases = {
            layer: None if counts is None else ROUTER.biases(counts, top_k, layer, architecture.groups)
            for layer in chosen
            for counts in [artifact.layers[layer].tokens_E]
        }
    policy = projection_rerouter if artifact is not None and artifact.is_projection else paper_rerouter
    rerouters: dict[str, Rerouter] = {OFF: unchanged}
    for kept in dict.fromkeys((top_k // 2, 1)):
        if 0 < kept < top_k:
            rerouters[f"S = {kept}"] = policy(tables, Settings(kept))
    if artifact is not None and (tuned := artifact.recommended) is not None:
        policy = projection_rerouter if tuned.policy == "projection" else paper_rerouter
        rerouters[RECOMMENDED] = of_layers({layer: policy(tables, tuned.layers[layer].numbers) for layer in tables})
    return DrawnRouting(architecture, rerouters, biases)


class Site(NamedTuple):
    """Where a model is served, whose rates may be off: see `Device.uncertainty`."""

    device: Device
    network: Network

    def shaken(self) -> list["Site"]:
        """Returns the site with each of its numbers off by one standard deviation, up and down."""
        device, network, found = self.device, self.network, []
        for factor in (math.exp(device.uncertainty), math.exp(-device.uncertainty)):
            for name in ("bandwidth", "speed", "layer_seconds", "host_seconds"):
                found.append(Site(replace(device, **{name: getattr(device, name) * factor}), network))
            for name in ("inside", "between", "latency"):
                found.append(Site(device, replace(network, **{name: getattr(network, name) * factor})))
        return found


class Demand(NamedTuple):
    """What requests are like: tokens of a prompt and of an answer, as means, and whether prompts are computed here."""

    prompt: int
    answer: int
    prefill_here: bool = True


@dataclass(frozen=True)
class Work:
    """What the ranks of a group have to do in a decode step: one entry per simulated layer."""

    rows: int  # of each engine
    of_layers: tuple[Loads, ...]


def work(model: ServedModel, split: Split, routing: DrawnRouting, rows: int, setting: str, site: Site) -> Work:
    """Returns what a decode step of so many rows per engine comes to. Nothing is timed yet.

    Under DeepEP a token sends what several of its slots want of one expert once, as the plugin merges them.
    """
    ranks = split.ranks if split.expert_parallel else 1
    layout = Layout(ranks, dict.fromkeys(routing.biases, linear_ranks(model.architecture.shape.num_experts, ranks)))
    group, found = _group(model, split, site), []
    for layer, (weights_DBK, ids_DBK) in routing.routed(rows, split.data_parallel, setting).items():
        if split.backend is not None and split.backend.startswith("deepep"):
            merged = merge_repeats(weights_DBK.flatten(0, 1), ids_DBK.flatten(0, 1))
            ids_DBK = merged[1].view_as(ids_DBK)
        found.append(loads(ids_DBK, layout, layer, group))
    return Work(rows, tuple(found))


def _group(model: ServedModel, split: Split, site: Site) -> Group:
    kind = BACKENDS[split.backend] if split.backend else "all_gather"
    ranks = split.ranks if split.expert_parallel else 1
    return Group(site.device, site.network, ranks, kind, model.layers, model.dispatch_bytes, COMBINE_BYTES)


@dataclass(frozen=True)
class Timed:
    """A decode step of a group, in seconds.

    Attributes:
        step: its parts, without what is exchanged.
        exchange: between ranks: dispatch and combine, or the all-reduces of tensor parallelism.
        prefill: what the step has to give to prompts, as a mean: each row needs one per answer.
    """

    step: GroupStep
    exchange: float
    prefill: float

    @property
    def device(self) -> float:
        of = self.step.of_rank
        return of.experts + of.others + of.attention + of.waiting + self.exchange

    @property
    def seconds(self) -> float:
        """Of an output token of each row, prefill included."""
        return max(self.device, self.step.of_rank.host) + self.prefill

    @property
    def is_host_bound(self) -> bool:
        return self.step.of_rank.host > self.device


def timed(model: ServedModel, split: Split, of: Work, site: Site, demand: Demand) -> Timed:
    """Returns how long a step takes. A row has its prompt and half of its answer behind it."""
    context = demand.prompt + demand.answer // 2
    step = group_step(of.of_layers, model.cost_of_rank(split), _group(model, split, site), of.rows, context)
    if split.data_parallel > 1:
        exchange = step.dispatch + step.combine
    else:
        exchange = all_reduces(model, split, of.rows, site.network)
    whole = prefill_seconds(model.cost, site.device, demand.prompt) if demand.prefill_here else 0.0
    return Timed(step, exchange, of.rows / demand.answer * whole / split.tensor_parallel)


def all_reduces(model: ServedModel, split: Split, rows: int, network: Network) -> float:
    """Returns the seconds of a step's all-reduces under tensor parallelism: two in each decoder layer."""
    if split.tensor_parallel == 1:
        return 0.0
    shape, share = model.architecture.shape, (split.tensor_parallel - 1) / split.tensor_parallel
    return (
        2 * shape.num_layers * (network.latency + 2 * share * rows * shape.hidden_size * COMBINE_BYTES / network.inside)
    )


def exchanged(model: ServedModel, split: Split, of: Work) -> float:
    """Returns the bytes that dispatch and combine move per token, over all layers and all links."""
    if split.data_parallel == 1:
        return 0.0
    copies = sum(float((each.inside_DR + each.between_DR).sum(dim=1).mean()) for each in of.of_layers)
    copies /= len(of.of_layers) * of.rows * split.data_parallel
    return copies * model.architecture.shape.hidden_size * (model.dispatch_bytes + COMBINE_BYTES) * model.layers

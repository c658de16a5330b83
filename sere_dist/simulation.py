"""How long a decode step of a whole group takes: ranks that share the experts, and wait for the slowest at every layer.

Attention is data-parallel, and experts are on ranks. At each MoE layer tokens go to the ranks of their experts, all
ranks run theirs, and results come back. Nobody goes on before the slowest rank has finished, so a layer takes

    exchange(dispatch) + max over ranks of what its active experts and its slots take + exchange(combine).

Everything else is what `sere_dist.forecast` has of one rank: weights that all ranks have, the KV cache, kernel gaps,
and the host. Nothing of an exchange is hidden behind computing (engines with two batches in flight hide some).

Shape suffixes: D decode steps, B rows of all ranks, T = D x B tokens, K slots of a row, E experts, R ranks, N nodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from sere_dist.evaluation.lockstep import active_by_step
from sere_dist.evaluation.traffic import Layout
from sere_dist.forecast import Device, ModelCost, Step, decode_step

Backend = Literal["all_gather", "per_rank", "per_slot"]  # as in `method.counters.dispatch_bytes`


@dataclass(frozen=True)
class Network:
    """What ranks exchange tokens over. Rates are those that exchanges reach, of one rank in one direction.

    Attributes:
        ranks_per_node: ranks that reach each other over the fast links.
        inside: bytes per second to ranks of the same node.
        between: bytes per second to other nodes.
        latency: seconds of an exchange that sends next to nothing.
        source: where the numbers come from, in words.
    """

    name: str
    ranks_per_node: int
    inside: float
    between: float
    latency: float
    source: str


def network(name: str, ranks_per_node: int, inside_gigabytes: float, between_gigabytes: float, source: str) -> Network:
    """Returns a network by the rates of its data sheet, in gigabytes per second and direction.

    The shares that exchanges reach of them, 60% and 80%, and the 12 microseconds were chosen on one set of published
    figures: DeepEP's low-latency kernels on H800 with ConnectX-7, 128 tokens (docs/scale.md has the errors).
    """
    return Network(name, ranks_per_node, 0.6e9 * inside_gigabytes, 0.8e9 * between_gigabytes, 12e-6, source)


NETWORKS = {
    each.name: each
    for each in (
        network("a100-200g", 8, 300, 25, "NVLink 3: 600 GB/s both ways, ConnectX-6 200 Gb/s (NVIDIA's data sheets)"),
        network("h800-400g", 8, 200, 50, "NVLink 400 GB/s both ways, ConnectX-7 400 Gb/s (DeepEP, docs/legacy.md)"),
        network("h100-400g", 8, 450, 50, "NVLink 4: 900 GB/s both ways, ConnectX-7 400 Gb/s (NVIDIA's data sheets)"),
        network("b200-400g", 8, 900, 50, "NVLink 5: 1,800 GB/s both ways, ConnectX-7 400 Gb/s (NVIDIA's data sheets)"),
        network(
            "gb200-nvl72", 72, 900, 50, "NVLink 5: 1,800 GB/s both ways, ConnectX-7 400 Gb/s (NVIDIA's data sheets)"
        ),
        network("l40s-pcie", 8, 32, 25, "PCIe 4.0 x16: 64 GB/s both ways, ConnectX-6 200 Gb/s (NVIDIA's data sheets)"),
    )
}


@dataclass(frozen=True)
class Group:
    """The ranks of a deployment.

    Attributes:
        dispatch_bytes: of a hidden state on its way to an expert: 1 per number in FP8, 2 in bfloat16.
        combine_bytes: likewise, of a result on its way back.
        layers: MoE layers of the model.
    """

    device: Device
    network: Network
    ranks: int
    backend: Backend
    layers: int
    dispatch_bytes: float
    combine_bytes: float


class Loads(NamedTuple):
    """What each rank has to do in one layer of each step, float64 [D, R]. Copies are hidden states, sent or received,
    whichever are more."""

    active_DR: torch.Tensor
    slots_DR: torch.Tensor
    inside_DR: torch.Tensor
    between_DR: torch.Tensor


@dataclass(frozen=True)
class GroupStep:
    """A decode step of a group: seconds of its parts, and experts per layer, as means over steps and layers."""

    of_rank: Step
    dispatch: float
    combine: float
    active: float
    largest_rank: float

    @property
    def seconds(self) -> float:
        step = self.of_rank
        device = step.experts + step.others + step.attention + step.waiting + self.dispatch + self.combine
        return max(device, step.host)


def loads(ids_DBK: torch.Tensor, layout: Layout, layer: int, group: Group) -> Loads:
    """Returns what the ranks do for the expert ids that run, -1 where none does.

    all_gather sends every token to every rank; per_rank to each rank that holds one of its experts, over the network
    once to each node and from there on inside it; per_slot sends a copy for each slot, straight to its rank.
    """
    rank_E, ranks, (steps, batch, _) = layout.rank[layer], layout.num_ranks, ids_DBK.shape
    active_DE = active_by_step(ids_DBK, len(rank_E)).double()
    active_DR = active_DE.new_zeros(steps, ranks).index_add_(1, rank_E, active_DE)
    ids_TK, home_T = ids_DBK.flatten(0, 1).long(), layout.homes(batch).repeat(steps)
    rank_TK = torch.where(ids_TK < 0, ranks, rank_E[ids_TK.clamp(min=0)])  # one place more for "none"
    slots_TR = torch.zeros(len(ids_TK), ranks + 1, dtype=torch.float64)
    slots_TR = slots_TR.scatter_add_(1, rank_TK, torch.ones_like(rank_TK, dtype=torch.float64))[:, :ranks]
    sent = _sent(slots_TR, home_T, group)
    # What a rank receives is the column of what was sent to it, and what it sends is the sum over its own tokens.
    inside, between = (_busier(copies_TR, of_T, steps) for copies_TR, of_T in sent)
    return Loads(active_DR, slots_TR.view(steps, batch, ranks).sum(dim=1), inside, between)


def _sent(
    slots_TR: torch.Tensor, home_T: torch.Tensor, group: Group
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Returns for the links inside and between nodes the copies to each rank [T, R], and who sends them [T, R]."""
    tokens, ranks = slots_TR.shape
    size = group.network.ranks_per_node
    rank_R = torch.arange(ranks)
    home_TR = home_T[:, None].expand(tokens, ranks)
    same_node_TR = rank_R // size == home_TR // size
    if group.backend == "per_slot":
        remote_TR = slots_TR.masked_fill(rank_R == home_TR, 0)
        return (remote_TR * same_node_TR, home_TR), (remote_TR * ~same_node_TR, home_TR)
    visits_TR = torch.ones_like(slots_TR) if group.backend == "all_gather" else (slots_TR > 0).double()
    # Between nodes a copy goes to the rank that has the sender's place there, which passes it on.
    relay_TR = (rank_R // size * size + home_TR % size).clamp(max=ranks - 1)
    inside_TR = visits_TR.masked_fill(rank_R == relay_TR, 0)
    at_relay_TR = torch.zeros_like(visits_TR).scatter_reduce_(1, relay_TR, visits_TR, "amax")
    between_TR = at_relay_TR * ~same_node_TR
    return (inside_TR, relay_TR), (between_TR, home_TR)


def _busier(copies_TR: torch.Tensor, sender_TR: torch.Tensor, steps: int) -> torch.Tensor:
    """Returns [D, R]: the copies that each rank sends or receives in each step, whichever are more."""
    tokens, ranks = copies_TR.shape
    received_DR = copies_TR.view(steps, -1, ranks).sum(dim=1)
    sent_TR = torch.zeros_like(copies_TR).scatter_add_(1, sender_TR, copies_TR)
    return torch.maximum(received_DR, sent_TR.view(steps, tokens // steps, ranks).sum(dim=1))


def exchange_seconds(of: Loads, group: Group, copy_bytes: float) -> torch.Tensor:
    """Returns [D]: what an exchange takes. Both kinds of links work at once; the busiest rank decides."""
    by_link_DR = torch.maximum(of.inside_DR / group.network.inside, of.between_DR / group.network.between)
    return copy_bytes * by_link_DR.amax(dim=1) + (group.network.latency if group.ranks > 1 else 0.0)


def experts_seconds(of: Loads, cost: ModelCost, group: Group) -> torch.Tensor:
    """Returns [D]: what the slowest rank takes to read its active experts and to compute its slots, in one layer."""
    read_DR = of.active_DR * (cost.expert_bytes / group.layers / group.device.bandwidth)
    computed_DR = of.slots_DR * (cost.expert_operations / group.layers / group.device.speed)
    both_DR = torch.maximum(read_DR, computed_DR) if group.device.overlaps else read_DR + computed_DR
    return both_DR.amax(dim=1)


def simulate(ids: Mapping[int, torch.Tensor], layout: Layout, cost: ModelCost, group: Group, context: int) -> GroupStep:
    """Returns the mean decode step of a group.

    Args:
        ids: layer -> the expert ids that run [D, B, K], -1 where none does. The layers that are there stand for all.
        layout: the rank of each expert, and of each row.
        cost: of the model, as one rank has it: every rank holds all that is not a routed expert.
        group: the ranks. Their number is the layout's.
        context: mean length of a row in tokens.

    Raises:
        ValueError: the layout is of another number of ranks.
    """
    if layout.num_ranks != group.ranks:
        raise ValueError(f"the layout has {layout.num_ranks} ranks, and the group {group.ranks}: make them equal")
    batch = next(iter(ids.values())).shape[1]
    most_rows = int(layout.homes(batch).bincount(minlength=group.ranks).max())
    of_layers = [loads(ids_DBK, layout, layer, group) for layer, ids_DBK in ids.items()]
    return group_step(of_layers, cost, group, most_rows, context)


def group_step(of_layers: Sequence[Loads], cost: ModelCost, group: Group, rows: int, context: int) -> GroupStep:
    """Returns the mean decode step by what the ranks have to do in each layer; `rows` are those of the busiest rank."""
    found: list[torch.Tensor] = []
    for of in of_layers:
        sizes = (cost.shape.hidden_size * each for each in (group.dispatch_bytes, group.combine_bytes))
        times = [experts_seconds(of, cost, group), *(exchange_seconds(of, group, size) for size in sizes)]
        found.append(torch.stack([*times, of.active_DR.sum(dim=1), of.active_DR.amax(dim=1)]).mean(dim=1))
    experts, dispatch, combine, active, largest = torch.stack(found).mean(dim=0).tolist()
    of_rank = replace(decode_step(cost, group.device, rows, 0.0, context), experts=group.layers * experts)
    return GroupStep(of_rank, group.layers * dispatch, group.layers * combine, active, largest)

"""A dense feed-forward layer carved into experts that share its neurons.

A neuron is one column of the gate, up and down projections. The neurons that matter most often form a shared expert,
which every token runs. The others are dealt into blocks. A block has several experts, and each of them holds the part
of the block's neurons that matters most to a cluster of tokens. Experts of one block therefore have neurons in common:
they are alike, as the experts of a model are that was upcycled from a dense one. Each expert scales its neurons, which
makes up for those that it leaves out.

No expert has weights of its own: with the dense model's weights, a `Carving` is all there is to a layer. It trains in
that form (`CarvedFeedForward`), at the cost of the dense layer, and is then written out as Qwen2-MoE's.

Shape suffixes: T tokens, H hidden size, N neurons, S shared neurons, B blocks, E experts, M neurons of an expert.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, one_hot, softmax
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP


@dataclass(frozen=True)
class Shape:
    """How many neurons and experts each layer has."""

    shared: int = 1024
    blocks: int = 8
    experts_per_block: int = 8
    width: int = 48  # neurons of an expert

    @property
    def num_experts(self) -> int:
        return self.blocks * self.experts_per_block


@dataclass
class Carving:
    """What makes experts of one dense layer."""

    shared_ids_S: torch.Tensor
    shared_scale_S: torch.Tensor
    expert_ids_EM: torch.Tensor
    expert_scale_EM: torch.Tensor
    router_EH: torch.Tensor
    norm_H: torch.Tensor  # the weight of the normalisation before the layer


def save_carvings(carvings: list[Carving], file: Path) -> None:
    """Writes the carving of each layer, floats as float16."""
    stored = {}
    for layer, carving in enumerate(carvings):
        for field in fields(carving):
            tensor = getattr(carving, field.name).detach()
            dtype = torch.float16 if tensor.is_floating_point() else torch.int16
            stored[f"{layer}.{field.name}"] = tensor.to(dtype).contiguous()
    save_file(stored, file)


def load_carvings(file: Path) -> list[Carving]:
    """Returns the carving of each layer, floats as float32."""
    stored = load_file(file)
    layers = 1 + max(int(name.split(".")[0]) for name in stored)

    def read(layer: int, name: str) -> torch.Tensor:
        tensor = stored[f"{layer}.{name}"]
        return tensor.float() if tensor.is_floating_point() else tensor.long()

    return [Carving(**{field.name: read(layer, field.name) for field in fields(Carving)}) for layer in range(layers)]


def neurons(dense: LlamaMLP, inputs_TH: torch.Tensor) -> torch.Tensor:
    """Returns what each neuron gives to the down projection [T, N]."""
    return dense.act_fn(dense.gate_proj(inputs_TH)) * dense.up_proj(inputs_TH)


def carve(
    layer: LlamaDecoderLayer, inputs_TH: torch.Tensor, shape: Shape, steps: int = 10
) -> tuple[Carving, torch.Tensor]:
    """Carves a layer by what its neurons do for these inputs of its feed-forward part.

    Returns the carving, whose router knows nothing yet, and the expert [T, B] that keeps most of each token in each
    block. What a neuron does for a token is the squared length of its contribution, as a share of all neurons'.
    """
    energy_TN = neurons(layer.mlp, inputs_TH).square() * layer.mlp.down_proj.weight.square().sum(0)
    energy_TN /= energy_TN.sum(1, keepdim=True)
    order_N = energy_TN.mean(0).argsort(descending=True)
    shared_ids_S, routed = order_N[: shape.shared], order_N[shape.shared :]
    ids, best = [], []
    for block in routed.unflatten(0, (-1, shape.blocks)).T:  # each block has some of the most used neurons
        members_JM, best_T = clusters(energy_TN[:, block], shape.experts_per_block, shape.width, steps)
        ids.append(block[members_JM])
        best.append(best_T + len(best) * shape.experts_per_block)
    expert_ids_EM = torch.cat(ids)
    carving = Carving(
        shared_ids_S=shared_ids_S,
        shared_scale_S=torch.ones(shape.shared),
        expert_ids_EM=expert_ids_EM,
        expert_scale_EM=torch.ones(expert_ids_EM.shape),
        router_EH=torch.zeros(shape.num_experts, inputs_TH.shape[1]),
        norm_H=layer.post_attention_layernorm.weight.clone(),
    )
    return carving, torch.stack(best, dim=1)


def clusters(energy_TN: torch.Tensor, experts: int, width: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the neurons of each expert [experts, width] and the best expert of each token [T].

    In turns, as in k-means: each token takes the expert that keeps most of it, and each expert takes the neurons that
    matter most to its tokens. An expert that no token takes begins again from the token that is kept worst.
    """
    firsts = torch.linspace(0, len(energy_TN) - 1, experts).long()
    sums_JN = energy_TN[firsts]
    for _ in range(steps):
        members_JM = sums_JN.topk(width).indices
        kept_TJ = energy_TN @ torch.zeros_like(sums_JN).scatter(1, members_JM, 1.0).T
        best_T = kept_TJ.argmax(1)
        sums_JN = one_hot(best_T, experts).T.to(energy_TN.dtype) @ energy_TN
        empty = (sums_JN.sum(1) == 0).nonzero().flatten()
        worst = (energy_TN.sum(1) - kept_TJ.amax(1)).topk(max(1, len(empty))).indices
        sums_JN[empty] = energy_TN[worst[: len(empty)]]
    return members_JM, best_T


class CarvedFeedForward(torch.nn.Module):
    """A carved layer as it trains: the dense layer, whose neurons count as often as a token's experts hold them.

    It gives what Qwen2-MoE's layer gives whose weights `moe_weights` returns. Gradients reach the router by the weights
    of the experts that it chose.

    Attributes:
        imbalance: of the last tokens, 1 where all experts are chosen alike, more otherwise: the auxiliary loss of
            Switch Transformers. Without it in the loss a router ends with a few experts that suit every token.
    """

    def __init__(self, dense: LlamaMLP, carving: Carving, top_k: int):
        super().__init__()
        self.dense, self.top_k = dense.requires_grad_(False), top_k
        self.shared_ids_S, self.expert_ids_EM = carving.shared_ids_S, carving.expert_ids_EM
        self.router_EH = torch.nn.Parameter(carving.router_EH)
        self.shared_scale_S = torch.nn.Parameter(carving.shared_scale_S)
        self.expert_scale_EM = torch.nn.Parameter(carving.expert_scale_EM)
        self.imbalance = torch.tensor(1.0)

    def trained(self) -> list[torch.nn.Parameter]:
        return [self.router_EH, self.shared_scale_S, self.expert_scale_EM]

    def carving(self, norm_H: torch.Tensor) -> Carving:
        """Returns what it has learned."""
        router, shared_scale, expert_scale = (parameter.detach() for parameter in self.trained())
        return Carving(self.shared_ids_S, shared_scale, self.expert_ids_EM, expert_scale, router, norm_H.detach())

    def route(self, inputs_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns weights that add up to the top-k, and ids [..., K], in the router's order."""
        with torch.autocast("cpu", enabled=False):  # bfloat16 would make equals of experts that are close
            logits = linear(inputs_TH.float(), self.router_EH)
        shares_TE = softmax(logits, dim=-1)
        weights, ids = shares_TE.topk(self.top_k)
        num_experts = len(self.router_EH)
        chosen_E = torch.bincount(ids.flatten(), minlength=num_experts) / ids.numel()
        self.imbalance = num_experts * (chosen_E * shares_TE.flatten(0, -2).mean(0)).sum()
        return self.top_k * weights / weights.sum(-1, keepdim=True), ids

    def shares(self, inputs_TH: torch.Tensor) -> torch.Tensor:
        """Returns how often each neuron counts [..., N]: once in the dense layer."""
        weights, ids = self.route(inputs_TH)
        num_experts, num_neurons = len(self.router_EH), self.dense.gate_proj.out_features
        weight_TE = weights.new_zeros(*weights.shape[:-1], num_experts).scatter(-1, ids, weights)
        scale_EN = weights.new_zeros(num_experts, num_neurons).scatter(1, self.expert_ids_EM, self.expert_scale_EM)
        shared_N = weights.new_zeros(num_neurons).scatter(0, self.shared_ids_S, self.shared_scale_S)
        return weight_TE @ scale_EN + shared_N

    def forward(self, inputs_TH: torch.Tensor) -> torch.Tensor:
        hidden_TN = neurons(self.dense, inputs_TH)
        return self.dense.down_proj(hidden_TN * self.shares(inputs_TH).to(hidden_TN.dtype))

    def error(self, inputs_TH: torch.Tensor) -> torch.Tensor:
        """Returns the squared distance from what the dense layer gives, relative to that, as a mean over tokens."""
        with torch.no_grad():
            hidden_TN = neurons(self.dense, inputs_TH)
            wanted_TH = self.dense.down_proj(hidden_TN)
        missing_TH = self.dense.down_proj(hidden_TN * (self.shares(inputs_TH) - 1).to(hidden_TN.dtype))
        return (missing_TH.float().square().sum(1) / wanted_TH.float().square().sum(1)).mean()


def moe_weights(dense: LlamaMLP, carving: Carving, top_k: int) -> dict[str, torch.Tensor]:
    """Returns the weights of Qwen2-MoE's layer, by their names within it.

    Its router's weights add up to 1, where those of `CarvedFeedForward` add up to the top-k, and its shared expert's
    gate, whose weights are 0 here, halves what that expert gives: the down projections make up for both.
    """
    gate, up, down = (dense.gate_proj.weight, dense.up_proj.weight, dense.down_proj.weight)

    def expert(name: str, ids_M: torch.Tensor, scale_M: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            f"{name}.gate_proj.weight": gate[ids_M],
            f"{name}.up_proj.weight": up[ids_M],
            f"{name}.down_proj.weight": down[:, ids_M] * scale_M,
        }

    weights = {"gate.weight": carving.router_EH, "shared_expert_gate.weight": torch.zeros(1, gate.shape[1])}
    weights |= expert("shared_expert", carving.shared_ids_S, 2 * carving.shared_scale_S)
    for number, (ids_M, scale_M) in enumerate(zip(carving.expert_ids_EM, carving.expert_scale_EM, strict=True)):
        weights |= expert(f"experts.{number}", ids_M, top_k * scale_M)
    return weights

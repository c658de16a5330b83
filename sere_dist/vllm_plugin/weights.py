"""What a checkpoint's tensors go through on their way into vLLM."""

import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from sere_dist.artifact.placement import Placement
from sere_dist.artifact.reference import MATRIX
from sere_dist.moe import layer_index

Weights = Iterable[tuple[str, torch.Tensor]]

EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")  # a tensor of one expert, by its id
EXPERTS = re.compile(r"\.experts\.[a-z]")  # a tensor of all experts of a layer, [E, ...]
ROUTER = re.compile(r"\.(gate|router)\.(weight|bias|e_score_correction_bias)$")  # [E, ...]


@contextmanager
def checkpoint_weights(placement: Placement | None) -> Generator[None]:
    """Has vLLM's loader of checkpoints leave out the matrices of the reference implementation, and place experts.

    Raises:
        ValueError: on leaving: not every router and expert came by to be placed.
    """
    original = DefaultModelLoader.get_all_weights
    placed = None if placement is None else PlacedWeights(placement)

    def get_all_weights(self, model_config, model):
        weights = ((n, t) for n, t in original(self, model_config, model) if not n.endswith(MATRIX))
        return weights if placed is None else placed(weights)

    DefaultModelLoader.get_all_weights = get_all_weights
    try:
        yield
    finally:
        DefaultModelLoader.get_all_weights = original
    if placed is not None:
        placed.check()


class PlacedWeights:
    """Permutes a model's experts and router rows, so that vLLM's linear placement is the placement that was asked for.

    What the model calls expert p is then the checkpoint's expert `placement.order(layer)[p]`.
    """

    def __init__(self, placement: Placement):
        self.order = placement.orders()
        self.position = {layer: order.argsort().tolist() for layer, order in self.order.items()}
        self.routers: set[int] = set()  # layers whose router was permuted
        self.experts: dict[int, set[int]] = {layer: set() for layer in self.order}  # and the experts that were

    def __call__(self, weights: Weights) -> Weights:
        for name, tensor in weights:
            layer = layer_index(name) if ".layers." in name else None
            if layer in self.order:
                name, tensor = self._placed(layer, name, tensor)
            yield name, tensor

    def _placed(self, layer: int, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        order = self.order[layer]
        if match := EXPERT.search(name):
            expert = int(match[0])
            self.experts[layer].add(expert)
            return EXPERT.sub(str(self.position[layer][expert]), name), tensor
        is_router = bool(ROUTER.search(name))
        if (is_router or EXPERTS.search(name)) and len(tensor) == len(order):
            if is_router:
                self.routers.add(layer)
            else:
                self.experts[layer].update(order.tolist())
            return name, tensor[order.to(tensor.device)]
        return name, tensor

    def check(self) -> None:
        """Raises ValueError if not every router and expert of every layer came by."""
        for layer, order in self.order.items():
            if layer not in self.routers or len(self.experts[layer]) != len(order):
                raise ValueError(
                    f"layer {layer}: the checkpoint's tensors do not show its router and {len(order)} experts by names "
                    "that sere_dist knows, so they can't be placed: remove 'placement', or load_format if it is set"
                )

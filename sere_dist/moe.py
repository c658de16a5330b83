"""What the rest of the package knows of a Mixture-of-Experts model in transformers.

transformers gives the routed experts of every family one interface: a module with `num_experts` that is called with
`(hidden_states [N, H], top_k_index [N, K], top_k_weights [N, K])`. Everything here goes through it, so no model file is
copied and no family is special. Shape suffixes: N tokens, H hidden size, K experts per token, E experts.
"""

import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

# Names that the families' configurations use. Most map to the first by transformers' attribute_map.
NUM_EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "top_k_experts")
# Of the module beside the experts whose output, or the first of its outputs, is the router's logits [N, E].
ROUTER_NAMES = ("gate", "router")


class RoutedExperts(Protocol):
    """transformers' interface of a layer's routed experts, which is a torch module."""

    num_experts: int

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def register_forward_pre_hook(self, hook: Callable) -> RemovableHandle: ...


@dataclass(frozen=True)
class MoeShape:
    """What an artifact and the model that it is used with must have in common."""

    architecture: str
    num_layers: int  # decoder layers, dense ones included
    hidden_size: int
    num_experts: int  # routed experts a layer
    num_experts_per_token: int

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "MoeShape":
        """Reads the shape from a model's configuration.

        Raises:
            ValueError: the configuration names no routed experts.
        """
        text = config.get_text_config()

        def first(names: tuple[str, ...]) -> int:
            value = next((getattr(text, name) for name in names if getattr(text, name, None)), None)
            if value is None:
                raise ValueError(
                    f"{text.model_type} has no routed experts: its configuration sets none of {', '.join(names)}. "
                    "Re-routing needs a Mixture-of-Experts model."
                )
            return value

        architectures = config.architectures or [type(config).__name__.removesuffix("Config")]
        return cls(
            architecture=architectures[0],
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            num_experts=first(NUM_EXPERTS_NAMES),
            num_experts_per_token=first(TOP_K_NAMES),
        )


def layer_index(name: str) -> int:
    """Returns the decoder layer in a module name: `model.layers.3.mlp.experts` is in layer 3."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    if match is None:
        raise ValueError(f"no decoder layer index in the module name {name!r}")
    return int(match[1])


def by_layer(modules: Iterable[tuple[str, Any]]) -> dict[int, tuple[str, Any]]:
    """Returns the named modules by decoder layer index.

    Raises:
        ValueError: two are in one layer: an artifact has room for one set of experts a layer.
    """
    found: dict[int, tuple[str, Any]] = {}
    for name, module in modules:
        layer = layer_index(name)
        if layer in found:
            raise ValueError(f"layer {layer} has several sets of routed experts: {found[layer][0]} and {name}")
        found[layer] = (name, module)
    return dict(sorted(found.items()))


def routed_experts(model: PreTrainedModel) -> dict[int, tuple[str, RoutedExperts]]:
    """Returns the routed-experts module of each MoE layer, with its name, by decoder layer index.

    Raises:
        ValueError: the model has none, or several in one layer.
    """
    found = by_layer(
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "num_experts")
    )
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no routed experts: no module uses transformers' experts interface "
            "(transformers.integrations.moe.use_experts_implementation)"
        )
    return found


def decoder_layers(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """Returns the list of decoder layers, dense ones included, and its name."""
    name = next(iter(routed_experts(model).values()))[0]
    stack = name.partition(".layers.")[0] + ".layers"
    layers = model.get_submodule(stack)
    assert isinstance(layers, torch.nn.ModuleList)
    return stack, layers


Routing = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden_states_NH, top_k_index_NK, top_k_weights_NK


@contextmanager
def hooked_experts(model: PreTrainedModel, hook: Callable[[int, Routing], Routing | None]) -> Generator[None]:
    """Calls `hook(layer, (hidden_states, top_k_index, top_k_weights))` before each MoE layer's experts run.

    What the hook returns, if anything, replaces the three.
    """

    def before_experts(layer: int) -> Callable:
        return lambda _module, arguments: hook(layer, arguments)

    with ExitStack() as stack:
        for layer, (_name, experts) in routed_experts(model).items():
            stack.enter_context(experts.register_forward_pre_hook(before_experts(layer)))
        yield


@contextmanager
def hooked_routing(
    model: PreTrainedModel, hook: Callable[[int, Routing, torch.Tensor | None], Routing | None]
) -> Generator[None]:
    """Like `hooked_experts`, for a hook that also gets what `router_scores` says of the layer's router.

    That is None, too, where no router is found beside the experts.
    """
    logits: dict[int, torch.Tensor] = {}

    def after_router(layer: int) -> Callable[[torch.nn.Module, tuple, torch.Tensor | tuple], None]:
        def keep(_module: torch.nn.Module, _arguments: tuple, output: torch.Tensor | tuple) -> None:
            logits[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    def before_experts(layer: int, routing: Routing) -> Routing | None:
        _, *index_and_weights = routing
        return hook(layer, routing, router_scores(logits.pop(layer), *index_and_weights) if layer in logits else None)

    with ExitStack() as stack:
        for layer, (name, _experts) in routed_experts(model).items():
            beside = dict(model.get_submodule(name.rpartition(".")[0]).named_children())
            for router in (beside[name] for name in ROUTER_NAMES if name in beside):
                stack.enter_context(router.register_forward_hook(after_router(layer)))
        stack.enter_context(hooked_experts(model, before_experts))
        yield


def router_scores(
    logits_NE: torch.Tensor, top_k_index_NK: torch.Tensor, top_k_weights_NK: torch.Tensor
) -> torch.Tensor | None:
    """Returns the router's score of every expert [N, E], float32, in proportion to the weights of the chosen ones.

    Families score by softmax or by sigmoid of the logits, and scale the weights in their own ways: it is the one that
    agrees with the weights. None: neither does.
    """
    shares_NK = top_k_weights_NK.float() / top_k_weights_NK.float().sum(dim=1, keepdim=True)
    for scores_NE in (logits_NE.float().softmax(dim=1), logits_NE.float().sigmoid()):
        chosen_NK = scores_NE.gather(1, top_k_index_NK.long())
        if torch.allclose(chosen_NK / chosen_NK.sum(dim=1, keepdim=True), shares_NK, atol=1e-3):
            return scores_NE
    return None


@torch.no_grad()
def expert_outputs(experts: RoutedExperts, hidden_states_NH: torch.Tensor, which: range | None = None) -> torch.Tensor:
    """Returns [E, N, H]: the output of every expert of one layer, or of those in `which`, on every token."""
    which = range(experts.num_experts) if which is None else which
    weights_N1 = hidden_states_NH.new_ones(len(hidden_states_NH), 1)
    outputs_ENH = hidden_states_NH.new_empty(len(which), *hidden_states_NH.shape)
    for output_NH, expert in zip(outputs_ENH, which, strict=True):
        output_NH.copy_(experts(hidden_states_NH, torch.full_like(weights_N1, expert, dtype=torch.long), weights_N1))
    return outputs_ENH


def load_model(
    name: str, device: str, dtype: torch.dtype | Literal["auto"] = torch.float32, revision: str | None = None
) -> PreTrainedModel:
    """Returns a whole model, ready to run; `auto` is the checkpoint's own dtype."""
    return (
        AutoModelForCausalLM.from_pretrained(name, dtype=dtype, revision=revision, trust_remote_code=False)
        .to(device)
        .eval()
    )

"""The MoE layers of a model that vLLM has loaded, and the settings and counters of each."""

import torch
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from sere_dist.artifact.folder import Artifact
from sere_dist.config import ReroutingConfig
from sere_dist.method.counters import named
from sere_dist.moe import by_layer


def rerouted_layers(model: torch.nn.Module, artifact: Artifact, is_placed: bool = False) -> dict[int, MoERunner]:
    """Returns what runs every MoE layer of a loaded model, or of one stage of its pipeline, by decoder layer index.

    Raises:
        ValueError: a layer can't be re-routed, or the artifact's layers are not the model's.
    """
    found = by_layer((name, module) for name, module in model.named_modules() if isinstance(module, MoERunner))
    runners = {layer: runner for layer, (_name, runner) in found.items()}
    for layer, runner in runners.items():
        if not isinstance(runner.router, BaseRouter):
            raise ValueError(f"layer {layer} routes through {type(runner.router).__name__}, not vLLM's BaseRouter")
        if is_placed and getattr(runner.router, "num_expert_group", None) not in (None, 0, 1):
            raise ValueError(
                f"layer {layer} routes within groups of experts, which can't be placed: remove 'placement'"
            )
        if runner.do_naive_dispatch_combine:
            raise ValueError(
                f"layer {layer} routes the gathered tokens of all ranks, which can't be re-routed: use weights "
                "that are not quantised, another moe_backend, or data_parallel_size=1"
            )
    if runners.keys() != artifact.layers.keys():
        raise ValueError(
            f"the model's MoE layers are {sorted(runners)}, the artifact has {sorted(artifact.layers)}: "
            "calibrate this model"
        )
    return runners


def scaled(settings: ReroutingConfig, scale: float) -> ReroutingConfig:
    """Returns settings for a layer whose experts' output vLLM multiplies by `scale`, beyond the router's weights.

    Prices are in the unit of (w w) size, w being all that an expert's output is multiplied by, as in transformers.
    """
    names = ("expert_price", "traffic_price", "balance_price")
    prices = {name: getattr(settings, name) / scale**2 for name in names}
    return settings.model_copy(update=prices)


def counters_of(totals: list[int], runner: MoERunner) -> dict[str, float]:
    """Returns a layer's counters (`counters.COUNTERS`) by name, the estimated error in the unit of the user's prices.

    That undoes `scaled`: the layer counts its error in the unit of the weights that vLLM's router hands out.
    """
    counters = named(totals)
    counters["estimated_error"] *= runner.routed_scaling_factor**2
    return counters


def settings_by_layer(
    settings: ReroutingConfig, artifact: Artifact, runners: dict[int, MoERunner]
) -> dict[int, ReroutingConfig]:
    """Returns the settings of every layer, in the units of what vLLM's router hands out."""
    of_layers = artifact.settings_by_layer(settings)
    return {layer: scaled(own, runners[layer].routed_scaling_factor) for layer, own in of_layers.items()}

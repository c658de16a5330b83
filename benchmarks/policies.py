"""The policies that the decode benchmarks time, and how one engine changes between them.

What compiled code or CUDA graphs hold can't be taken out again. So it is an eager engine on a CPU that can follow any
policy; elsewhere an engine follows the one that it was started with, and changes its numbers only.
"""

import time
import types
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

Kind = Literal["stock", "paper", "projection", "price", "top-k", "OEA"]
REROUTED: dict[Kind, str] = {
    "paper": "sere",
    "projection": "projection",
    "price": "projection",
}  # `policy` of the plugin


@dataclass(frozen=True)
class Setting:
    """A policy and its number: S, or an expert's price (S = 1 then), or a smaller top-k. Stock vLLM has none."""

    kind: Kind
    number: float = 0
    is_off: bool = False  # S = K

    def __str__(self) -> str:
        names = {"stock": "stock", "paper": f"S = {self.number:g}", "projection": f"projection, S = {self.number:g}"}
        names |= {"price": f"expert_price {self.number:g}", "top-k": f"top-{self.number:g}"}
        return names.get(self.kind, f"OEA, S = {self.number:g}") + " (off)" * self.is_off

    @property
    def changes(self) -> dict[str, Any]:
        """Settings of the plugin, without the policy."""
        if self.kind == "price":
            return {"select_top_k": 1, "expert_price": self.number}
        return {"select_top_k": int(self.number), "expert_price": 0.0}


def follow(worker: Any, kind: Kind, number: float, artifacts: dict[str, str]) -> None:
    """In the worker of an eager engine on a CPU: has its routers follow a policy from the next step on.

    What the policy itself takes is kept for `rerouting_seconds`.

    Args:
        artifacts: the artifact of each policy of the plugin.
    """
    from sere_dist.artifact.folder import Artifact
    from sere_dist.vllm_plugin.cpu_backend import CpuBackend

    own, setting = worker.worker, Setting(kind, number)
    if not hasattr(own, "policies"):
        own.policies, own.rerouting_seconds = {}, []
    for runner in own.sere_runners.values():
        vars(runner.router).pop("_compute_routing", None)
    if setting.kind in REROUTED:
        policy = REROUTED[setting.kind]
        if policy not in own.policies:
            artifact = Artifact.load(artifacts[policy])
            config = own.sere_config.model_copy(update={"policy": policy})
            backend = CpuBackend(artifact, own.sere_rows, config, None, merges=False, shares_primary=False)
            timed = partial(_timed, own.rerouting_seconds, backend.reroute)
            backend.reroute = timed  # ty: ignore[invalid-assignment]  # the same function, timed
            own.policies[policy] = artifact, config, backend
        own.sere_artifact, config, own.sere_backend = own.policies[policy]
        own.sere_layers = {
            layer: own.sere_backend.attach(runner.router, layer) for layer, runner in own.sere_runners.items()
        }
        own._apply_settings(config.model_copy(update=setting.changes))
    elif setting.kind != "stock":
        for layer, runner in own.sere_runners.items():
            choose = partial(_timed, own.rerouting_seconds, partial(_rival, own.sere_rows, setting, layer))
            _replace_choice(runner.router, choose)


def _replace_choice(router: Any, choose: Any) -> None:
    """Like the plugin's `replace_choice`, for policies that ask for the score of every expert too."""
    compute_routing = type(router)._compute_routing

    def replaced(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        weights, ids = compute_routing(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
        return choose(weights, ids, router_logits)

    router._compute_routing = types.MethodType(replaced, router)


def _rival(
    rows: Any, setting: Setting, layer: int, weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a policy of the field makes of a router's choice, in steps of decode rows alone."""
    from sere_dist.evaluation.rivals import oea_rerouter, top_k_rerouter
    from sere_dist.method.records import Step
    from sere_dist.method.slots import fill_dropped

    if rows.count[1] != len(ids):
        return weights, ids
    scores = logits.float().softmax(-1)[None] if setting.kind == "OEA" else None
    rerouter = {"top-k": top_k_rerouter, "OEA": oea_rerouter}[setting.kind](int(setting.number), renormalise=True)
    new_weights, new_ids = rerouter(layer, weights[None], ids[None], scores)
    return new_weights[0].to(weights.dtype), fill_dropped(Step(weights, ids), new_ids[0])


def _timed(seconds: list[float], function: Any, *arguments: Any) -> Any:
    started = time.perf_counter()
    found = function(*arguments)
    seconds.append(time.perf_counter() - started)
    return found


def rerouting_seconds(worker: Any) -> float:
    """In the worker: returns the seconds that a step spent on re-routing since the last call, in the mean."""
    own = worker.worker
    seconds, layers = own.rerouting_seconds, len(own.sere_runners)
    total, steps = sum(seconds), len(seconds) / layers
    seconds.clear()
    return total / steps if steps else 0.0

"""The vLLM plugin, worker half: replaces what the routers of a loaded model return, and counts what that did.

Re-routing sits where vLLM's routers hand out logical expert ids: `BaseRouter._compute_routing`, before routed-expert
capture and EPLB's mapping. It runs behind a registered custom op, whose every input is a tensor: `torch.compile` traces
straight through the CPU router, and anything that Python looked at there would be baked in. So what may change between
steps lives in tensors that the op reads: the policy, which rows are valid, the counters.
"""

import types
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from sere_dist.artifact import Artifact
from sere_dist.config import ReroutingConfig
from sere_dist.moe import by_layer
from sere_dist.rerouting import COUNTERS, reroute, step_counts

logger = init_logger(__name__)

# What `sere_policy` may change in a running engine.
CHANGEABLE = ("enabled", "rows", "select_top_k", "threshold")

_library = torch.library.Library("sere_dist", "DEF")


def _reroute_step(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    similarity: torch.Tensor,
    policy: torch.Tensor,
    valid_rows: torch.Tensor,
    num_rows: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """Re-routes one layer of one step; see `StepState` for the arguments. Returns new ids, never an alias."""
    rows = int(num_rows)
    valid_T = valid_rows[: len(topk_ids)]
    if rows == 0 or not valid_T.any():  # a profiling or dummy run, or a step of prefill only
        return topk_ids.clone()
    if rows != len(topk_ids):
        raise RuntimeError(
            f"the router got {len(topk_ids)} rows in a step of {rows} tokens: their re-routing masks do not line up"
        )
    enabled, select_top_k, threshold = policy.tolist()
    select_top_k = int(select_top_k) if enabled else 0
    new_ids = reroute(
        topk_weights, topk_ids, similarity, select_top_k=select_top_k, threshold=threshold, valid_T=valid_T
    )
    counters += step_counts(
        topk_weights, topk_ids, new_ids, select_top_k=select_top_k, num_experts=len(similarity), valid_T=valid_T
    )
    return new_ids


def _reroute_step_fake(topk_weights, topk_ids, similarity, policy, valid_rows, num_rows, counters) -> torch.Tensor:
    return torch.empty_like(topk_ids)


direct_register_custom_op(
    "reroute", _reroute_step, mutates_args=["counters"], fake_impl=_reroute_step_fake, target_lib=_library
)


class StepState:
    """What the re-routing of a step reads, shared by all layers of a worker.

    Attributes:
        policy: float32 [3]: 1 when on, S, rho.
        valid_rows: bool [most tokens of a step]: the rows that re-routing may change and that vote.
        num_rows: int64 [1]: rows of the step; 0 in profiling and dummy runs, which re-route nothing.
    """

    def __init__(self, max_tokens: int, settings: ReroutingConfig):
        self.policy = torch.zeros(3)
        self.valid_rows = torch.zeros(max_tokens, dtype=torch.bool)
        self.num_rows = torch.zeros(1, dtype=torch.int64)
        self.set_policy(settings)

    def set_policy(self, settings: ReroutingConfig) -> None:
        self.settings = settings
        self.policy.copy_(torch.tensor([settings.enabled, settings.select_top_k, settings.threshold]))

    def follow(self, runner: GPUModelRunner) -> None:
        """Keeps the state in step with the runner's batch from now on."""
        prepare_inputs, dummy_run = runner._prepare_inputs, runner._dummy_run

        def prepare(scheduler_output, num_scheduled_tokens: np.ndarray):
            prepared = prepare_inputs(scheduler_output, num_scheduled_tokens)
            batch, num_requests = runner.input_batch, runner.input_batch.num_reqs
            # A row decodes if its request's prompt was computed before this step.
            valid = batch.num_computed_tokens_cpu[:num_requests] >= batch.num_prompt_tokens[:num_requests]
            if self.settings.rows == "all":
                valid = np.ones_like(valid)
            rows = np.repeat(valid, num_scheduled_tokens)
            self.num_rows.fill_(len(rows))
            self.valid_rows[: len(rows)] = torch.from_numpy(rows)
            self.valid_rows[len(rows) :] = False
            return prepared

        def dummy(*args, **kwargs):
            self.num_rows.fill_(0)
            self.valid_rows.fill_(False)
            return dummy_run(*args, **kwargs)

        runner._prepare_inputs, runner._dummy_run = prepare, dummy


def rerouted_layers(model: torch.nn.Module, artifact: Artifact) -> dict[int, BaseRouter]:
    """Returns the router of every MoE layer of a loaded model, by decoder layer index.

    Raises:
        ValueError: a layer can't be re-routed, or the artifact's layers are not the model's.
    """
    found = by_layer((name, module) for name, module in model.named_modules() if isinstance(module, MoERunner))
    runners = {layer: runner for layer, (_name, runner) in found.items()}
    for layer, runner in runners.items():
        if runner.is_monolithic:
            raise ValueError(
                f"layer {layer} routes inside a monolithic kernel, which can't be re-routed: use weights that are not "
                "quantised, or another moe_backend"
            )
        if not isinstance(runner.router, BaseRouter):
            raise ValueError(f"layer {layer} routes through {type(runner.router).__name__}, not vLLM's BaseRouter")
    if runners.keys() != artifact.similarity.keys():
        raise ValueError(
            f"the model's MoE layers are {sorted(runners)}, the artifact has {sorted(artifact.similarity)}: "
            "calibrate this model"
        )
    return {layer: runner.router for layer, runner in runners.items()}


def attach(router: BaseRouter, similarity_EE: torch.Tensor, state: StepState) -> torch.Tensor:
    """Makes one router return re-routed ids from now on. Returns its counters, int64 [len(COUNTERS)]."""
    counters = torch.zeros(len(COUNTERS), dtype=torch.int64)
    compute_routing = type(router)._compute_routing
    # Plain tensor attributes: torch.compile takes them as inputs of the graph, whichever layer it compiles.
    router.sere_similarity, router.sere_counters = similarity_EE, counters
    router.sere_policy, router.sere_valid_rows, router.sere_num_rows = state.policy, state.valid_rows, state.num_rows

    def rerouted(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        weights, ids = compute_routing(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
        ids = torch.ops.sere_dist.reroute(
            weights,
            ids,
            self.sere_similarity,
            self.sere_policy,
            self.sere_valid_rows,
            self.sere_num_rows,
            self.sere_counters,
        )
        return weights, ids

    router._compute_routing = types.MethodType(rerouted, router)
    return counters


class ReroutingCPUWorker(CPUWorker):
    """vLLM's CPU worker, re-routing. Its `sere_` methods answer `LLM.collective_rpc`."""

    def load_model(self, **kwargs) -> None:
        super().load_model(**kwargs)
        settings = ReroutingConfig.model_validate(self.vllm_config.additional_config["sere"])
        artifact = Artifact.load(settings.artifact)
        routers = rerouted_layers(self.model_runner.get_model(), artifact)
        self.sere_state = StepState(self.scheduler_config.max_num_batched_tokens, settings)
        self.sere_state.follow(self.model_runner)
        self.sere_layers = {
            layer: attach(router, artifact.similarity[layer], self.sere_state) for layer, router in routers.items()
        }
        logger.info(
            "sere_dist re-routes %d MoE layers: select_top_k %d of %d, threshold %g, %s rows",
            len(routers),
            settings.select_top_k,
            artifact.config.num_experts_per_token,
            settings.threshold,
            settings.rows,
        )
        self.sere_top_k = artifact.config.num_experts_per_token

    def sere_counters(self, reset: bool = False) -> dict[str, Any]:
        """Returns the counters of every layer of this worker, and sets them to 0 if asked to."""
        layers = {
            layer: dict(zip(COUNTERS, counters.tolist(), strict=True)) for layer, counters in self.sere_layers.items()
        }
        if reset:
            for counters in self.sere_layers.values():
                counters.zero_()
        return {"rank": self.rank, "layers": layers}

    def sere_policy(self, **changes: Any) -> dict[str, Any]:
        """Changes the policy from the next step on, if anything is given, and returns what is in force.

        Raises:
            ValueError: a value is out of range, or can't be changed in a running engine; nothing was changed.
        """
        if fixed := changes.keys() - CHANGEABLE:
            raise ValueError(f"{', '.join(sorted(fixed))} can't be changed while serving; {', '.join(CHANGEABLE)} can")
        settings = ReroutingConfig.model_validate({**self.sere_state.settings.model_dump(), **changes})
        settings.check_top_k(self.sere_top_k)
        self.sere_state.set_policy(settings)
        return settings.model_dump(mode="json")

"""The vLLM plugin, worker half: what re-routing adds to a worker of vLLM.

Re-routing sits where vLLM's routers hand out logical expert ids: `BaseRouter._compute_routing`, before routed-expert
capture and EPLB's mapping.

This module imports neither of vLLM's workers. Importing vLLM's CPU worker replaces parts of `torch.cuda` in the whole
process, so `cpu_worker` and `gpu_worker` are modules of their own, and a GPU process never imports the first.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from vllm.distributed.parallel_state import get_ep_group, get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from sere_dist.artifact.placement import Placement
from sere_dist.config import ReroutingConfig
from sere_dist.method.counters import COUNTERS, dispatch_bytes
from sere_dist.vllm_plugin.agreement import check_agreement, what_must_agree
from sere_dist.vllm_plugin.backend import Backend, shares_primary
from sere_dist.vllm_plugin.draft_model import DraftModel
from sere_dist.vllm_plugin.engine_settings import artifact_of, returns_routed_experts, settings_of
from sere_dist.vllm_plugin.expert_kernels import merges_repeats
from sere_dist.vllm_plugin.expert_map import ExpertMap
from sere_dist.vllm_plugin.layers import counters_of, rerouted_layers, settings_by_layer
from sere_dist.vllm_plugin.rows import Rows
from sere_dist.vllm_plugin.shadow import Shadow
from sere_dist.vllm_plugin.speculation import Speculation, VerifyingSteps
from sere_dist.vllm_plugin.weights import checkpoint_weights

if TYPE_CHECKING:  # vLLM's CPU worker is one, too
    from vllm.v1.worker.gpu_worker import Worker
else:
    Worker = object

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name


class Rerouting(Worker):
    """Goes before a worker class of vLLM. Its `sere_` methods answer `LLM.collective_rpc`."""

    sere_backend_class: type[Backend]

    def load_model(self, **kwargs) -> None:
        additional = self.vllm_config.additional_config
        assert isinstance(additional, dict)  # the front end has put the settings there
        settings = settings_of(additional["sere"])
        served = self.vllm_config.model_config
        artifact = artifact_of(settings, served)
        self.sere_placement = placement = None if settings.placement is None else Placement.load(settings.placement)
        draft_artifact, of_draft = None, settings.of_draft()
        speculative = self.vllm_config.speculative_config
        if of_draft is not None:
            assert speculative is not None  # the front end has checked that
            draft_artifact = artifact_of(of_draft, speculative.draft_model_config)
        check_agreement(what_must_agree(settings, artifact, placement, draft_artifact))
        with checkpoint_weights(placement):
            super().load_model(**kwargs)
        assert self.device is not None  # vLLM's worker has set it
        if placement is not None:
            artifact = artifact.in_order(placement.orders())
        artifact = artifact.of_stage(range(*served.get_layers_start_end_indices(self.parallel_config)))
        model = self.model_runner.get_model()
        self.sere_runners = runners = rerouted_layers(model, artifact, is_placed=placement is not None)
        padding = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        speculation, scheduler = None, self.scheduler_config
        if speculative is not None:
            speculation = Speculation(speculative.num_speculative_tokens, bool(scheduler.async_scheduling))
        self.sere_rows = Rows(scheduler.max_num_batched_tokens + padding, self.device, speculation)
        self.sere_rows.follow(self.model_runner)
        self.sere_shadow = None if settings.shadow_share is None else Shadow(self.model_runner, self.sere_rows)
        self.sere_expert_map = None
        if self.parallel_config.enable_expert_parallel and get_ep_group().world_size > 1:
            num_experts = artifact.config.num_experts
            self.sere_expert_map = ExpertMap(runners, num_experts, settings.domain, self.parallel_config, self.device)
        self.sere_artifact = artifact
        self.sere_backend = self.sere_backend_class(
            artifact,
            self.sere_rows,
            settings,
            self.sere_expert_map,
            merges=merges_repeats(runners, returns_ids=returns_routed_experts(self.vllm_config)),
            shares_primary=shares_primary(settings, self.parallel_config),
        )
        routers = {layer: cast(BaseRouter, runner.router) for layer, runner in runners.items()}  # as was checked
        self.sere_layers = {layer: self.sere_backend.attach(router, layer) for layer, router in routers.items()}
        self.sere_verifying = None
        if speculation is not None and self.sere_layers:
            self.sere_verifying = VerifyingSteps(self.sere_layers.values())
        self.sere_draft = None
        if of_draft is not None and draft_artifact is not None and get_pp_group().is_last_rank:  # others don't draft
            proposer = getattr(self.model_runner, "drafter", None)
            self.sere_draft = DraftModel(proposer, draft_artifact, of_draft, self.sere_rows, self.sere_backend)
        self.sere_top_k = artifact.config.num_experts_per_token
        self.sere_seen_rerouting = False
        self._apply_settings(settings)
        what = f"select_top_k {settings.select_top_k} of {self.sere_top_k}, threshold {settings.threshold:g}"
        if settings.policy == "recommended":
            what = f"as recommended {artifact.recommended}"
        logger.info("sere_dist re-routes %d MoE layers: %s, %s rows", len(runners), what, settings.rows)

    def compile_or_warm_up_model(self):
        """Warms up, and forgets it: vLLM's warm-up may look like requests, which must not be counted as served."""
        times = super().compile_or_warm_up_model()
        self.sere_rows.clear()
        self._reset_counters()
        self.sere_seen_rerouting = False
        return times

    def _reset_counters(self) -> None:
        for counters in self.sere_layers.values():
            counters.zero_()
        if self.sere_rows.speculation is not None:
            self.sere_rows.speculation.clear()
        if self.sere_verifying is not None:
            self.sere_verifying.clear()
        if self.sere_draft is not None:
            self.sere_draft.clear()
        if self.sere_shadow is not None:
            self.sere_shadow.clear()

    def reload_weights(self, *args, **kwargs) -> None:
        """Loads weights again, with the experts where the placement has them."""
        if self.sere_placement is not None and kwargs.get("weights_iterator") is not None:
            raise ValueError("weights that don't come from a checkpoint can't be placed: remove 'placement'")
        with checkpoint_weights(self.sere_placement):
            super().reload_weights(*args, **kwargs)

    def execute_model(self, scheduler_output, *args, **kwargs):
        """Runs a step, and stops the engine if vLLM did not go through what re-routing hooked."""
        self.sere_rows.is_of_this_step = False
        if self.sere_expert_map is not None and self.sere_expert_map.is_moving:
            self.sere_expert_map.refresh()
        if self.sere_verifying is not None and scheduler_output.total_num_scheduled_tokens:
            self.sere_verifying.start_step(bool(scheduler_output.scheduled_spec_decode_tokens))
        output = super().execute_model(scheduler_output, *args, **kwargs)
        if self.sere_shadow is not None:
            self.sere_shadow.finish_step()
        if scheduler_output.total_num_scheduled_tokens and not self.sere_rows.is_of_this_step:
            raise RuntimeError(
                "vLLM ran a step without preparing its batch where sere_dist looks: nothing would be re-routed. Use a "
                "tested vLLM release, or remove 'sere' from additional_config"
            )
        if not self.sere_seen_rerouting and self.sere_rows.count[1] > 0:
            for layer, counters in self.sere_layers.items():
                if counters[COUNTERS.index("steps")] == 0:
                    raise RuntimeError(
                        f"layer {layer} chose its experts without asking sere_dist: it would not be re-routed. Use a "
                        "tested vLLM release, or remove 'sere' from additional_config"
                    )
            self.sere_seen_rerouting = True
        return output

    def _apply_settings(self, settings: ReroutingConfig) -> None:
        of_layers = settings_by_layer(settings, self.sere_artifact, self.sere_runners)
        self.sere_config = settings
        self.sere_rows.set_settings(settings)
        self.sere_backend.set_settings(of_layers)
        if self.sere_draft is not None and (of_draft := settings.of_draft()) is not None:
            self.sere_draft.set_settings(of_draft)
        if self.sere_shadow is not None:
            self.sere_shadow.set_settings(settings)

    def sere_counters(self, reset: bool = False) -> dict[str, Any]:
        """Returns the counters of every layer of this worker, and sets them to 0 if asked to.

        With experts on several ranks a layer has `active_experts_by_rank` too: after re-routing, summed over steps. And
        with data-parallel attention `bytes_by_dispatch`, of re-routed rows; see `counters.dispatch_bytes`. With
        speculative decoding the worker has `drafted_tokens` and `accepted_tokens`, by their place in a draft, and every
        layer has `verifying`: what the steps that verify drafts have added to its counters. A draft model that is
        re-routed, too, has counters of its own, `draft_layers`, which count its passes as steps. With a `shadow_share`
        the worker has `shadow`: see `Shadow.totals`.
        """
        expert_map, model = self.sere_expert_map, self.vllm_config.model_config
        assert isinstance(model.dtype, torch.dtype)  # vLLM has resolved its name
        layers: dict[int, dict[str, Any]] = {}
        # One copy from the device for all layers: steps wait for it.
        all_counters = torch.stack(list(self.sere_layers.values())).tolist() if self.sere_layers else []
        for layer, counters in zip(self.sere_layers, all_counters, strict=True):
            totals, by_rank = counters[: len(COUNTERS)], counters[len(COUNTERS) :]
            layers[layer] = counters_of(totals, self.sere_runners[layer])
            if by_rank:
                layers[layer]["active_experts_by_rank"] = by_rank
            if expert_map is not None and expert_map.home is not None and self.sere_config.domain == "rank":
                layers[layer]["bytes_by_dispatch"] = {
                    when: dispatch_bytes(
                        *(layers[layer][name] for name in ("rows", f"remote_domains_{when}", f"remote_slots_{when}")),
                        num_ranks=expert_map.num_ranks,
                        hidden_size=model.get_hidden_size(),
                        element_size=model.dtype.itemsize,
                    )
                    for when in ("before", "after")
                }
        counted: dict[str, Any] = {"layers": layers}
        if (speculation := self.sere_rows.speculation) is not None:
            counted["drafted_tokens"] = speculation.drafted.tolist()
            counted["accepted_tokens"] = speculation.accepted.tolist()
        if self.sere_verifying is not None:
            for layer, totals in zip(layers, self.sere_verifying.totals().tolist(), strict=True):
                layers[layer]["verifying"] = counters_of(totals[: len(COUNTERS)], self.sere_runners[layer])
        if self.sere_draft is not None:
            counted["draft_layers"] = self.sere_draft.counters()
        if self.sere_shadow is not None:
            counted["shadow"] = self.sere_shadow.totals()
        if reset:
            self._reset_counters()
        ranks_before = self.parallel_config.data_parallel_rank * self.parallel_config.world_size
        return {"rank": ranks_before + self.rank} | counted

    def sere_settings(self, **changes: Any) -> dict[str, Any]:
        """Changes the settings from the next step on, if any are given, and returns those in force.

        Raises:
            ValueError: a value is out of range, or can't be changed in a running engine; nothing was changed.
        """
        settings = self.sere_config.changed(changes, self.sere_top_k)
        self._apply_settings(settings)
        return settings.model_dump(mode="json")

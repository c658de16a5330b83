"""Re-routing the experts of the draft model, too, which drafts tokens for the model that is served.

A draft only proposes: accepted tokens follow the served model's distribution, whatever drafts. So re-routing the draft
model costs accepted drafts, not quality.

vLLM runs the draft model over a step's tokens, with one more for every request, and then over one token per request at
a time. Rows of requests whose rows the served model re-routes are re-routed here, too.
"""

from typing import Any, cast

import numpy as np
import torch
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from sere_dist.artifact.folder import Artifact
from sere_dist.config import ReroutingConfig
from sere_dist.vllm_plugin.backend import Backend
from sere_dist.vllm_plugin.expert_kernels import merges_repeats
from sere_dist.vllm_plugin.layers import counters_of, rerouted_layers, settings_by_layer
from sere_dist.vllm_plugin.rows import Rows


class DraftRows(Rows):
    """The rows of a pass of the draft model."""

    def __init__(self, served: Rows):
        """`served`: the rows of the served model's step."""
        super().__init__(2 * len(served.valid), served.valid.device)  # a request has a row or more, and one more here
        self.served = served

    def follow_proposer(self, proposer: Any) -> None:
        """Keeps up with the passes of vLLM's proposer from now on: it asks how to pad each kind of them."""
        pad = proposer._determine_batch_execution_and_padding

        def start_pass(num_tokens, *args, **kwargs):
            padded = pad(num_tokens, *args, **kwargs)
            self.start_pass(num_tokens, num_rows=padded[1])
            return padded

        proposer._determine_batch_execution_and_padding = start_pass

    def start_pass(self, num_tokens: int, num_rows: int) -> None:
        """Marks the rows of a pass over `num_tokens`, which padding makes `num_rows`."""
        requests, scheduled = self.served.requests, self.served.scheduled_tokens
        rows = requests if num_tokens == len(requests) else np.repeat(requests, scheduled + 1)
        if len(rows) != num_tokens:  # a profiling or dummy run
            rows = np.zeros(num_tokens, dtype=bool)
        self.mark(rows, num_rows)


class DraftModel:
    """The draft model's layers, on the backend of the served model's.

    Raises:
        ValueError: this model runner of vLLM has no such proposer, or a layer can't be re-routed.
    """

    def __init__(
        self, proposer: Any, artifact: Artifact, settings: ReroutingConfig, served: Rows, backend: Backend[Any]
    ):
        if not isinstance(proposer, DraftModelProposer):
            raise ValueError(
                f"the draft model runs in {type(proposer).__name__}, where it can't be re-routed: set "
                "VLLM_USE_V2_MODEL_RUNNER=0, or remove 'draft' from the settings of sere_dist"
            )
        self.artifact = artifact
        self.runners = rerouted_layers(proposer.model, artifact)
        rows = DraftRows(served)
        rows.follow_proposer(proposer)
        merges = merges_repeats(self.runners, returns_ids=False)
        self.backend = type(backend)(artifact, rows, settings, None, merges=merges, shares_primary=False)
        routers = {layer: cast(BaseRouter, runner.router) for layer, runner in self.runners.items()}
        self.layers = {layer: self.backend.attach(router, layer) for layer, router in routers.items()}

    def set_settings(self, settings: ReroutingConfig) -> None:
        self.backend.set_settings(settings_by_layer(settings, self.artifact, self.runners))

    def counters(self) -> dict[int, dict[str, float]]:
        """Returns the counters of every layer; a step is a pass."""
        totals = torch.stack(list(self.layers.values())).tolist()
        return {layer: counters_of(own, self.runners[layer]) for layer, own in zip(self.layers, totals, strict=True)}

    def clear(self) -> None:
        """Sets the counters to 0."""
        for counters in self.layers.values():
            counters.zero_()

"""The shadow check: what re-routing changes in the served model's predictions, measured on a share of the steps.

A step that is checked runs twice. The first pass is without re-routing, and of it only the predictions are kept. The
second is the step as it would have been anyway: it writes the same places of the KV cache, and its tokens are sampled.
Both passes read the same cache, so what is measured is the KL divergence that re-routing makes in this step, not what
re-routed earlier steps have left in the cache.

Shape suffixes: T rows of a step, V tokens of the vocabulary.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, override_forward_context

from sere_dist.config import ReroutingConfig
from sere_dist.vllm_plugin import TESTED_VLLM
from sere_dist.vllm_plugin.rows import Rows

BLOCK_ROWS = 32  # rows whose probabilities are in memory at a time: a large vocabulary takes a megabyte per row


class Shadow:
    """Runs a share of a worker's steps a second time, and compares.

    Checked are steps of which every row is the only one of its request, so that no prompt is computed twice, and which
    are re-routed. Of these it takes every n-th, so that all ranks of a tensor-parallel group take the same ones.

    Attributes:
        counted: float64 [2] on the model's device: KL divergence in nats, summed over re-routed rows, and those rows.
            Where another rank has the step's logits, it counts instead.
    """

    def __init__(self, runner: Any, rows: Rows):
        """`runner`: vLLM's model runner, V1.

        Raises:
            ValueError: this model runner has not got what a second pass hooks into.
        """
        if not all(hasattr(runner, name) for name in ("_model_forward", "execute_model_state", "_prepare_inputs")):
            raise ValueError(
                f"shadow_share needs vLLM's model runner V1, as in vLLM {', '.join(TESTED_VLLM)}: set "
                "VLLM_USE_V2_MODEL_RUNNER=0, or remove 'shadow_share' from the settings of sere_dist"
            )
        self.runner, self.rows = runner, rows
        self.counted = torch.zeros(2, dtype=torch.float64, device=rows.valid.device)
        self.share, self.fewest, self.most = 0.0, 1, math.inf
        self._due = 0.0  # steps that are to be checked by now
        self._hidden: torch.Tensor | None = None  # what the first pass of this step came to, before the language head
        forward = runner._model_forward

        def forward_twice(*args, inputs_embeds=None, **kwargs):
            if self._takes_this_step():
                # Layers may add to the embeddings that they are given.
                kept = None if inputs_embeds is None else inputs_embeds.clone()
                # The context counts the layers that have run: the first pass counts in a copy.
                with rows.none_valid(), override_forward_context(copy.copy(get_forward_context())):
                    hidden = forward(*args, inputs_embeds=inputs_embeds, **kwargs)
                self._hidden = hidden[: len(rows.scheduled_tokens)].clone()  # a graph's output is overwritten
                if inputs_embeds is not None:
                    inputs_embeds.copy_(kept)
            return forward(*args, inputs_embeds=inputs_embeds, **kwargs)

        runner._model_forward = forward_twice

    def set_settings(self, settings: ReroutingConfig) -> None:
        self.share = (settings.shadow_share or 0.0) if settings.enabled else 0.0
        self.fewest = max(settings.min_rows, 1)
        self.most = math.inf if settings.max_rows is None else settings.max_rows

    def _takes_this_step(self) -> bool:
        rows = self.rows
        is_rerouted = rows.is_of_this_step and self.fewest <= int(rows.count[1]) <= self.most
        if not is_rerouted or (rows.scheduled_tokens != 1).any():
            return False
        self._due += self.share
        takes = self._due >= 1
        self._due -= takes
        return takes

    @torch.inference_mode()
    def finish_step(self) -> None:
        """Compares the passes of a step that ran twice. Call it after each step, before its tokens are sampled."""
        if self._hidden is None:
            return
        hidden, self._hidden = self._hidden, None
        off_TV = self.runner.model.compute_logits(hidden)  # on every rank: they gather it
        on_TV = self.runner.execute_model_state.logits
        if on_TV is None:
            return
        kl_T = kl_divergence(off_TV, on_TV)
        valid_T = self.rows.valid[: len(kl_T)]
        self.counted += torch.stack([torch.where(valid_T, kl_T, 0.0).sum(dtype=torch.float64), valid_T.sum()])

    def totals(self) -> dict[str, float]:
        """Returns `counted` by names."""
        kl, rows = self.counted.tolist()
        return {"kl": kl, "rows": int(rows)}

    def clear(self) -> None:
        """Sets what was counted to 0."""
        self.counted.zero_()


def kl_divergence(off_TV: torch.Tensor, on_TV: torch.Tensor) -> torch.Tensor:
    """Returns KL(off, on) of the next token for each row, from logits: float32 [T], nats, at least 0."""
    blocks = []
    for off, on in zip(off_TV.split(BLOCK_ROWS), on_TV.split(BLOCK_ROWS), strict=True):
        log_p, log_q = (logits.float().log_softmax(dim=1) for logits in (off, on))
        terms = F.kl_div(log_q, log_p, reduction="none", log_target=True)
        # A token that a model rules out has a logit of -inf in both.
        blocks.append(terms.masked_fill_(log_p.isneginf(), 0.0).sum(dim=1).clamp_(min=0.0))
    return torch.cat(blocks)


def unsupported_features(vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    """Returns, for each feature of vLLM under which a step can't run twice, whether it is on and what to set."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    return [
        (
            model.has_inner_state or model.is_hybrid,
            "a model with recurrent state, which a second pass would advance twice",
        ),
        (parallel.data_parallel_size > 1, "data_parallel_size above 1, as idle ranks would wait for the second pass"),
        (parallel.pipeline_parallel_size > 1, "pipeline_parallel_size above 1"),
        (parallel.enable_eplb, "enable_eplb, which would count the second pass as load"),
        (vllm_config.speculative_config is not None, "speculative_config"),
        (vllm_config.kv_transfer_config is not None, "kv_transfer_config, which may send what the first pass wrote"),
        (vllm_config.use_v2_model_runner, "model runner V2 (VLLM_USE_V2_MODEL_RUNNER=0 chooses V1)"),
    ]

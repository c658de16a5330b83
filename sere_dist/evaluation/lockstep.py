"""Teacher-forced loss as batched decoding has it, in one forward pass.

B sequences run side by side; the tokens at one position form a decode step, and are re-routed together. Attention is
causal, so one forward pass over the whole sequences gives what stepwise decoding would: a later token sees what the
re-routed experts made of the earlier ones. The prompt part is not re-routed, as in serving. (vLLM's own prompt
log-probabilities would show no difference: prefill is not re-routed.)

Shape suffixes: B sequences, L positions, K experts a token, E experts.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sere_dist.moe import Routing, hooked_experts, routed_experts
from sere_dist.rerouting import active_experts, reroute


@dataclass(frozen=True)
class LockstepResult:
    """Loss and active experts over the decode steps of a set of batches."""

    loss_sum: float  # nats
    tokens: int
    active_sum: int  # active experts, summed over steps and layers
    steps: int  # decode steps times MoE layers

    def __add__(self, other: "LockstepResult") -> "LockstepResult":
        return LockstepResult(
            self.loss_sum + other.loss_sum,
            self.tokens + other.tokens,
            self.active_sum + other.active_sum,
            self.steps + other.steps,
        )

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss_sum / self.tokens)

    @property
    def active_experts(self) -> float:
        """Distinct experts that a layer runs in a step, the mean over steps and layers."""
        return self.active_sum / self.steps


@torch.inference_mode()
def lockstep(
    model: PreTrainedModel,
    ids_BL: torch.Tensor,
    *,
    prompt_length: int,
    similarity: dict[int, torch.Tensor] | None = None,
    select_top_k: int = 0,
    threshold: float = 0.0,
) -> LockstepResult:
    """Scores one batch decoded in lockstep.

    Args:
        model: any transformers model with routed experts.
        ids_BL: token ids [B, L].
        prompt_length: positions before this one are prefill: neither re-routed nor scored. The steps are the positions
            from here to L - 2, each predicting the token that follows.
        similarity: decoder layer index -> [E, E]; None: the model as it is.
        select_top_k, threshold: as in `rerouting.reroute`.
    """
    batch, length = ids_BL.shape
    if not 0 < prompt_length < length - 1:
        raise ValueError(f"prompt_length ({prompt_length}) must leave a decode step in sequences of {length} tokens")
    steps = range(prompt_length, length - 1)
    num_experts = {layer: experts.num_experts for layer, (_, experts) in routed_experts(model).items()}
    active = 0

    def route(layer: int, routing: Routing) -> Routing:
        nonlocal active
        hidden_states, top_k_index, top_k_weights = routing
        index_BLK = top_k_index.view(batch, length, -1).clone()
        weights_BLK = top_k_weights.view(batch, length, -1)
        for step in steps:
            if similarity is not None:
                index_BLK[:, step] = reroute(
                    weights_BLK[:, step],
                    index_BLK[:, step],
                    similarity[layer],
                    select_top_k=select_top_k,
                    threshold=threshold,
                )
            everything = torch.ones_like(index_BLK[:, step], dtype=torch.bool)
            active += int(active_experts(index_BLK[:, step], everything, num_experts[layer]).sum())
        return hidden_states, index_BLK.view_as(top_k_index), top_k_weights

    with hooked_experts(model, route):
        logits = model(ids_BL.to(model.device)).logits
    scored = logits[:, prompt_length:-1].float().flatten(0, 1)
    loss = F.cross_entropy(scored, ids_BL[:, prompt_length + 1 :].flatten().to(scored.device), reduction="sum")
    return LockstepResult(float(loss), len(scored), active, len(steps) * len(num_experts))

import math

import pytest
import torch
from transformers import DynamicCache

from sere_dist.artifact import Artifact
from sere_dist.evaluation.lockstep import lockstep
from sere_dist.moe import hooked_experts
from sere_dist.rerouting import reroute

PROMPT = 40


@torch.inference_mode()
def stepwise_loss(model, ids_BL: torch.Tensor, similarity, select_top_k: int) -> tuple[float, float]:
    """Returns loss and active experts of decoding for real: a prefill, then a token of each sequence a step."""
    cache, loss, active, rerouting = DynamicCache(config=model.config), 0.0, [], False

    def route(layer, routing):
        hidden_states, ids, weights = routing
        if not rerouting:
            return None
        ids = reroute(weights, ids, similarity[layer], select_top_k=select_top_k)
        active.append(ids.unique().numel())
        return hidden_states, ids, weights

    with hooked_experts(model, route):
        model(ids_BL[:, :PROMPT], past_key_values=cache)
        rerouting = True
        for step in range(PROMPT, ids_BL.shape[1] - 1):
            logits = model(ids_BL[:, step : step + 1], past_key_values=cache).logits[:, 0]
            loss += float(torch.nn.functional.cross_entropy(logits, ids_BL[:, step + 1], reduction="sum"))
    return loss, sum(active) / len(active)


@pytest.mark.parametrize("select_top_k", [1, 2, 8])
def test_equals_stepwise_decoding(model, heldout_ids, artifact_path, select_top_k):
    similarity = Artifact.load(artifact_path).similarity
    result = lockstep(model, heldout_ids, prompt_length=PROMPT, similarity=similarity, select_top_k=select_top_k)
    loss, active = stepwise_loss(model, heldout_ids, similarity, select_top_k)
    assert result.tokens == 16 * (96 - PROMPT - 1)
    assert math.isclose(result.loss_sum, loss, rel_tol=1e-4)
    # A near tie between two experts may fall either way; it moves the mean by far less than this.
    assert math.isclose(result.active_experts, active, rel_tol=2e-3)


def test_rerouting_shrinks_the_union_and_off_is_the_model(model, heldout_ids, artifact_path):
    similarity = Artifact.load(artifact_path).similarity
    off = lockstep(model, heldout_ids, prompt_length=PROMPT)
    kept_all = lockstep(model, heldout_ids, prompt_length=PROMPT, similarity=similarity, select_top_k=8)
    on = lockstep(model, heldout_ids, prompt_length=PROMPT, similarity=similarity, select_top_k=2)
    assert off == kept_all
    assert on.active_experts < 0.7 * off.active_experts
    assert on.perplexity != off.perplexity


def test_a_prompt_that_leaves_no_step(model, heldout_ids):
    with pytest.raises(ValueError, match="must leave a decode step"):
        lockstep(model, heldout_ids, prompt_length=95)

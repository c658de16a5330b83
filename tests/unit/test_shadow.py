"""The shadow check without an engine: its number, and what it refuses."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from sere_dist.config import ReroutingConfig
from sere_dist.vllm_plugin import shadow
from sere_dist.vllm_plugin.rows import Rows


@pytest.mark.parametrize("rows", [1, shadow.BLOCK_ROWS, 2 * shadow.BLOCK_ROWS + 3])
def test_the_divergence_is_torchs(rows):
    off, on = 3 * torch.randn(2, rows, 50, generator=torch.Generator().manual_seed(rows))
    expected = kl_divergence(Categorical(logits=off), Categorical(logits=on))
    torch.testing.assert_close(shadow.kl_divergence(off, on), expected)
    assert expected.min() > 0.1


def test_tokens_that_are_ruled_out_do_not_count():
    off, on = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = shadow.kl_divergence(off, on)
    ruled_out = torch.full((4, 3), -math.inf)
    both = (torch.cat([logits, ruled_out], dim=1) for logits in (off, on))
    torch.testing.assert_close(shadow.kl_divergence(*both), expected)
    assert torch.equal(shadow.kl_divergence(off, off), torch.zeros(4))


def test_another_model_runner_is_refused():
    with pytest.raises(ValueError, match=r"needs vLLM's model runner V1.*set VLLM_USE_V2_MODEL_RUNNER=0"):
        shadow.Shadow(object(), Rows(4))


def test_what_was_not_started_can_not_be_switched_on():
    """An engine in which a step can't run twice serves all the same, so nobody may ask for it later."""
    without = ReroutingConfig(artifact="a", select_top_k=2)
    for started, share in ((without, 0.1), (ReroutingConfig(artifact="a", select_top_k=2, shadow_share=0.1), None)):
        with pytest.raises(ValueError, match="start with shadow_share: 0, and set it to 0 to stop the checks"):
            started.changed({"shadow_share": share}, 8)
    assert without.changed({"shadow_share": None, "threshold": 0.1}, 8).shadow_share is None
    started = ReroutingConfig(artifact="a", select_top_k=2, shadow_share=0)
    assert started.changed({"shadow_share": 0.1}, 8).changed({"shadow_share": 0}, 8).shadow_share == 0

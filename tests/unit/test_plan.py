"""The plan of a calibration, against arithmetic by hand, and the guide against the plan."""

from pathlib import Path

import pytest

from examples.tiny_moe.data import MODEL
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import BLOCK_BYTES_ON
from sere_dist.calibration.plan import H200, Plan

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "benchmarks" / "shapes"
TOKENS = 400 * 128


def plan(model: Path, method: str = "frobenius", kernel: str = "linear", tokens: int = TOKENS, device="cuda") -> Plan:
    return Plan.of(Checkpoint(str(model)), method, kernel, tokens, 128, device)


def test_a_layer_of_qwen3_30b():
    """128 experts of three 2048 x 768 matrices, top-8, bfloat16 in the checkpoint; only its configuration is there."""
    found = plan(SHAPES / "qwen3-30b-a3b")
    experts = 128 * 3 * 2048 * 768
    attention = 2048 * (32 + 2 * 4) * 128 + 32 * 128 * 2048
    others = attention + 128 * 2048 + 2 * 2048 + 2 * 128  # router, norms
    assert found.expert_parameters == experts and found.layer_parameters == experts + others
    assert found.parameters == 48 * (experts + others) + 2 * 151936 * 2048 + 2048
    assert found.stored_bytes == 2 and found.score_read == 2 * experts
    assert found.score_bytes == 4 * experts + BLOCK_BYTES_ON["cuda"]
    assert found.states_bytes == TOKENS * (4 * 2048 + 8 * 8)
    assert found.score_float32 == 2 * TOKENS * (experts + 128**2 * 2048)
    assert found.forward_flops == pytest.approx(TOKENS * (2 * (experts / 16 + others) + 4 * 128 * 2048))
    assert found.expert_passes == 1 and found.score_float64 == 0


def test_seconds_are_bound_by_the_chain_of_forward_tasks_or_by_the_sum_of_all():
    found = plan(SHAPES / "qwen3-30b-a3b")
    forward = found.forward_read / H200.read + found.forward_flops / (H200.float32 * H200.used)
    score = found.score_read / H200.read + found.score_float32 / (H200.float32 * H200.used)
    assert found.seconds(H200, 1) == pytest.approx(48 * (forward + score))
    assert found.seconds(H200, 1000) == pytest.approx(48 * forward + score)


@pytest.mark.parametrize(
    ("kernel", "tokens", "of_features"), [("linear", TOKENS, False), ("linear", 10**7, True), ("rbf", 10**7, False)]
)
def test_cka_counts_its_passes(kernel, tokens, of_features):
    found = plan(SHAPES / "qwen3-30b-a3b", "cka", kernel, tokens)
    assert found.of_features == of_features
    assert found.expert_passes > 10 and found.score_float64 > 0


def test_a_method_without_data_has_no_forward_tasks():
    found = plan(SHAPES / "qwen3-30b-a3b", "weights")
    assert found.num_tokens == found.forward_read == found.forward_bytes == found.states_bytes == 0
    assert plan(SHAPES / "qwen3-30b-a3b", "random").score_read == 0


def test_a_checkpoint_that_is_there_is_measured(model):
    """Tied embeddings are counted once, and the file says how much a parameter takes."""
    found = plan(MODEL, device="cpu")
    assert found.parameters == model.num_parameters()
    assert found.stored_bytes == pytest.approx((MODEL / "model.safetensors").stat().st_size / found.parameters)


def test_the_guide_says_what_the_plan_says():
    """Column by column of its table."""
    guide = (ROOT / "docs" / "guides.md").read_text()
    small, large = plan(SHAPES / "qwen3-30b-a3b"), plan(SHAPES / "qwen3-235b-a22b")
    assert small.max_length == large.max_length == 128

    def row(text) -> str:
        return f"| {text(small)} | {text(large)} |"

    assert row(lambda p: f"{p.forward_bytes / 1e9:.1f} GB") in guide
    assert row(lambda p: f"{p.score_bytes / 1e9:.1f} GB") in guide
    assert row(lambda p: f"{p.states_bytes / 1e9:.1f} GB") in guide
    assert row(lambda p: f"{reads(p, 'forward_read'):.0f} + {reads(p, 'score_read'):.0f} GB") in guide
    assert row(lambda p: f"{work(p, 'forward_flops'):.2g} + {work(p, 'score_float32'):.1f} PFLOP") in guide
    assert row(lambda p: f"{p.seconds(H200, 1):,.0f} s / {p.seconds(H200, 8):,.0f} s") in guide


def reads(found: Plan, what: str) -> float:
    return len(found.layer_names) * getattr(found, what) / 1e9


def work(found: Plan, what: str) -> float:
    return len(found.layer_names) * getattr(found, what) / 1e15

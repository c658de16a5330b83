"""What the study of data-parallel engines makes of their measurements, against sums by hand."""

import pytest

from sere_dist.moe import MoeShape
from studies import data_parallel as study
from studies.published_times import bytes_of_token

BATCH = 4
TOKENS = BATCH * (study.NEW - 1)


def measured(turn, seconds, ran, sent=0, active=3):
    """Of a rank, in a turn of two steps and two layers."""
    layer = {
        "steps": 2,
        "remote_domains_after": TOKENS // 2,
        "remote_slots_after": TOKENS,
        "active_experts_after": active,
    }
    return {"turn": turn, "seconds": seconds, "ran": ran, "bytes_sent": sent, "layers": {"0": layer, "1": layer}}


def test_a_turn_of_all_ranks():
    other = measured(study.OFF, 9.0, [9, 9, 9, 9])
    first = [measured(study.PAPERS, 0.010, [1, 2, 3, 4], sent=500 * TOKENS), other]
    second = [measured(study.PAPERS, 0.020, [4, 2, 2, 2], sent=300 * TOKENS, active=5), other]
    again = [[measured(study.PAPERS, 0.030, [1, 2, 3, 4])], [measured(study.PAPERS, 0.040, [4, 2, 2, 2])]]
    row = study.summary([[first, second], again], study.PAPERS, BATCH)
    assert row == {
        "turn": study.PAPERS,
        "ms_per_step": {"median": 25.0, "min": 10.0, "max": 40.0},
        "bytes_per_token_and_layer": 400.0,  # of 800 in two layers
        "remote_domains": 1.0,  # half from each rank
        "remote_slots": 2.0,
        "active_experts_of_a_ranks_tokens": 2.0,  # 3 and 5 in two steps
        "active_experts_on_a_rank": 2.5,
        "active_experts_on_the_largest_rank": 3.25,  # 4, 2, 3 and 4
    }


def test_bytes_of_a_token():
    """Half a visit: 100 numbers of 2 bytes there and back, and 4 weights and ids of 4 bytes there. Of two rows on each
    of three ranks, each token also has half of two numbers of 8 bytes."""
    shape = MoeShape("", 1, hidden_size=100, num_experts=8, num_experts_per_token=4)
    assert bytes_of_token(0.5, 3, 2, shape) == pytest.approx(0.5 * (400 + 32) + 8)

from math import comb

import pytest
import torch

from sere_dist.method.counters import COUNTERS, count_step, named, remote_domains
from sere_dist.method.records import ExpertPlaces, LayerTables, Step

IDS, NEW = torch.tensor([[0, 3], [1, 2], [2, 3]]), torch.tensor([[0, 1], [1, -1], [2, 3]])
WEIGHTS, VALID = torch.tensor([[0.6, 0.4]] * 3), torch.tensor([True, True, False])
PRIMARY = torch.tensor([True, True, False, False])  # those of the valid rows at S = 1


def test_domains_of_uniform_routing():
    """Design check: with 8 of 128 experts chosen uniformly a token visits 3.63 of 4 ranks, and 5.34 of 8."""
    ids = torch.rand(20_000, 128, generator=torch.Generator().manual_seed(0)).topk(8).indices
    for ranks, expected in ((4, 3.63), (8, 5.34)):
        exact = ranks * (1 - comb(128 - 128 // ranks, 8) / comb(128, 8))
        assert round(exact, 2) == expected
        domain = torch.arange(128) // (128 // ranks)
        visited = remote_domains(ids, domain).double()
        assert abs(visited.mean() - exact) < 4 * visited.std() / len(ids) ** 0.5
        nothing_primary = torch.zeros(128, dtype=torch.bool)
        counts = count_step(Step(torch.rand(ids.shape), ids), ids, nothing_primary, ExpertPlaces(domain_E=domain))
        assert counts[COUNTERS.index("domains_before")] == visited.sum()


def test_counts_by_hand():
    places = ExpertPlaces(domain_E=torch.tensor([0, 0, 1, 1]))
    counts = count_step(Step(WEIGHTS, IDS, VALID, torch.zeros(3)), NEW, PRIMARY, places)
    assert dict(zip(COUNTERS, counts.tolist(), strict=True)) == {
        "steps": 1,
        "rows": 2,
        "rerouted_slots": 1,
        "critical_slots": 0,
        "dropped_slots": 1,
        "merged_slots": 0,
        "active_experts_before": 4,
        "active_experts_after": 2,
        "largest_rank_before": 4,
        "largest_rank_after": 2,
        "domains_before": 4,
        "domains_after": 2,
        "remote_domains_before": 2,
        "remote_domains_after": 0,
        "remote_slots_before": 2,
        "remote_slots_after": 0,
        "estimated_error": 0,
    }
    critical = count_step(Step(WEIGHTS, IDS, VALID), IDS, PRIMARY)
    assert dict(zip(COUNTERS, critical.tolist(), strict=True))["critical_slots"] == 2
    off = count_step(Step(WEIGHTS, IDS, VALID), IDS, torch.zeros(4, dtype=torch.bool))
    assert dict(zip(COUNTERS, off.tolist(), strict=True))["critical_slots"] == 0
    assert not count_step(Step(WEIGHTS, IDS, ~VALID & False), IDS, PRIMARY).any()


def test_experts_of_each_rank_by_hand():
    places = ExpertPlaces(rank_E=torch.tensor([2, 0, 0, 1], dtype=torch.int16), num_ranks=4)
    counts = count_step(Step(WEIGHTS, IDS, VALID), NEW, PRIMARY, places)
    counters = dict(zip(COUNTERS, counts.tolist(), strict=False))
    # Before, all run: two of them on rank 0. After, 0 and 1 do.
    assert (counters["largest_rank_before"], counters["largest_rank_after"]) == (2, 1)
    assert counts[len(COUNTERS) :].tolist() == [1, 0, 1, 0]


def test_domains_and_slots_by_hand():
    """Token 0 is at home in domain 1 and sends two slots to domain 0; token 1 has no home; token 2 is not valid."""
    ids = torch.tensor([[0, 1, 2, 3], [3, 3, -1, 2], [0, 1, 2, 3]])
    new = torch.tensor([[0, 1, -1, 2], [3, 3, -1, 3], [0, 1, 2, 3]])
    step = Step(torch.rand(3, 4), ids, torch.tensor([True, True, False]), torch.tensor([1, -1, 0]))
    places = ExpertPlaces(domain_E=torch.tensor([0, 0, 1, 2]))
    counts = count_step(step, new, torch.ones(4, dtype=torch.bool), places)
    assert dict(list(zip(COUNTERS, counts.tolist(), strict=True))[COUNTERS.index("domains_before") :]) == {
        "domains_before": 3 + 2,
        "domains_after": 2 + 1,
        "remote_domains_before": 2 + 2,
        "remote_domains_after": 1 + 1,
        "remote_slots_before": 3 + 3,
        "remote_slots_after": 2 + 3,
        "estimated_error": 0,
    }


def test_the_estimated_error_by_hand():
    """Token 0 sends weight 0.4 from expert 3 to 1, token 1 drops its expert 2, token 2 is not valid."""
    similarity, size = torch.full((4, 4), 0.25), torch.tensor([1.0, 1.0, 3.0, 2.0])
    tables = LayerTables(similarity, torch.ones(4, 4), size)

    def error(**chance) -> float:
        counts = count_step(Step(WEIGHTS, IDS, VALID, **chance), NEW, PRIMARY, tables=tables)
        return named(counts.tolist())["estimated_error"]

    moved, dropped = 0.4**2 * 2 * 0.75, 0.4**2 * 3
    assert error() == pytest.approx(moved + dropped, rel=1e-6)
    assert error(chance_T=torch.tensor([0.5, 0.25, 1.0])) == pytest.approx(moved / 2 + dropped / 4, rel=1e-6)
    assert named(count_step(Step(WEIGHTS, IDS, VALID), IDS, PRIMARY, tables=tables).tolist())["estimated_error"] == 0

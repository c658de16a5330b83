"""The step of a group, against sums by hand."""

from dataclasses import replace

import pytest
import torch

from sere_dist.evaluation.traffic import Layout, traffic
from sere_dist.forecast import Device, ModelCost, decode_step
from sere_dist.method.counters import dispatch_bytes
from sere_dist.method.placement import linear_ranks
from sere_dist.moe import MoeShape
from sere_dist.simulation import Group, Network, exchange_seconds, experts_seconds, loads, simulate

DEVICE = Device("even", 100.0, 1000.0, 0.5, 2.0, overlaps=True, host_seconds=0.0, uncertainty=0.1, source="made up")
NETWORK = Network("two nodes", ranks_per_node=2, inside=10.0, between=5.0, latency=0.25, source="made up")
SHAPE = MoeShape("made up", num_layers=3, hidden_size=4, num_experts=8, num_experts_per_token=2)
COST = ModelCost(SHAPE, 100.0, 50.0, 40.0, 10.0, 2.0, 1.0)  # two MoE layers: 50 bytes an expert, 20 operations a slot
GROUP = Group(DEVICE, NETWORK, ranks=4, backend="per_slot", layers=2, dispatch_bytes=1.0, combine_bytes=2.0)
LAYOUT = Layout(4, {0: linear_ranks(8, 4)})  # experts 0 and 1 on rank 0, and so on; ranks 0 and 1 on node 0
# One step of four rows, at home on ranks 0 to 3. Rank 0 is to run 0, 1; rank 1: 2; rank 2: 4, 5; rank 3: none.
IDS = torch.tensor([[[0, 1], [1, 2], [0, 4], [4, 5]]])


def of_backend(backend, **changes):
    return replace(GROUP, backend=backend, **changes)


def test_experts_of_the_slowest_rank():
    of = loads(IDS, LAYOUT, 0, GROUP)
    assert of.active_DR.tolist() == [[2, 1, 2, 0]]
    assert of.slots_DR.tolist() == [[4, 1, 3, 0]]
    assert experts_seconds(of, COST, GROUP).tolist() == [2 * 50 / 100]  # reading; computing takes 4 x 20 / 1000
    slow = replace(GROUP, device=replace(DEVICE, speed=10.0))
    assert experts_seconds(of, COST, slow).tolist() == [4 * 20 / 10]
    both = replace(GROUP, device=replace(DEVICE, overlaps=False))
    assert experts_seconds(of, COST, both).tolist() == pytest.approx([1.0 + 0.08])


def test_copies_by_backend():
    """Remote slots: row 1 -> rank 0 inside; row 2 -> rank 0 between; row 3 -> rank 2 twice, inside."""
    per_slot = loads(IDS, LAYOUT, 0, of_backend("per_slot"))
    assert per_slot.inside_DR.tolist() == [[1, 1, 2, 2]]  # sent or received, whichever are more
    assert per_slot.between_DR.tolist() == [[1, 0, 1, 0]]
    per_rank = loads(IDS, LAYOUT, 0, of_backend("per_rank"))
    assert per_rank.inside_DR.tolist() == [[1, 1, 1, 1]]  # row 3 goes once to rank 2
    assert per_rank.between_DR.tolist() == [[1, 0, 1, 0]]  # row 2 reaches rank 0, which has rank 2's place on its node
    everywhere = loads(IDS, LAYOUT, 0, of_backend("all_gather"))
    # Each rank sends its row to its partner, gets its partner's, and passes on the one that came from the other node.
    assert everywhere.inside_DR.tolist() == [[2, 2, 2, 2]]
    assert everywhere.between_DR.tolist() == [[1, 1, 1, 1]]
    assert loads(torch.full_like(IDS, -1), LAYOUT, 0, GROUP).between_DR.sum() == 0


def test_a_copy_is_passed_on_inside_the_other_node():
    ids = torch.tensor([[[6, 7], [-1, -1], [-1, -1], [-1, -1]]])  # from rank 0 to rank 3
    per_rank = loads(ids, LAYOUT, 0, of_backend("per_rank"))
    assert per_rank.between_DR.tolist() == [[1, 0, 1, 0]]  # to rank 2
    assert per_rank.inside_DR.tolist() == [[0, 0, 1, 1]]  # and on to rank 3
    per_slot = loads(ids, LAYOUT, 0, of_backend("per_slot"))
    assert per_slot.between_DR.tolist() == [[2, 0, 0, 2]]
    assert per_slot.inside_DR.sum() == 0


def test_exchanges_take_the_busier_link():
    of = loads(IDS, LAYOUT, 0, GROUP)
    assert exchange_seconds(of, GROUP, 4.0).tolist() == pytest.approx([0.25 + 4 * max(2 / 10, 1 / 5)])
    slower = replace(GROUP, network=replace(NETWORK, between=1.0))
    assert exchange_seconds(of, slower, 4.0).tolist() == pytest.approx([0.25 + 4 * 1 / 1])


def test_a_step_is_the_sum_of_its_parts():
    found = simulate({0: IDS, 1: IDS.flip(1)}, Layout(4, dict.fromkeys((0, 1), linear_ranks(8, 4))), COST, GROUP, 10)
    alone = decode_step(COST, DEVICE, 1, 0.0, 10)
    assert found.of_rank == replace(alone, experts=2 * 1.0)
    assert (found.active, found.largest_rank) == (5, 2)
    of_both = [loads(ids, LAYOUT, 0, GROUP) for ids in (IDS, IDS.flip(1))]
    assert found.dispatch == pytest.approx(sum(float(exchange_seconds(of, GROUP, 4.0)) for of in of_both))
    assert found.combine == pytest.approx(sum(float(exchange_seconds(of, GROUP, 8.0)) for of in of_both))
    parts = 2.0 + alone.others + alone.attention + alone.waiting + found.dispatch + found.combine
    assert found.seconds == pytest.approx(parts)
    waits = replace(GROUP, device=replace(DEVICE, host_seconds=1e3))
    assert simulate({0: IDS}, LAYOUT, COST, waits, 10).seconds == 1e3


def test_one_rank_is_the_forecast():
    one = replace(GROUP, ranks=1)
    found = simulate({0: IDS}, Layout(1, {0: linear_ranks(8, 1)}), COST, one, 10)
    assert found.dispatch == found.combine == 0
    assert found.seconds == pytest.approx(decode_step(COST, DEVICE, 4, 5.0, 10).seconds)


@pytest.mark.parametrize("backend", ["all_gather", "per_rank", "per_slot"])
def test_on_one_node_all_copies_are_those_of_the_counters(backend):
    """Summed over ranks, what is received is what `dispatch_bytes` counts; each kind of copy is one hidden state."""
    torch.manual_seed(0)
    ids, flat = torch.rand(1, 12, 8).topk(3).indices, replace(NETWORK, ranks_per_node=4)
    of = loads(ids, LAYOUT, 0, replace(of_backend(backend), network=flat))
    measured = traffic({0: ids}, LAYOUT)
    sums = (12, sum(measured.remote_domains), sum(measured.remote_slots))
    copies = dispatch_bytes(*sums, num_ranks=4, hidden_size=1, element_size=1)[backend] / 2
    assert of.between_DR.sum() == 0
    assert of.inside_DR.sum() >= copies  # the busier direction of each rank
    assert of.inside_DR.sum() == copies or backend != "all_gather"


def test_a_layout_of_other_ranks_is_refused():
    with pytest.raises(ValueError, match="4 ranks, and the group 2"):
        simulate({0: IDS}, LAYOUT, COST, replace(GROUP, ranks=2), 10)

"""Where experts live, as vLLM places them and as EPLB moves them; and what the CPU's expert kernel is given."""

from types import SimpleNamespace

import pytest
import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.distributed.eplb.eplb_state import compute_logical_maps
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

from sere_dist.vllm_plugin import cpu_experts, expert_map
from sere_dist.vllm_plugin.cpu_experts import local_slots


def test_linear_and_round_robin_placement():
    assert expert_map.ranks_of_placement(8, 4, "linear").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert expert_map.ranks_of_placement(8, 4, "round_robin").tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert expert_map.ranks_of_placement(7, 3, "linear").tolist() == [
        0,
        0,
        0,
        1,
        1,
        2,
        2,
    ]  # one more on the first


# Physical experts of one layer, 2 a rank on 3 ranks: which of 4 logical experts each is.
PLACED = torch.tensor([[0, 1, 2, 3, 0, 1]])
MOVED = torch.tensor([[3, 3, 1, 2, 0, 2]])


def maps(physical_to_logical_LP: torch.Tensor) -> torch.Tensor:
    return compute_logical_maps(physical_to_logical_LP, 4)[0]


def test_the_first_replica_of_an_expert_says_where_it_lives():
    assert expert_map.ranks_of_replicas(maps(PLACED), 2).tolist() == [[0, 0, 1, 1]]
    assert expert_map.ranks_of_replicas(maps(MOVED), 2).tolist() == [[2, 1, 1, 0]]


@pytest.fixture
def group(monkeypatch):
    """The expert-parallel group of three ranks, of which this is the second; rank 2 is on another node."""
    cpu_group = SimpleNamespace(size=lambda: 3)
    monkeypatch.setattr(
        expert_map, "get_ep_group", lambda: SimpleNamespace(world_size=3, rank_in_group=1, cpu_group=cpu_group)
    )
    nodes = [0, 0, 2]
    monkeypatch.setattr(expert_map, "in_the_same_node_as", lambda _, source: [node == nodes[source] for node in nodes])


def runner(logical_to_physical_EX: torch.Tensor | None = None) -> SimpleNamespace:
    state = SimpleNamespace(logical_to_physical_map=logical_to_physical_EX)
    return SimpleNamespace(
        router=SimpleNamespace(eplb_state=state),
        moe_config=SimpleNamespace(num_local_experts=2),
        expert_placement_strategy="linear",
    )


def parallel(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"data_parallel_size": 1, "enable_eplb": False} | changes)


def test_domains_are_ranks_or_nodes(group):
    runners = {3: runner(), 5: runner()}
    by_rank = expert_map.ExpertMap(runners, 6, "rank", parallel(), "cpu")
    assert by_rank.domain[5].tolist() == by_rank.rank[5].tolist() == [0, 0, 1, 1, 2, 2]
    assert by_rank.home is None, "under tensor parallelism every rank has all tokens"
    by_node = expert_map.ExpertMap(runners, 6, "node", parallel(data_parallel_size=3), "cpu")
    assert by_node.rank[3].tolist() == [0, 0, 1, 1, 2, 2]
    assert by_node.domain[3].tolist() == [0, 0, 0, 0, 2, 2]
    assert by_node.home == 0, "the node of rank 1"


def test_eplb_moves_experts_in_place(group):
    layer = runner(maps(PLACED)[0])
    moving = expert_map.ExpertMap({0: layer}, 4, "node", parallel(enable_eplb=True), "cpu")
    seen = moving.rank[0], moving.domain[0]  # what a captured graph holds on to
    assert [table.tolist() for table in seen] == [[0, 0, 1, 1], [0, 0, 0, 0]]
    layer.router.eplb_state.logical_to_physical_map = maps(MOVED)[0]
    moving.refresh()
    assert [table.tolist() for table in seen] == [[2, 1, 1, 0], [2, 0, 0, 0]]


def test_slots_of_other_ranks_weigh_nothing_and_run_no_further_expert():
    map_E = torch.tensor([-1, -1, 0, 1, 2, -1])
    ids = torch.tensor([[4, 0, 2], [5, 1, 3], [0, 1, 5]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.4, 0.3, 0.3]])
    local_weights, local_ids = local_slots(weights, ids, map_E)
    assert local_weights.tolist() == (weights * torch.tensor([[1, 0, 1], [0, 0, 1], [0, 0, 0]])).tolist()
    assert local_ids.tolist() == [[2, 2, 0], [1, 1, 1], [2, 2, 2]]
    assert local_ids.dtype == torch.int32
    _, nowhere = local_slots(weights[2:], ids[2:], map_E)
    assert nowhere.tolist() == [[0, 0, 0]]


def test_what_vllm_has_itself_is_left_alone(monkeypatch):
    def apply(self, *, expert_map, **_others):
        return expert_map

    def collective(self, input_, dim=0, sizes=None):
        return input_

    monkeypatch.setattr(CPUUnquantizedExperts, "apply", apply)
    monkeypatch.setattr(CpuCommunicator, "all_gatherv", collective)
    cpu_experts.provide()
    assert CPUUnquantizedExperts.apply is apply
    assert CpuCommunicator.all_gatherv is collective
    assert CpuCommunicator.reduce_scatterv is cpu_experts.reduce_scatterv, "this one is still lacking"
    del CpuCommunicator.reduce_scatterv

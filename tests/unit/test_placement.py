import json

import pytest
import torch
from typer.testing import CliRunner
from vllm.distributed.eplb.eplb_state import EplbState, compute_logical_maps
from vllm.distributed.eplb.policy import DefaultEplbPolicy
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

from sere_dist.artifact.placement import Placement, PlacementError, ReplicaPlacement, propose, propose_replicas
from sere_dist.cli.commands import app
from sere_dist.method.counters import remote_domains
from sere_dist.method.placement import (
    expected_remote_domains,
    linear_ranks,
    lower_peak,
    of_replicas,
    place,
    place_replicas,
    rank_loads,
    rank_sizes,
    replicate,
    share_within_ranks,
    spread_by_load,
)
from sere_dist.moe import MoeShape
from tests.support.artifacts import change_layers, small_artifact

SIZES = [(64, 8), (10, 4), (7, 3), (5, 5)]


@pytest.fixture
def artifact():
    found = small_artifact(num_experts=12)
    random = torch.Generator().manual_seed(1)
    tokens = {layer: torch.randint(1, 50, (12,), generator=random) for layer in (0, 1)}
    return change_layers(
        found, tokens_E=tokens, coactivation_EE={layer: torch.rand(12, 12, generator=random) for layer in (0, 1)}
    )


@pytest.fixture
def content(artifact):
    return propose(artifact, 4).model_dump(mode="json")


def vllm_ranks(num_experts: int, num_ranks: int) -> torch.Tensor:
    maps = [determine_expert_map(num_ranks, rank, num_experts)[1] for rank in range(num_ranks)]
    return torch.stack([local >= 0 for local in maps]).long().argmax(dim=0)


@pytest.mark.parametrize(("num_experts", "num_ranks"), SIZES)
def test_linear_placement_is_vllms(num_experts, num_ranks):
    assert linear_ranks(num_experts, num_ranks).equal(vllm_ranks(num_experts, num_ranks))


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_the_order_makes_vllms_placement_this_one(artifact, num_ranks):
    placement = propose(artifact, num_ranks)
    for layer in (0, 1):
        order = placement.order(layer)
        assert order.sort().values.equal(torch.arange(12))
        assert placement.ranks(layer)[order].equal(vllm_ranks(12, num_ranks))


@pytest.mark.parametrize(("num_experts", "num_ranks"), SIZES)
def test_every_rank_is_full_and_none_overloaded(num_experts, num_ranks):
    torch.manual_seed(0)
    affinity, load = torch.rand(num_experts, num_experts), torch.rand(num_experts) ** 3
    even = spread_by_load(load, rank_sizes(num_experts, num_ranks))
    limit = max(1.05, float(rank_loads(load, even, num_ranks).max()))
    found = place(affinity, load, num_ranks, max_load=1.05)
    for ranks in (even, found):
        assert ranks.bincount().equal(linear_ranks(num_experts, num_ranks).bincount())
    assert rank_loads(load, found, num_ranks).max() <= limit + 1e-6
    assert share_within_ranks(affinity + affinity.T, found) >= share_within_ranks(affinity + affinity.T, even)


def test_loads_are_spread():
    load = torch.tensor([8.0, 6, 2, 2, 1, 1, 0, 0])
    assert rank_loads(load, linear_ranks(8, 2), 2).tolist() == pytest.approx([1.8, 0.2])
    assert rank_loads(load, spread_by_load(load, rank_sizes(8, 2)), 2).tolist() == pytest.approx([1, 1])


def test_experts_used_together_come_together():
    torch.manual_seed(0)
    group_E = torch.randperm(32) % 4
    affinity = (group_E[:, None] == group_E) + 0.1 * torch.rand(32, 32)
    found = place(affinity, torch.ones(32), 4)
    assert (found[:, None] == found).equal(group_E[:, None] == group_E)


def test_load_outweighs_affinity():
    """Two much used experts that belong together are kept apart where one rank would carry too much."""
    affinity, load = torch.eye(4), torch.tensor([5.0, 5, 1, 1])
    affinity[0, 1] = affinity[1, 0] = 1
    assert place(affinity, load, 2)[0] != place(affinity, load, 2)[1]
    assert place(affinity, load, 2, max_load=2)[0] == place(affinity, load, 2, max_load=2)[1]


def test_the_peak_is_lowered():
    """The heaviest first leaves 3 + 3 against 2 + 2 + 2 where sizes allow it; here 7 + 1 + 4 and 6 + 5 + 2."""
    load, start = torch.tensor([7.0, 6, 5, 4, 2, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    found = lower_peak(load, start, 2)
    assert rank_loads(load, found, 2).max() == pytest.approx(13 / 12.5)
    assert found.bincount().tolist() == [3, 3]
    assert lower_peak(load, start, 2, enough=18 / 12.5).equal(start)
    # Experts 0 and 3 are replicas: neither may join the other.
    apart = lower_peak(load, start, 2, torch.tensor([0, 1, 2, 0, 3, 4]))
    assert apart[0] != apart[3]


def test_nodes_come_first():
    """Eight groups of four experts go together, and pairs of groups a little: these share a node of two ranks."""
    torch.manual_seed(0)
    group_E = torch.randperm(32) % 8
    same, pair = (group_E[:, None] == group_E), (group_E[:, None] // 2 == group_E // 2)
    affinity = same + 0.2 * pair + 0.01 * torch.rand(32, 32)
    found = place(affinity, torch.ones(32), 8, num_nodes=4)
    assert (found[:, None] == found).equal(same)
    assert (found[:, None] // 2 == found // 2).equal(pair)


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(64, 8), (10, 4), (7, 4)])
def test_nodes_keep_every_rank_full(num_experts, num_ranks):
    torch.manual_seed(0)
    affinity, load = torch.rand(num_experts, num_experts), torch.rand(num_experts)
    found = place(affinity, load, num_ranks, num_nodes=2)
    assert found.bincount().equal(linear_ranks(num_experts, num_ranks).bincount())


def test_replicas_are_those_that_vllm_would_make():
    load = torch.tensor([9.0, 1, 4, 2])
    assert replicate(load, 3, most=4).tolist() == [0, 0, 0, 1, 2, 2, 3]  # 9, then 4.5, then 4
    assert replicate(load, 3, most=2).bincount().tolist() == [2, 1, 2, 2]
    loads = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) ** 4
    theirs = DefaultEplbPolicy.replicate_experts(loads.numpy(), 80)[1]
    for layer in range(3):
        assert replicate(loads[layer], 16, most=8).bincount().tolist() == theirs[layer].tolist()


def test_of_replicas():
    affinity, load = torch.tensor([[9.0, 2, 4], [2, 9, 6], [4, 6, 9]]), torch.tensor([8.0, 2, 6])
    affinity_PP, load_P = of_replicas(affinity, load, torch.tensor([0, 2, 0, 1]))
    assert load_P.tolist() == [4, 6, 4, 2]
    assert affinity_PP[0].tolist() == [0, 2, 0, 1]  # two replicas are used half as often each, and never together
    assert affinity_PP[1].tolist() == [2, 0, 2, 6]


def largest_load(load: torch.Tensor, logical: torch.Tensor, num_ranks: int) -> float:
    share = load.double() / logical.bincount(minlength=len(load))
    return float(rank_loads(share[logical], linear_ranks(len(logical), num_ranks), num_ranks).max())


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "num_nodes", "redundant"),
    [(64, 8, 1, 8), (64, 8, 2, 8), (64, 16, 4, 16), (30, 8, 2, 2), (256, 32, 4, 32), (16, 8, 1, 16)],
)
def test_replicas_are_spread(num_experts, num_ranks, num_nodes, redundant):
    """No rank carries more than under EPLB's own policy, but for what `max_load` allows, and none has two replicas."""
    random = torch.Generator().manual_seed(num_experts)
    affinity, load = torch.rand(2, num_experts, num_experts, generator=random).prod(dim=0), None
    load = torch.rand(num_experts, generator=random) ** 3
    theirs = DefaultEplbPolicy.rebalance_experts(load[None], num_experts + redundant, 1, num_nodes, num_ranks)[0]
    for max_load in (1.0, 1.1):
        found = place_replicas(affinity, load, num_ranks, redundant, max_load, num_nodes)
        assert found.unique().tolist() == list(range(num_experts))
        assert all(len(set(rank)) == len(rank) for rank in found.view(num_ranks, -1).tolist())
        if num_nodes == 1 or max_load > 1:
            assert largest_load(load, found, num_ranks) <= max(max_load, largest_load(load, theirs, num_ranks)) + 1e-6


def test_replica_proposals(artifact, tmp_path):
    placement = propose_replicas(artifact, 4, 4, num_nodes=2)
    start = EplbState.build_initial_global_physical_to_logical_map(12, 4)
    for layer, placed in placement.layers.items():
        load = artifact.layers[layer].tokens_E
        found = torch.tensor(placed.physical_to_logical)
        assert placed.load == pytest.approx(largest_load(load, found, 4))
        assert placed.load_linear == pytest.approx(largest_load(load, torch.tensor(start), 4))
        assert placed.load < placed.load_linear
        assert placed.remote_nodes is not None and placed.remote_nodes < placed.remote_domains
    logical_to_physical, counts = compute_logical_maps(placement.maps(), 12)
    assert counts.sum(dim=1).tolist() == [16, 16]
    for layer in (0, 1):
        for expert in range(12):
            places = logical_to_physical[layer, expert, : counts[layer, expert]]
            assert (placement.maps()[layer, places] == expert).all()
    placement.save(tmp_path / "placement.json")
    assert ReplicaPlacement.load(tmp_path / "placement.json") == placement
    with pytest.raises(PlacementError, match="has replicas, which vLLM takes from no file"):
        Placement.load(tmp_path / "placement.json")
    content = placement.model_dump(mode="json")
    for damage, named in (([0] * 16, "does not name each of 12"), ([0, 1], "has 2 entries, .* is 16")):
        content["layers"]["1"]["physical_to_logical"] = damage
        (tmp_path / "placement.json").write_text(json.dumps(content))
        with pytest.raises(PlacementError, match=named):
            ReplicaPlacement.load(tmp_path / "placement.json")


def test_replicas_that_vllm_would_refuse(artifact):
    with pytest.raises(PlacementError, match="give --redundant 4 or 8"):
        propose_replicas(artifact, 4, 5)
    with pytest.raises(PlacementError, match=r"give --redundant 3$"):
        propose_replicas(artifact, 5, 1)
    for redundant in (0, 1024):
        with pytest.raises(PlacementError, match="takes 1 to 1023"):
            propose_replicas(artifact, 4, redundant)
    with pytest.raises(PlacementError, match="4 ranks on 3 nodes"):
        propose(artifact, 4, num_nodes=3)


def test_expected_remote_domains():
    torch.manual_seed(0)
    pairs = torch.randint(0, 5, (6, 6)).triu(1)
    ranks = torch.tensor([0, 0, 1, 1, 2, 2])
    tokens = torch.tensor([[i, j] for i in range(6) for j in range(6) for _ in range(int(pairs[i, j]))])
    counted = [remote_domains(tokens, ranks, torch.full((len(tokens),), home)).double().mean() for home in range(3)]
    assert expected_remote_domains((pairs + pairs.T).float(), ranks, 3) == pytest.approx(float(sum(counted) / 3))


def test_proposals(artifact):
    placement = propose(artifact, 4)
    assert placement.affinity == "coactivation"
    assert placement.layers.keys() == {0, 1}
    for layer, placed in placement.layers.items():
        assert placed.remote_domains < placed.remote_domains_linear
        assert placed.load == pytest.approx(
            float(rank_loads(artifact.layers[layer].tokens_E, placement.ranks(layer), 4).max())
        )
    assert propose(artifact, 4) == placement

    by_similarity = propose(artifact, 4, affinity="similarity")
    change_layers(artifact, coactivation_EE=None)
    assert propose(artifact, 4) == by_similarity
    assert by_similarity.affinity == "similarity"
    assert by_similarity.layers != placement.layers


def test_what_can_not_be_placed(artifact):
    for ranks in (1, 13):
        with pytest.raises(PlacementError, match="2 to num_experts"):
            propose(artifact, ranks)
    change_layers(artifact, coactivation_EE=None)
    with pytest.raises(PlacementError, match="no coactivation"):
        propose(artifact, 4, affinity="coactivation")
    change_layers(artifact, tokens_E=None)
    with pytest.raises(PlacementError, match=r"no routing counts \(experts.csv\)"):
        propose(artifact, 4)


def test_round_trip(artifact, tmp_path):
    placement = propose(artifact, 4)
    placement.save(tmp_path / "placement.json")
    assert Placement.load(tmp_path / "placement.json") == placement


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda content: content | {"schema_version": 2}, r"schema_version\n.*reads schema 1"),
        (lambda content: content | {"num_ranks": 1}, "num_ranks"),
        (lambda content: content | {"num_ranks": 5}, r"layers.0.rank_of_expert gives the 5 ranks \[3, 3, 3, 3, 0\]"),
        (lambda content: content | {"num_experts": 13}, "layers.0.rank_of_expert has 12 entries, num_experts is 13"),
        (lambda content: content | {"affinity": "taste"}, "affinity"),
        (lambda content: content | {"more": 1}, "more"),
        (lambda content: content | {"layers": {}}, "layers is empty"),
        (lambda content: {name: content[name] for name in content if name != "base_model"}, "base_model"),
    ],
)
def test_damaged_files(content, tmp_path, damage, named):
    (tmp_path / "placement.json").write_text(json.dumps(damage(content)))
    with pytest.raises(PlacementError, match=named):
        Placement.load(tmp_path / "placement.json")


def test_a_rank_that_is_not_there(content, tmp_path):
    content["layers"]["1"]["rank_of_expert"][0] = -1
    (tmp_path / "placement.json").write_text(json.dumps(content))
    with pytest.raises(PlacementError, match=r"layers\.1\.rank_of_expert"):
        Placement.load(tmp_path / "placement.json")


def test_no_file(tmp_path):
    with pytest.raises(PlacementError, match="no placement can be read"):
        Placement.load(tmp_path / "placement.json")
    (tmp_path / "placement.json").write_text("{")
    with pytest.raises(PlacementError, match="damaged placement"):
        Placement.load(tmp_path / "placement.json")


def test_another_model(artifact):
    placement, shape = propose(artifact, 4), MoeShape("SomeForCausalLM", 2, 8, 12, 2)
    placement.check_serves(shape, {0, 1}, 4)
    with pytest.raises(PlacementError, match=r"num_ranks: placement 4, served 8.*--ranks 8"):
        placement.check_serves(shape, {0, 1}, 8)
    with pytest.raises(PlacementError, match=r"layers: placement \[0, 1\], served \[1\]"):
        placement.check_serves(shape, {1}, 4)


def test_command(artifact, tmp_path):
    change_layers(artifact, coactivation_EE=None)
    artifact.save(tmp_path / "artifact")
    arguments = ["place", str(tmp_path / "artifact"), "--ranks", "3", "--output", str(tmp_path / "placement.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    placement = Placement.load(tmp_path / "placement.json")
    assert placement == propose(artifact, 3)
    assert "guess" in done.output
    for placed in placement.layers.values():
        assert f"{placed.remote_domains_linear:.2f} -> {placed.remote_domains:.2f}" in done.output

    replicated = CliRunner().invoke(app, [*arguments[:3], "4", "--nodes", "2", "--redundant", "4", *arguments[4:]])
    assert replicated.exit_code == 0
    assert ReplicaPlacement.load(tmp_path / "placement.json") == propose_replicas(artifact, 4, 4, num_nodes=2)
    assert "with 4 replicas" in replicated.output and "remote nodes" in replicated.output

    refused = CliRunner().invoke(app, ["place", str(tmp_path / "artifact"), "--ranks", "13"])
    assert refused.exit_code == 1
    assert "error: 13 ranks" in refused.output

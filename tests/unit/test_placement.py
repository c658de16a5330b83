import json

import pytest
import torch
from typer.testing import CliRunner
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

from sere_dist.artifact.placement import Placement, PlacementError, propose
from sere_dist.cli.commands import app
from sere_dist.method.counters import remote_domains
from sere_dist.method.placement import (
    expected_remote_domains,
    linear_ranks,
    place,
    rank_loads,
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
    even = spread_by_load(load, num_ranks)
    limit = max(1.05, float(rank_loads(load, even, num_ranks).max()))
    found = place(affinity, load, num_ranks, max_load=1.05)
    for ranks in (even, found):
        assert ranks.bincount().equal(linear_ranks(num_experts, num_ranks).bincount())
    assert rank_loads(load, found, num_ranks).max() <= limit + 1e-6
    assert share_within_ranks(affinity + affinity.T, found) >= share_within_ranks(affinity + affinity.T, even)


def test_loads_are_spread():
    load = torch.tensor([8.0, 6, 2, 2, 1, 1, 0, 0])
    assert rank_loads(load, linear_ranks(8, 2), 2).tolist() == pytest.approx([1.8, 0.2])
    assert rank_loads(load, spread_by_load(load, 2), 2).tolist() == pytest.approx([1, 1])


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

    refused = CliRunner().invoke(app, ["place", str(tmp_path / "artifact"), "--ranks", "13"])
    assert refused.exit_code == 1
    assert "error: 13 ranks" in refused.output

"""What the study of placements measures, against counts by hand."""

import torch

from studies.placement import Case, maps, measured, statistics

IDS = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 1]]).repeat(16, 1)  # a step of 64 tokens; expert 0 serves all


def test_what_a_map_comes_to():
    case = Case(ranks=2, nodes=2, redundant=0)
    found = measured(torch.tensor([0, 1, 2, 3]), IDS, 4, case)
    assert found["largest_load"] == found["largest_load_of_a_step"] == 1.5  # 6 of 8 slots are those of experts 0 and 1
    assert found["ranks_of_a_token"] == found["nodes_of_a_token"] == 1.5  # every other token stays on the first rank
    apart = measured(torch.tensor([0, 2, 1, 3]), IDS, 4, case)
    assert (apart["largest_load"], apart["ranks_of_a_token"]) == (1.25, 1.75)


def test_replicas_share_the_tokens():
    case = Case(ranks=2, nodes=1, redundant=2)
    found = measured(torch.tensor([0, 1, 2, 3, 0, 2]), IDS, 4, case)
    assert found["largest_load"] < 1.4  # three of four slots, without a replica: 1.5
    assert found["nodes_of_a_token"] == 1


def test_maps_name_every_expert():
    weights = torch.full((1, *IDS.shape), 0.5)
    for case in (Case(2, 2, 0), Case(2, 1, 2)):
        of = statistics((weights, IDS[None]), 4)
        assert of.load_E.tolist() == [64, 32, 16, 16]
        assert of.coactivation_EE[0].tolist() == [16, 8, 4, 4]
        found = dict(maps(of, case))
        assert all(logical_P.unique().tolist() == [0, 1, 2, 3] for logical_P in found.values())
        assert all(len(logical_P) == 4 + case.redundant for logical_P in found.values())
        assert found["vLLM's start"].tolist() == [0, 1, 2, 3, 0, 1][: 4 + case.redundant]

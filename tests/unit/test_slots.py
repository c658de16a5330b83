"""The forms in which re-routed slots reach an expert kernel, and models of the kernels that can't take repeats."""

import pytest
import torch
from hypothesis import given

from sere_dist.method.projection import reroute_projection
from sere_dist.method.records import LayerTables, Settings
from sere_dist.method.rerouting import reroute
from sere_dist.method.slots import fill_dropped, merge_repeats
from tests.support.decode_steps import drawn_steps


def rerouted_both_ways(drawn):
    """Returns weights and ids of a step by the paper's policy and by projection with a price."""
    step, similarity_EE, select_top_k, threshold = drawn
    by_paper = reroute(
        step.weights_TK,
        step.ids_TK,
        similarity_EE,
        select_top_k=select_top_k,
        threshold=threshold,
        valid_T=step.valid_T,
    )
    tables = LayerTables(similarity_EE.float(), 0.5 + similarity_EE.float(), similarity_EE.float().sum(dim=0))
    settings = Settings(select_top_k, threshold, expert_price=0.3)
    return (step.weights_TK, by_paper), reroute_projection(step, tables, settings)


def total_by_expert(weights_TK, ids_TK, num_experts):
    """Returns float64 [T, E]: what each token gives to each expert."""
    totals = torch.zeros(len(ids_TK), num_experts + 1, dtype=torch.float64)
    named_TK = torch.where(ids_TK >= 0, ids_TK, num_experts).long()
    return totals.scatter_add(1, named_TK, weights_TK.double())[:, :num_experts]


@given(drawn_steps())
def test_a_merged_step_names_every_expert_once(drawn):
    step, num_experts = drawn.step, len(drawn.similarity_EE)
    for weights_TK, ids_TK in rerouted_both_ways(drawn):
        merged_weights_TK, merged_ids_TK = merge_repeats(weights_TK, ids_TK, step.valid_T)
        for token, valid in enumerate(step.valid_T.tolist()):
            before, after = ids_TK[token].tolist(), merged_ids_TK[token].tolist()
            if not valid:
                assert after == before and torch.equal(merged_weights_TK[token], weights_TK[token])
                continue
            named = [expert for expert in after if expert >= 0]
            assert named == list(dict.fromkeys(expert for expert in before if expert >= 0)), "in the order of the slots"
            for column, expert in enumerate(after):
                assert expert in (-1, before[column])
                alone = before.count(expert) == 1
                expected = weights_TK[token, column] if alone or before[column] < 0 else None
                if expert < 0 <= before[column]:
                    expected = torch.zeros_like(weights_TK[token, column])
                assert expected is None or merged_weights_TK[token, column] == expected
        ids_of_valid = merged_ids_TK[step.valid_T]
        messages_E = torch.bincount(ids_of_valid[ids_of_valid >= 0].long())
        assert not len(messages_E) or messages_E.max() <= step.valid_T.sum(), "an expert gets a message twice"
        exact = {torch.float64: 1e-6, torch.float32: 1e-6}.get(weights_TK.dtype, 0.05)
        totals = [
            total_by_expert(*each, num_experts) for each in ((weights_TK, ids_TK), (merged_weights_TK, merged_ids_TK))
        ]
        torch.testing.assert_close(*totals, rtol=exact, atol=exact)


@given(drawn_steps())
def test_a_filled_step_has_no_new_empty_slot(drawn):
    step = drawn.step
    _, (weights_TK, ids_TK) = rerouted_both_ways(drawn)
    filled_TK = fill_dropped(step, ids_TK)
    kept_TK = ids_TK >= 0
    assert torch.equal(filled_TK[kept_TK], ids_TK[kept_TK])
    heaviest_T = step.ids_TK.gather(1, step.weights_TK.float().argmax(dim=1, keepdim=True)).squeeze(1)
    for token, column in ((filled_TK >= 0) & ~kept_TK).nonzero().tolist():
        assert filled_TK[token, column] == heaviest_T[token] and weights_TK[token, column] == 0
    assert ((filled_TK >= 0) | (step.ids_TK < 0) | (heaviest_T < 0)[:, None]).all()


def test_merging_by_hand():
    weights_TK = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0.125, 0.125]])
    ids_TK = torch.tensor([[7, 3, 7, -1], [3, 3, 3, 3]])
    merged = merge_repeats(weights_TK, ids_TK)
    assert merged[1].tolist() == [[7, 3, -1, -1], [3, -1, -1, -1]]
    assert merged[0].tolist() == [[0.625, 0.25, 0.0, 0.125], [1.0, 0.0, 0.0, 0.0]]
    only_first = merge_repeats(weights_TK, ids_TK, torch.tensor([True, False]))
    assert only_first[1].tolist() == [[7, 3, -1, -1], [3, 3, 3, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_summed_in_float32_in_the_order_of_the_slots(dtype):
    weights_TK = torch.tensor([[1.0, 2.0**-9, 2.0**-9, 2.0**-8]], dtype=dtype)
    ids_TK = torch.zeros(1, 4, dtype=torch.int32)
    merged, _ = merge_repeats(weights_TK, ids_TK)
    assert merged[0, 0] == torch.tensor(1.0 + 2.0**-7).to(dtype), "rounding after each sum would lose the small ones"

import torch
from hypothesis import given

from sere_dist.method.counters import COUNTERS, count_step
from sere_dist.method.records import Step
from sere_dist.method.rerouting import primary_experts, replace_experts, reroute, substitutes
from tests.support.decode_steps import drawn_steps


def oracle(weights, ids, similarity, select_top_k, threshold, valid):
    """The definition, slot by slot (SERE, section 3), on Python lists of float32 values."""
    num_slots = len(ids[0]) if ids else 0
    new = [list(row) for row in ids]
    if not 0 < select_top_k < num_slots:
        return new
    heaviest = [sorted(range(num_slots), key=lambda k, row=row: (-row[k], k))[:select_top_k] for row in weights]
    primary = {ids[t][k] for t in range(len(ids)) if valid[t] for k in heaviest[t]} - {-1}
    for t, row in enumerate(ids):
        for k, expert in enumerate(row):
            if not valid[t] or k in heaviest[t] or expert == -1 or expert in primary or not primary:
                continue
            best = min(primary, key=lambda p, e=expert: (-similarity[e][p], p))
            if not (threshold > 0 and similarity[expert][best] < threshold):
                new[t][k] = best
    return new


@given(drawn_steps())
def test_equals_the_definition(drawn):
    before, (step, similarity, select_top_k, threshold) = drawn.copy(), drawn
    weights, ids, valid, *_ = step
    new = reroute(weights, ids, similarity, select_top_k=select_top_k, threshold=threshold, valid_T=valid)
    rho = float(torch.tensor(threshold, dtype=torch.float32))
    lists = (each.tolist() for each in (weights, ids, similarity))
    assert new.tolist() == oracle(*lists, select_top_k, rho, valid.tolist())
    assert new.dtype == ids.dtype
    assert new.data_ptr() != ids.data_ptr() or not new.numel()
    assert drawn.equals(before), "inputs were changed"


# Three tokens, experts 0-3. With S = 1 the primary experts are 0 (token 0) and 1 (tokens 1 and 2).
WEIGHTS = torch.tensor([[0.3, 0.7], [0.6, 0.4], [0.9, 0.1]])
IDS = torch.tensor([[2, 0], [1, 3], [1, 0]])
SIMILARITY = torch.tensor([[1.0, 0.1, 0.2, 0.3], [0.1, 1.0, 0.4, 0.5], [0.2, 0.4, 1.0, 0.6], [0.5, 0.5, 0.6, 1.0]])


def test_a_small_step_by_hand():
    # 2 is more like 1 (0.4) than 0 (0.2); 3 is as like 0 as 1 (0.5): the lower id; 0 is primary and stays.
    assert reroute(WEIGHTS, IDS, SIMILARITY, select_top_k=1).tolist() == [[1, 0], [1, 0], [1, 0]]


def test_a_critical_expert_stays():
    assert reroute(WEIGHTS, IDS, SIMILARITY, select_top_k=1, threshold=0.45).tolist() == [[2, 0], [1, 0], [1, 0]]


def test_weights_are_compared_in_float32():
    weights = torch.tensor([[0.5, 0.5 + 1e-12], [0.5, 0.5]], dtype=torch.float64)  # equal in float32: the lower slot
    ids = torch.tensor([[0, 1], [2, 2]])
    assert reroute(weights, ids, torch.ones(4, 4), select_top_k=1).tolist() == [[0, 0], [2, 2]]


def test_the_threshold_is_compared_in_float32():
    similarity = torch.full((4, 4), 0.1)  # float32(0.1) is more than the float64 that Python means by 0.1
    assert reroute(WEIGHTS, IDS, similarity, select_top_k=1, threshold=0.1).tolist() == [[0, 0], [1, 0], [1, 0]]


def test_invalid_rows_neither_change_nor_vote():
    valid = torch.tensor([False, True, True])
    # Without token 0, expert 0 is not primary: tokens 1 and 2 move to 1, token 0 keeps its experts.
    assert reroute(WEIGHTS, IDS, SIMILARITY, select_top_k=1, valid_T=valid).tolist() == [[2, 0], [1, 1], [1, 1]]


def test_keeping_every_expert_changes_nothing():
    for select_top_k in (-1, 0, 2, 3):
        assert torch.equal(reroute(WEIGHTS, IDS, SIMILARITY, select_top_k=select_top_k), IDS)


def test_primary_experts_by_hand():
    assert primary_experts(WEIGHTS, IDS, 4, select_top_k=1).tolist() == [True, True, False, False]
    valid = torch.tensor([False, True, True])
    assert primary_experts(WEIGHTS, IDS, 4, select_top_k=1, valid_T=valid).tolist() == [False, True, False, False]
    empty = IDS.masked_fill(IDS == 0, -1)  # token 0's heaviest slot
    assert primary_experts(WEIGHTS, empty, 4, select_top_k=1).tolist() == [False, True, False, False]


def test_primary_experts_of_other_ranks_by_hand():
    def replaced(primary, ids=IDS, threshold=0.0):
        primary_E = torch.tensor([expert in primary for expert in range(4)])
        new = replace_experts(ids, substitutes(SIMILARITY, primary_E, threshold))
        counts = count_step(Step(WEIGHTS, ids), new, primary_E).tolist()
        names = ("rerouted_slots", "critical_slots", "active_experts_before", "active_experts_after")
        return new.tolist(), [counts[COUNTERS.index(name)] for name in names]

    assert replaced({0, 1}) == ([[1, 0], [1, 0], [1, 0]], [2, 0, 4, 2])  # as without other ranks
    # Some other rank claims 3: it stays here too, and 2 is most like it (0.6).
    assert replaced({0, 1, 3}) == ([[3, 0], [1, 3], [1, 0]], [1, 0, 4, 3])
    # Nobody on this rank chose 3; now it runs.
    assert replaced({0, 1, 3}, IDS.masked_fill(IDS == 3, 1)) == ([[3, 0], [1, 1], [1, 0]], [1, 0, 3, 3])
    # 2 is too little like 3: critical. 3 is not, though it is in no heaviest slot here.
    assert replaced({0, 1, 3}, threshold=0.7) == ([[2, 0], [1, 3], [1, 0]], [0, 1, 4, 4])


def test_does_not_loop_over_tokens():
    """4,096 tokens must not cost a thousand times what 4 do: a loop over tokens would."""
    from torch.profiler import profile

    def operations(num_tokens: int) -> int:
        weights = torch.rand(num_tokens, 8)
        ids = torch.rand(num_tokens, 64).topk(8).indices
        with profile() as profiled:
            reroute(weights, ids, torch.rand(64, 64), select_top_k=2)
        return sum(event.count for event in profiled.key_averages())

    assert operations(4096) == operations(4)

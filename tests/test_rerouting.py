import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_dist.rerouting import reroute


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


@st.composite
def steps(draw):
    """A decode step of few experts and coarse values, so that ties, empty slots and full unions are common."""
    num_experts = draw(st.integers(1, 12))
    num_slots = draw(st.integers(1, min(6, num_experts)))
    num_tokens = draw(st.integers(0, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    levels = draw(st.sampled_from([2, 5, 1000]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    weights = (torch.randint(1, levels + 1, (num_tokens, num_slots), generator=generator) / levels).to(dtype)
    ids = torch.stack(
        [torch.randperm(num_experts, generator=generator)[:num_slots] for _ in range(num_tokens)]
        or [torch.empty(num_slots, dtype=torch.long)]
    )[:num_tokens]
    empty = torch.rand(ids.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    ids = ids.masked_fill(empty, -1).to(draw(st.sampled_from([torch.int32, torch.int64])))
    similarity = torch.randint(0, levels + 1, (num_experts, num_experts), generator=generator) / levels
    return {
        "weights": weights,
        "ids": ids,
        "similarity": similarity.fill_diagonal_(1),
        "select_top_k": draw(st.integers(-1, num_slots + 1)),
        "threshold": draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])),
        "valid": torch.rand(num_tokens, generator=generator) < draw(st.sampled_from([0.0, 0.6, 1.0])),
    }


@settings(max_examples=600, deadline=None)
@given(steps())
def test_equals_the_definition(step):
    before = {name: value.clone() for name, value in step.items() if isinstance(value, torch.Tensor)}
    new = reroute(
        step["weights"],
        step["ids"],
        step["similarity"],
        select_top_k=step["select_top_k"],
        threshold=step["threshold"],
        valid_T=step["valid"],
    )
    rho = float(torch.tensor(step["threshold"], dtype=torch.float32))
    expected = oracle(
        step["weights"].tolist(),
        step["ids"].tolist(),
        step["similarity"].tolist(),
        step["select_top_k"],
        rho,
        step["valid"].tolist(),
    )
    assert new.tolist() == expected
    assert new.dtype == step["ids"].dtype
    assert new.data_ptr() != step["ids"].data_ptr() or not new.numel()
    assert all(torch.equal(step[name], value) for name, value in before.items()), "inputs were changed"


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

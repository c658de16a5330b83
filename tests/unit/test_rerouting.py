from math import comb

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sere_dist.method.rerouting import (
    ALWAYS_PRIMARY,
    COUNTERS,
    FIXED_POINT_ONE,
    losses_without_each_expert,
    primary_experts,
    primary_votes,
    remote_domains,
    reroute,
    reroute_projection,
    step_counts,
    to_fixed_point,
)


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


def test_primary_experts_by_hand():
    assert primary_experts(WEIGHTS, IDS, 4, select_top_k=1).tolist() == [True, True, False, False]
    valid = torch.tensor([False, True, True])
    assert primary_experts(WEIGHTS, IDS, 4, select_top_k=1, valid_T=valid).tolist() == [False, True, False, False]
    empty = IDS.masked_fill(IDS == 0, -1)  # token 0's heaviest slot
    assert primary_experts(WEIGHTS, empty, 4, select_top_k=1).tolist() == [False, True, False, False]
    for select_top_k in (-1, 0, 2, 3):
        assert not primary_experts(WEIGHTS, IDS, 4, select_top_k=select_top_k).any()


def test_primary_experts_of_other_ranks_by_hand():
    def step(primary, ids=IDS, **settings):
        primary_E = torch.tensor([expert in primary for expert in range(4)])
        new = reroute(WEIGHTS, ids, SIMILARITY, select_top_k=1, primary_E=primary_E, **settings)
        counts = step_counts(WEIGHTS, ids, new, select_top_k=1, num_experts=4, primary_E=primary_E).tolist()
        names = ("rerouted_slots", "critical_slots", "active_experts_before", "active_experts_after")
        return new.tolist(), [counts[COUNTERS.index(name)] for name in names]

    assert step({0, 1}) == ([[1, 0], [1, 0], [1, 0]], [2, 0, 4, 2])  # as without other ranks
    # Some other rank votes for 3: it stays here too, and 2 is most like it (0.6).
    assert step({0, 1, 3}) == ([[3, 0], [1, 3], [1, 0]], [1, 0, 4, 3])
    # Nobody on this rank chose 3; now it runs.
    assert step({0, 1, 3}, IDS.masked_fill(IDS == 3, 1)) == ([[3, 0], [1, 1], [1, 0]], [1, 0, 3, 3])
    # 2 is too little like 3: critical. 3 is not, though it is in no heaviest slot here.
    assert step({0, 1, 3}, threshold=0.7) == ([[2, 0], [1, 3], [1, 0]], [0, 1, 4, 4])


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


def in_votes(value):
    return min(round(float(np.float32(value)) * 2**24), 2**40)


def projection_oracle(step, size, coefficient, domain, home, price, expert_price=0.0):
    """The definition of policy projection, slot by slot, in float32."""
    weights, ids, similarity = step["weights"].float().numpy(), step["ids"].tolist(), step["similarity"].numpy()
    select_top_k, valid, num_slots = step["select_top_k"], step["valid"].tolist(), len(ids[0]) if ids else 0
    new_weights, new_ids = weights.copy(), [list(row) for row in ids]
    if not 0 < select_top_k < num_slots:
        return new_weights, new_ids
    order = [sorted(range(num_slots), key=lambda k, row=row: (-row[k], k)) for row in weights]
    primary = {ids[t][k] for t in range(len(ids)) if valid[t] for k in order[t][:select_top_k]} - {-1}
    if expert_price:
        losses = dict.fromkeys(range(len(similarity)), 0)
        for t, row in enumerate(ids):
            for k, expert in enumerate(row):
                if valid[t] and expert >= 0:
                    losses[expert] += in_votes(weights[t][k] * weights[t][k] * size[expert])
        primary |= {expert for expert, votes in losses.items() if votes >= max(1, in_votes(expert_price))}
    rho, price = np.float32(step["threshold"]), np.float32(price)

    def similar(e, p):
        return np.float32(1) if e == p else similarity[e][p]

    def is_critical(e):
        return e not in primary and rho > 0 and max(similar(e, p) for p in primary) < rho

    for t, row in enumerate(ids):
        if not valid[t] or not primary:
            continue
        settling = [k for k in order[t][select_top_k:] if row[k] >= 0 and not is_critical(row[k])]
        visited = {domain[row[k]] for k in range(num_slots) if row[k] >= 0 and k not in settling} if domain else set()
        if domain and home:
            visited.add(home[t])
        for k in settling:
            e, loss = row[k], weights[t][k] * weights[t][k] * size[row[k]]
            options = [(loss, 1, 0, -1)]  # cost; dropping is last; the larger similarity; the lower id
            for p in primary:
                traffic = price if domain and domain[p] not in visited else np.float32(0)
                options.append((loss * (1 - similar(e, p)) + traffic, 0, -similar(e, p), p))
            choice = min(options)[-1]
            new_ids[t][k] = choice
            if choice < 0:
                new_weights[t][k] = 0
            else:
                new_weights[t][k] = weights[t][k] * (np.float32(1) if choice == e else coefficient[e][choice])
                visited.add(domain[choice] if domain else None)
    return new_weights, new_ids


@given(
    steps(),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.01, 0.1, 1.0, 5.0]),
    st.sampled_from([0.0, 1e-9, 0.1, 0.25, 0.5, 1.0, 2.0, 1e30]),
    st.sampled_from([0, 1, 2, 5]),
    st.booleans(),
)
def test_projection_equals_the_definition(step, seed, price, expert_price, domains, has_home):
    generator = torch.Generator().manual_seed(seed)
    num_experts, num_tokens = len(step["similarity"]), len(step["ids"])
    size = torch.rand(num_experts, generator=generator) * 2
    size = (size * 4).round() / 4 if seed % 2 else size  # what is lost may be the price
    coefficient = torch.rand(num_experts, num_experts, generator=generator) * 2
    domain = torch.randint(domains, (num_experts,), generator=generator) if domains else None
    home = torch.randint(-1, domains, (num_tokens,), generator=generator) if domains and has_home else None
    before = {name: value.clone() for name, value in step.items() if isinstance(value, torch.Tensor)}
    weights, ids = reroute_projection(
        step["weights"],
        step["ids"],
        step["similarity"],
        coefficient,
        size,
        select_top_k=step["select_top_k"],
        threshold=step["threshold"],
        expert_price=expert_price,
        traffic_price=price,
        domain_E=domain,
        home_T=home,
        valid_T=step["valid"],
    )
    lists = [None if tensor is None else tensor.tolist() for tensor in (domain, home)]
    tables = (size.numpy(), coefficient.numpy())
    expected_weights, expected_ids = projection_oracle(step, *tables, *lists, price, expert_price)
    assert ids.tolist() == expected_ids
    expected = torch.from_numpy(expected_weights)
    changed = expected != step["weights"].float()
    assert torch.equal(weights, torch.where(changed, expected.to(weights.dtype), step["weights"]))
    assert weights.dtype == step["weights"].dtype and ids.dtype == step["ids"].dtype
    assert all(torch.equal(step[name], value) for name, value in before.items()), "inputs were changed"


@given(steps(), st.integers(0, 6), st.sampled_from([0.0, 1e-9, 0.1, 0.5, 2.0]), st.integers(0, 2**32))
def test_ranks_that_unite_act_as_one(step, rows_of_first, expert_price, seed):
    """Two ranks with a share of the tokens each do to these what one rank does to all."""
    generator = torch.Generator().manual_seed(seed)
    num_experts = len(step["similarity"])
    tables = (torch.rand(num_experts, num_experts, generator=generator), torch.rand(num_experts, generator=generator))
    common = {"select_top_k": step["select_top_k"], "threshold": step["threshold"]}

    def united(price):
        votes_E = torch.zeros(num_experts, dtype=torch.int64)
        for rows in ranks:
            masks = {"select_top_k": step["select_top_k"], "valid_T": step["valid"][rows]}
            tokens, priced = (step["weights"][rows], step["ids"][rows]), {"expert_price": price, "size_E": tables[1]}
            votes_E += primary_votes(*tokens, num_experts, **priced, **masks)
        return votes_E >= to_fixed_point(price)

    def rerouted(rows, unites):
        tokens, masks = (step["weights"][rows], step["ids"][rows]), {"valid_T": step["valid"][rows]}
        papers, priced = (united(price) if unites else None for price in (0.0, expert_price))
        ids = reroute(*tokens, step["similarity"], **common, **masks, primary_E=papers)
        masks |= {"expert_price": expert_price, "primary_E": priced}
        return ids, *reroute_projection(*tokens, step["similarity"], *tables, **common, **masks)

    ranks = (slice(rows_of_first), slice(rows_of_first, None))
    together = [torch.cat(parts) for parts in zip(*(rerouted(rows, True) for rows in ranks), strict=True)]
    assert all(map(torch.equal, together, rerouted(slice(None), False)))


def test_votes_by_hand():
    """Three tokens, the last not valid. With S = 1 the floor is 0 and 1; 2 and 3 are bought by what they would lose."""
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.75, 0.5, 0.5], [1.0, 1.0, 1.0]])
    ids, size = torch.tensor([[0, 2, 3], [1, 2, -1], [3, 3, 3]]), torch.tensor([1.0, 1.0, 2.0, 4.0])
    valid = torch.tensor([True, True, False])
    losses = [1 / 4, 9 / 16, 2 / 16 + 2 / 4, 4 / 16]
    assert losses_without_each_expert(weights, ids, size, valid[:, None]).tolist() == [
        round(loss * FIXED_POINT_ONE) for loss in losses
    ]

    def primary(price, **settings):
        settings = {"select_top_k": 1, "expert_price": price, "size_E": size, "valid_T": valid} | settings
        return primary_experts(weights, ids, 4, **settings).int().tolist()

    assert primary(0) == primary(0.626) == primary(1e9) == primary(1e300) == [1, 1, 0, 0]
    assert primary(0.625) == primary(0.251) == [1, 1, 1, 0], "as much as the price is enough"
    assert primary(0.25) == primary(1e-9) == primary(1e-300) == [1, 1, 1, 1]
    assert primary(1e-9, valid_T=torch.tensor([False, True, False])) == [0, 1, 1, 0]
    assert primary(1e-9, size_E=torch.tensor([1.0, 1.0, torch.nan, 0.0])) == [1, 1, 0, 0]
    for select_top_k in (-1, 0, 3, 4):
        assert primary(1e-9, select_top_k=select_top_k) == [0] * 4


def test_sums_of_votes_are_exact():
    """Float32 would lose the small ones: 2^18 losses of 2^-24 beside one of 2^15."""
    weights = torch.cat([torch.full((2**18, 1), 2.0**-12), torch.full((1, 1), 2.0**7.5)]).float()
    ids = torch.zeros(len(weights), 1, dtype=torch.int32)
    big = round(float(weights[-1, 0] * weights[-1, 0]) * FIXED_POINT_ONE)
    for order in (torch.arange(len(ids)), torch.arange(len(ids)).flip(0)):
        votes = losses_without_each_expert(weights[order], ids, torch.ones(1), torch.ones(1, dtype=torch.bool))
        assert votes.tolist() == [2**18 + big]
    huge = torch.full((4096, 1), 1e30)
    assert losses_without_each_expert(huge, ids[:4096], torch.ones(1), torch.ones(1, dtype=torch.bool)).tolist() == [
        4096 * ALWAYS_PRIMARY
    ]


def test_steps_of_a_batch_by_vmap():
    """As `evaluation` re-routes them."""
    generator = torch.Generator().manual_seed(0)
    weights, similarity = torch.rand(5, 8, 4, generator=generator), torch.rand(16, 16, generator=generator)
    ids, tables = torch.randint(-1, 16, (5, 8, 4), generator=generator), (similarity, similarity, torch.ones(16))

    def step(weights_TK, ids_TK):
        return reroute_projection(weights_TK, ids_TK, *tables, select_top_k=1, expert_price=0.4)

    together, alone = torch.vmap(step)(weights, ids), [step(*each) for each in zip(weights, ids, strict=True)]
    assert all(map(torch.equal, together, map(torch.stack, zip(*alone, strict=True))))


@given(steps(), st.sampled_from([1, 2, 3]))
def test_what_the_cheapest_experts_change(step, select_top_k):
    """Nothing, as every expert is worth running; and one too dear for any changes nothing of the policy's."""
    num_experts = len(step["similarity"])
    generator = torch.Generator().manual_seed(num_experts)
    coefficient, size = torch.rand(num_experts, num_experts, generator=generator), torch.ones(num_experts)
    unlike = step["similarity"] * 0.9  # no expert is another's twin
    tokens, settings = (step["weights"], step["ids"]), {"select_top_k": select_top_k, "valid_T": step["valid"]}

    def rerouted(price):
        return reroute_projection(*tokens, unlike, coefficient, size, expert_price=price, **settings)

    cheap = rerouted(1e-9)
    assert all(map(torch.equal, cheap, tokens))
    counts = step_counts(*tokens, cheap[1], num_experts=num_experts, expert_price=1e-9, size_E=size, **settings)
    assert not counts[COUNTERS.index("critical_slots")]
    assert all(map(torch.equal, rerouted(1e5), rerouted(0)))


# With S = 1 the primary experts are 0, 1 and 2; tokens 0 and 1 settle expert 3. Two ranks hold two experts each.
PRICED_WEIGHTS, PRICED_IDS = torch.tensor([[0.5, 0.4], [0.6, 0.5], [0.7, 0.3]]), torch.tensor([[0, 3], [1, 3], [2, -1]])
PRICED = {
    "similarity_EE": torch.tensor([[1.0] * 4, [1.0] * 4, [1.0] * 4, [0.5, 0.6, 0.9, 1.0]]),
    "coefficient_EE": torch.full((4, 4), 2.0),
    "size_E": torch.ones(4),
    "domain_E": torch.tensor([0, 0, 1, 1]),
    "select_top_k": 1,
}


def test_a_priced_step_by_hand():
    def rerouted(price):
        weights, ids = reroute_projection(PRICED_WEIGHTS, PRICED_IDS, **PRICED, traffic_price=price)
        return [(round(w, 6), i) for w, i in zip(weights[:2, 1].tolist(), ids[:2, 1].tolist(), strict=True)]

    # Quality alone: 3 is most like 2, and its weight doubles.
    assert rerouted(0) == [(0.8, 2), (1.0, 2)]
    # Going to rank 1 costs more than the likeness of 2 saves: 0.16 (0.4 - 0.1) < 0.06 < 0.25 (0.4 - 0.1) = 0.075.
    assert rerouted(0.06) == [(0.8, 1), (1.0, 2)]
    assert rerouted(0.08) == [(0.8, 1), (1.0, 1)]
    # Rank 0 is dear only for a token that has no other business there; nobody drops.
    weights, ids = reroute_projection(
        PRICED_WEIGHTS, PRICED_IDS, **PRICED | {"domain_E": torch.tensor([0, 1, 2, 3])}, traffic_price=0.2
    )
    assert ids.tolist() == [[0, 0], [1, 1], [2, -1]] and weights[2].tolist() == PRICED_WEIGHTS[2].tolist()


def test_a_priced_step_with_primary_experts_of_other_ranks_by_hand():
    def rerouted(price):
        everyone = torch.ones(4, dtype=torch.bool)  # some other rank votes for 3
        tokens = (PRICED_WEIGHTS, PRICED_IDS)
        weights, ids = reroute_projection(*tokens, **PRICED, traffic_price=price, primary_E=everyone)
        counts = step_counts(*tokens, ids, select_top_k=1, num_experts=4, primary_E=everyone).tolist()
        slots = [(round(w, 6), i) for w, i in zip(weights[:2, 1].tolist(), ids[:2, 1].tolist(), strict=True)]
        return slots, counts[COUNTERS.index("active_experts_after")]

    assert rerouted(0) == ([(0.4, 3), (0.5, 3)], 4)
    # A slot may leave a primary expert for the traffic: 0.16 (1 - 0.6) = 0.064 < 0.08 < 0.25 (1 - 0.6) = 0.1.
    assert rerouted(0.08) == ([(0.8, 1), (0.5, 3)], 4)
    assert rerouted(0.11) == ([(0.8, 1), (1.0, 1)], 3)  # 3 is primary, but no longer runs for this rank


def test_a_slot_is_dropped_where_every_substitute_costs_more():
    weights, ids = reroute_projection(
        torch.tensor([[0.5, 0.4], [0.6, -1.0]]),
        torch.tensor([[0, 3], [1, -1]]),
        **PRICED | {"similarity_EE": torch.eye(4), "domain_E": torch.tensor([0, 1, 2, 3])},
        traffic_price=0.5,
    )
    # No likeness: substituting by 0, where the token is anyway, costs what dropping does; dropping comes last.
    assert ids.tolist() == [[0, 0], [1, -1]]
    weights, ids = reroute_projection(
        torch.tensor([[0.5, 0.4], [0.6, 0.5]]),
        torch.tensor([[-1, 3], [1, -1]]),
        **PRICED | {"domain_E": torch.tensor([0, 1, 2, 3])},
        traffic_price=0.5,
    )
    assert ids.tolist() == [[-1, -1], [1, -1]] and weights.tolist()[0][1] == 0


def test_domains_of_uniform_routing():
    """Design check: with 8 of 128 experts chosen uniformly a token visits 3.63 of 4 ranks, and 5.34 of 8."""
    ids = torch.rand(20_000, 128, generator=torch.Generator().manual_seed(0)).topk(8).indices
    for ranks, expected in ((4, 3.63), (8, 5.34)):
        exact = ranks * (1 - comb(128 - 128 // ranks, 8) / comb(128, 8))
        assert round(exact, 2) == expected
        domain = torch.arange(128) // (128 // ranks)
        visited = remote_domains(ids, domain).double()
        assert abs(visited.mean() - exact) < 4 * visited.std() / len(ids) ** 0.5
        counts = step_counts(torch.rand(ids.shape), ids, ids, select_top_k=2, num_experts=128, domain_E=domain)
        assert counts[COUNTERS.index("domains_before")] == visited.sum()


def test_step_counts_by_hand():
    ids, new = torch.tensor([[0, 3], [1, 2], [2, 3]]), torch.tensor([[0, 1], [1, -1], [2, 3]])
    weights = torch.tensor([[0.6, 0.4]] * 3)
    valid, domain = torch.tensor([True, True, False]), torch.tensor([0, 0, 1, 1])
    counts = step_counts(
        weights, ids, new, select_top_k=1, num_experts=4, valid_T=valid, domain_E=domain, home_T=torch.zeros(3)
    )
    assert dict(zip(COUNTERS, counts.tolist(), strict=True)) == {
        "steps": 1,
        "rows": 2,
        "rerouted_slots": 1,
        "critical_slots": 0,
        "dropped_slots": 1,
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
    }
    critical = step_counts(weights, ids, ids, select_top_k=1, num_experts=4, valid_T=valid)
    assert dict(zip(COUNTERS, critical.tolist(), strict=True))["critical_slots"] == 2
    assert not step_counts(weights, ids, ids, select_top_k=1, num_experts=4, valid_T=~valid & False).any()


def test_experts_of_each_rank_by_hand():
    ids, new = torch.tensor([[0, 3], [1, 2], [2, 3]]), torch.tensor([[0, 1], [1, -1], [2, 3]])
    common = {"select_top_k": 1, "num_experts": 4, "valid_T": torch.tensor([True, True, False])}
    ranks = {"rank_E": torch.tensor([2, 0, 0, 1], dtype=torch.int16), "num_ranks": 4}
    counts = step_counts(torch.tensor([[0.6, 0.4]] * 3), ids, new, **common, **ranks)
    counters = dict(zip(COUNTERS, counts.tolist(), strict=False))
    # Before, all run: two of them on rank 0. After, 0 and 1 do.
    assert (counters["largest_rank_before"], counters["largest_rank_after"]) == (2, 1)
    assert counts[len(COUNTERS) :].tolist() == [1, 0, 1, 0]


def test_domains_and_slots_by_hand():
    """Token 0 is at home in domain 1 and sends two slots to domain 0; token 1 has no home; token 2 is not valid."""
    ids = torch.tensor([[0, 1, 2, 3], [3, 3, -1, 2], [0, 1, 2, 3]])
    new = torch.tensor([[0, 1, -1, 2], [3, 3, -1, 3], [0, 1, 2, 3]])
    counts = step_counts(
        torch.rand(3, 4),
        ids,
        new,
        select_top_k=1,
        num_experts=4,
        valid_T=torch.tensor([True, True, False]),
        domain_E=torch.tensor([0, 0, 1, 2]),
        home_T=torch.tensor([1, -1, 0]),
    )
    assert dict(list(zip(COUNTERS, counts.tolist(), strict=True))[COUNTERS.index("domains_before") :]) == {
        "domains_before": 3 + 2,
        "domains_after": 2 + 1,
        "remote_domains_before": 2 + 2,
        "remote_domains_after": 1 + 1,
        "remote_slots_before": 3 + 3,
        "remote_slots_after": 2 + 3,
    }

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sere_dist.method.counters import COUNTERS, count_step
from sere_dist.method.fixed_point import ALWAYS_PRIMARY, FIXED_POINT_ONE
from sere_dist.method.projection import (
    losses_without_each_expert,
    primary_by_price,
    primary_losses,
    reroute_projection,
    worth_running,
)
from sere_dist.method.records import ExpertPlaces, LayerTables, Settings, Step
from sere_dist.method.rerouting import replace_experts, reroute, substitutes
from sere_dist.method.slots import fill_dropped
from tests.support.decode_steps import drawn_steps


def in_fixed_point(value):
    return min(round(float(np.float32(value)) * 2**24), 2**40)


def oracle(drawn, tables, prices, domain, home, chance):
    """The definition of policy projection, slot by slot, in float32."""
    weights, ids, similarity = drawn.step.weights_TK.float().numpy(), drawn.step.ids_TK.tolist(), tables[0].numpy()
    coefficient, size, (expert_price, price) = tables[1].numpy(), tables[2].numpy(), prices
    select_top_k, valid, num_slots = drawn.select_top_k, drawn.step.valid_T.tolist(), len(ids[0]) if ids else 0
    new_weights, new_ids = weights.copy(), [list(row) for row in ids]
    if not (0 < select_top_k < num_slots or (select_top_k == 0 and expert_price)):
        return new_weights, new_ids
    order = [sorted(range(num_slots), key=lambda k, row=row: (-row[k], k)) for row in weights]
    primary = {ids[t][k] for t in range(len(ids)) if valid[t] for k in order[t][:select_top_k]} - {-1}
    if expert_price:
        losses = dict.fromkeys(range(len(similarity)), 0)
        for t, row in enumerate(ids):
            for k, expert in enumerate(row):
                if valid[t] and expert >= 0:
                    losses[expert] += in_fixed_point(weights[t][k] * weights[t][k] * size[expert] * chance[t])
        primary |= {expert for expert, loss in losses.items() if loss >= ALWAYS_PRIMARY}
        enough = max(1, in_fixed_point(expert_price))

        def left(e, others):
            best = max((similarity[e][p] for p in others if p != e), default=np.float32(0))
            return np.float32(losses[e]) * (np.float32(1) - max(np.float32(best), np.float32(0)))

        if enough < ALWAYS_PRIMARY:
            must = set(primary)
            beside = {e: (0, -left(e, must), e) for e in losses if e not in must} | {e: (-1, 0, e) for e in must}
            in_order = sorted(beside, key=lambda e: beside[e])
            primary |= {e for i, e in enumerate(in_order) if int(left(e, in_order[:i])) >= enough}
        if select_top_k == 0 and not primary and max(losses.values()) > 0:
            primary = {max(losses, key=lambda e: (np.float32(losses[e]), -e))}
    rho, price = np.float32(drawn.threshold), np.float32(price)

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
            # cost; dropping is last; the larger similarity; the lower id
            options = [] if k == order[t][0] else [(loss, 1, 0, -1)]
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
    drawn_steps(),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.01, 0.1, 1.0, 5.0]),
    st.sampled_from([0.0, 1e-9, 0.1, 0.25, 0.5, 1.0, 2.0, 1e30]),
    st.sampled_from([0, 1, 2, 5]),
    st.booleans(),
)
def test_equals_the_definition(drawn, seed, traffic_price, expert_price, domains, has_home):
    generator = torch.Generator().manual_seed(seed)
    num_experts, num_tokens = len(drawn.similarity_EE), len(drawn.step.ids_TK)
    size = torch.rand(num_experts, generator=generator) * 2
    size = (size * 4).round() / 4 if seed % 2 else size  # what is lost may be the price
    tables = LayerTables(drawn.similarity_EE, torch.rand(num_experts, num_experts, generator=generator) * 2, size)
    domain = torch.randint(domains, (num_experts,), generator=generator) if domains else None
    home = torch.randint(-1, domains, (num_tokens,), generator=generator) if domains and has_home else None
    numbers = Settings(drawn.select_top_k, drawn.threshold, expert_price, traffic_price)
    chance = torch.rand(num_tokens, generator=generator) if seed % 3 == 0 else None
    before, step = drawn.copy(), drawn.step._replace(home_T=home, chance_T=chance)
    weights, ids = reroute_projection(step, tables, numbers, ExpertPlaces(domain_E=domain))

    lists = [None if tensor is None else tensor.tolist() for tensor in (domain, home)]
    chances = np.ones(num_tokens, dtype=np.float32) if chance is None else chance.numpy()
    expected_weights, expected_ids = oracle(drawn, tables, (expert_price, traffic_price), *lists, chances)
    assert ids.tolist() == expected_ids
    expected = torch.from_numpy(expected_weights)
    changed = expected != step.weights_TK.float()
    assert torch.equal(weights, torch.where(changed, expected.to(weights.dtype), step.weights_TK))
    assert weights.dtype == step.weights_TK.dtype and ids.dtype == step.ids_TK.dtype
    assert drawn.equals(before), "inputs were changed"


@given(drawn_steps(), st.integers(0, 6), st.sampled_from([0.0, 1e-9, 0.1, 0.5, 2.0]), st.integers(0, 2**32))
def test_ranks_that_share_primary_experts_act_as_one(drawn, rows_of_first, expert_price, seed):
    """Two ranks with a share of the tokens each do to these what one rank does to all."""
    generator = torch.Generator().manual_seed(seed)
    num_experts = len(drawn.similarity_EE)
    coefficient, size = (
        torch.rand(num_experts, num_experts, generator=generator),
        torch.rand(num_experts, generator=generator),
    )
    tables = LayerTables(drawn.similarity_EE, coefficient, size)
    papers, priced = (Settings(drawn.select_top_k, drawn.threshold, price) for price in (0.0, expert_price))
    both = (slice(rows_of_first), slice(rows_of_first, None))

    def of_rows(rows):
        return Step(*(each[rows] for each in drawn.step[:3]))

    def shared(numbers):
        losses_E = sum(primary_losses(of_rows(rows), tables, numbers) for rows in both)
        return worth_running(losses_E, tables, numbers)

    def on_this_rank(rows):
        step = of_rows(rows)
        substitute_E = substitutes(tables.similarity_EE, shared(papers), drawn.threshold)
        ids = replace_experts(step.ids_TK, substitute_E, step.valid_T)
        return ids, *reroute_projection(step, tables, priced, primary_E=shared(priced))

    weights, ids, valid, *_ = drawn.step
    alone = reroute(
        weights, ids, tables.similarity_EE, select_top_k=drawn.select_top_k, threshold=drawn.threshold, valid_T=valid
    )
    alone = alone, *reroute_projection(drawn.step, tables, priced)
    joined = [torch.cat(parts) for parts in zip(*map(on_this_rank, both), strict=True)]
    assert all(map(torch.equal, joined, alone))


def test_losses_by_hand():
    """Three tokens, the last not valid. With S = 1 the floor is 0 and 1; 2 and 3 are bought by what they would lose."""
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.75, 0.5, 0.5], [1.0, 1.0, 1.0]])
    ids, size = torch.tensor([[0, 2, 3], [1, 2, -1], [3, 3, 3]]), torch.tensor([1.0, 1.0, 2.0, 4.0])
    step = Step(weights, ids, torch.tensor([True, True, False]))
    losses = [1 / 4, 9 / 16, 2 / 16 + 2 / 4, 4 / 16]
    assert losses_without_each_expert(step, size).tolist() == [round(loss * FIXED_POINT_ONE) for loss in losses]
    drafted = step._replace(chance_T=torch.tensor([1.0, 0.5, 1.0]))  # the second token is used half of the time
    losses = [1 / 4, 9 / 32, 2 / 16 + 1 / 4, 4 / 16]
    assert losses_without_each_expert(drafted, size).tolist() == [round(loss * FIXED_POINT_ONE) for loss in losses]

    def primary(price, select_top_k=1, size=size, step=step):
        tables = LayerTables(torch.eye(4), torch.eye(4), size)
        return primary_by_price(step, tables, Settings(select_top_k, expert_price=price)).int().tolist()

    assert primary(0) == primary(0.626) == primary(1e9) == primary(1e300) == [1, 1, 0, 0]
    assert primary(0.625) == primary(0.251) == [1, 1, 1, 0], "as much as the price is enough"
    assert primary(0.25) == primary(1e-9) == primary(1e-300) == [1, 1, 1, 1]
    assert primary(1e-9, step=step._replace(valid_T=torch.tensor([False, True, False]))) == [0, 1, 1, 0]
    assert primary(1e-9, size=torch.tensor([1.0, 1.0, torch.nan, 0.0])) == [1, 1, 0, 0]
    for select_top_k in (-1, 3, 4):
        assert primary(1e-9, select_top_k) == [0] * 4
    assert primary(0.251, 0) == [0, 1, 1, 0] and primary(0, 0) == [0] * 4, "without a price S = 0 is off"
    assert primary(0.626, 0) == primary(1e300, 0) == [0, 0, 1, 0], "one runs whatever the price"


def test_without_safe_slots_the_heaviest_moves_but_is_never_dropped():
    """Expert 1 runs. Nothing else is like 0 or 2: the heaviest slot of a token goes to 1 all the same."""
    step = Step(torch.tensor([[0.5, 0.4], [0.9, 0.1]]), torch.tensor([[0, 2], [1, 2]]))
    similarity = torch.eye(4)
    similarity[0, 1], similarity[2, 1] = -0.5, -0.5
    tables = LayerTables(similarity, torch.full((4, 4), 0.5), torch.ones(4))
    weights, ids = reroute_projection(step, tables, Settings(0, expert_price=0.5))
    assert ids.tolist() == [[1, -1], [1, -1]]
    assert weights.tolist() == [[0.25, 0.0], [torch.tensor(0.9).item(), 0.0]]
    assert fill_dropped(step, ids).tolist() == [[1, 1], [1, 1]], "and a dropped slot goes where it went"


def test_what_other_rows_run_is_primary_by_hand():
    """The row of a prompt runs expert 3: a slot that names it stays, and under the paper's policy it does not count."""
    step = Step(
        torch.tensor([[0.5, 0.4], [0.6, 0.5], [0.9, 0.1]]),
        torch.tensor([[0, 3], [1, 2], [3, -1]]),
        valid_T=torch.tensor([True, True, False]),
    )
    beside = step._replace(runs_T=torch.tensor([False, False, True]))
    tables = LayerTables(0.5 + torch.eye(4) / 2, torch.ones(4, 4), torch.ones(4))
    assert primary_by_price(step, tables, Settings(1)).tolist() == [True, True, False, False]
    assert primary_by_price(beside, tables, Settings(1)).tolist() == [True, True, False, True]
    assert reroute_projection(step, tables, Settings(1))[1].tolist() == [[0, 0], [1, 0], [3, -1]]
    assert reroute_projection(beside, tables, Settings(1))[1].tolist() == [[0, 3], [1, 0], [3, -1]]
    assert primary_losses(beside, LayerTables(torch.eye(4)), Settings(1))[3] == 0
    assert primary_losses(beside, tables, Settings(2)).tolist() == [0] * 4, "off"


def test_a_place_by_hand():
    """Two ranks run one expert each in any case. A second one on both is worth 0.25 + 0.16."""
    step = Step(torch.tensor([[0.9, 0.5], [0.9, 0.4]]), torch.tensor([[0, 1], [2, 3]]))
    tables = LayerTables(torch.eye(4), torch.eye(4), torch.ones(4))
    ranks = ExpertPlaces(torch.tensor([0, 0, 1, 1]), 2)

    def primary(balance_price, expert_price=0.0, places=ranks):
        prices = {"expert_price": expert_price, "balance_price": balance_price}
        return primary_by_price(step, tables, Settings(1, **prices), places).tolist()

    neither, both = [True, False, True, False], [True] * 4
    assert primary(0.4) == both and primary(0.42) == neither
    assert primary(0.2, 0.1) == both and primary(0.22, 0.1) == neither, "the price of both experts comes off"
    assert primary(0.04, 0.2) == [True, True, True, False] and primary(0.06, 0.2) == neither
    assert primary(0.4, places=ExpertPlaces()) == neither, "without ranks there are no places"
    assert primary(0.0) == neither, "without a price S alone decides"
    assert reroute_projection(step, tables, Settings(1, balance_price=0.4), ranks)[1].tolist() == [[0, 1], [2, 3]]


def test_what_substitutes_make_good_needs_no_expert():
    """The step would lose 1 without 2 and 0.8 without 3. Beside 0, 0.4 of 2 is left; beside 2, 0.2 of 3."""
    weights, ids = torch.tensor([[2.0, 1.0, 0.8**0.5]]), torch.tensor([[0, 2, 3]])
    similarity = torch.eye(4)
    similarity[2, 0], similarity[3, 2] = 0.6, 0.75
    tables = LayerTables(similarity, torch.ones(4, 4), torch.ones(4))

    def primary(price):
        return primary_by_price(Step(weights, ids), tables, Settings(1, expert_price=price)).tolist()

    assert primary(0.81) == [True, False, False, False]
    assert primary(0.41) == [True, False, False, True], "3 comes first"
    assert primary(0.39) == primary(0.19) == [True, False, True, True]
    similarity[2, 0] = 0.1
    assert primary(0.41) == [True, False, True, False], "2 comes first, and then makes good most of 3"
    similarity[2, 0], similarity[2, 3] = 0.2, 0.75
    assert primary(0.21) == [True, False, True, False], "of equal ones the lower id comes first"


def test_sums_of_losses_are_exact():
    """Float32 would lose the small ones: 2^18 losses of 2^-24 beside one of 2^15."""
    weights = torch.cat([torch.full((2**18, 1), 2.0**-12), torch.full((1, 1), 2.0**7.5)]).float()
    ids = torch.zeros(len(weights), 1, dtype=torch.int32)
    big = round(float(weights[-1, 0] * weights[-1, 0]) * FIXED_POINT_ONE)
    for order in (torch.arange(len(ids)), torch.arange(len(ids)).flip(0)):
        assert losses_without_each_expert(Step(weights[order], ids), torch.ones(1)).tolist() == [2**18 + big]
    huge = Step(torch.full((4096, 1), 1e30), ids[:4096])
    assert losses_without_each_expert(huge, torch.ones(1)).tolist() == [4096 * ALWAYS_PRIMARY]


def test_steps_of_a_batch_by_vmap():
    """As `evaluation` re-routes them."""
    generator = torch.Generator().manual_seed(0)
    weights, similarity = torch.rand(5, 8, 4, generator=generator), torch.rand(16, 16, generator=generator)
    ids, tables = torch.randint(-1, 16, (5, 8, 4), generator=generator), (similarity, similarity, torch.ones(16))

    def step(weights_TK, ids_TK):
        return reroute_projection(Step(weights_TK, ids_TK), LayerTables(*tables), Settings(1, expert_price=0.4))

    together, alone = torch.vmap(step)(weights, ids), [step(*each) for each in zip(weights, ids, strict=True)]
    assert all(map(torch.equal, together, map(torch.stack, zip(*alone, strict=True))))


@given(drawn_steps(), st.sampled_from([1, 2, 3]))
def test_what_the_cheapest_experts_change(drawn, select_top_k):
    """Nothing, as every expert is worth running; and one too dear for any changes nothing of the policy's."""
    num_experts, step = len(drawn.similarity_EE), drawn.step
    generator = torch.Generator().manual_seed(num_experts)
    coefficient, size = torch.rand(num_experts, num_experts, generator=generator), torch.ones(num_experts)
    tables = LayerTables(drawn.similarity_EE * 0.9, coefficient, size)  # no expert is another's twin

    def rerouted(price):
        return reroute_projection(step, tables, Settings(select_top_k, expert_price=price))

    cheap = rerouted(1e-9)
    assert all(map(torch.equal, cheap, step[:2]))
    primary_E = primary_by_price(step, tables, Settings(select_top_k, expert_price=1e-9))
    assert not count_step(step, cheap[1], primary_E)[COUNTERS.index("critical_slots")]
    assert all(map(torch.equal, rerouted(1e5), rerouted(0)))


# With S = 1 the primary experts are 0, 1 and 2; tokens 0 and 1 settle expert 3. Two ranks hold two experts each.
STEP = Step(torch.tensor([[0.5, 0.4], [0.6, 0.5], [0.7, 0.3]]), torch.tensor([[0, 3], [1, 3], [2, -1]]))
TABLES = LayerTables(
    torch.tensor([[1.0] * 4, [1.0] * 4, [1.0] * 4, [0.5, 0.6, 0.9, 1.0]]), torch.full((4, 4), 2.0), torch.ones(4)
)
TWO_RANKS, FOUR_RANKS = (ExpertPlaces(domain_E=torch.tensor(domain)) for domain in ([0, 0, 1, 1], [0, 1, 2, 3]))


def test_a_priced_step_by_hand():
    def rerouted(price):
        weights, ids = reroute_projection(STEP, TABLES, Settings(1, traffic_price=price), TWO_RANKS)
        return [(round(w, 6), i) for w, i in zip(weights[:2, 1].tolist(), ids[:2, 1].tolist(), strict=True)]

    # Quality alone: 3 is most like 2, and its weight doubles.
    assert rerouted(0) == [(0.8, 2), (1.0, 2)]
    # Going to rank 1 costs more than the likeness of 2 saves: 0.16 (0.4 - 0.1) < 0.06 < 0.25 (0.4 - 0.1) = 0.075.
    assert rerouted(0.06) == [(0.8, 1), (1.0, 2)]
    assert rerouted(0.08) == [(0.8, 1), (1.0, 1)]
    # Rank 0 is dear only for a token that does not visit it anyway; nobody drops.
    weights, ids = reroute_projection(STEP, TABLES, Settings(1, traffic_price=0.2), FOUR_RANKS)
    assert ids.tolist() == [[0, 0], [1, 1], [2, -1]] and weights[2].tolist() == STEP.weights_TK[2].tolist()


def test_a_priced_step_with_primary_experts_of_other_ranks_by_hand():
    def rerouted(price):
        everyone = torch.ones(4, dtype=torch.bool)  # some other rank claims 3
        weights, ids = reroute_projection(STEP, TABLES, Settings(1, traffic_price=price), TWO_RANKS, everyone)
        counts = count_step(STEP, ids, everyone).tolist()
        slots = [(round(w, 6), i) for w, i in zip(weights[:2, 1].tolist(), ids[:2, 1].tolist(), strict=True)]
        return slots, counts[COUNTERS.index("active_experts_after")]

    assert rerouted(0) == ([(0.4, 3), (0.5, 3)], 4)
    # A slot may leave a primary expert for the traffic: 0.16 (1 - 0.6) = 0.064 < 0.08 < 0.25 (1 - 0.6) = 0.1.
    assert rerouted(0.08) == ([(0.8, 1), (0.5, 3)], 4)
    assert rerouted(0.11) == ([(0.8, 1), (1.0, 1)], 3)  # 3 is primary, but no longer runs for this rank


def test_a_slot_is_dropped_where_every_substitute_costs_more():
    step = Step(torch.tensor([[0.5, 0.4], [0.6, -1.0]]), torch.tensor([[0, 3], [1, -1]]))
    unlike = TABLES._replace(similarity_EE=torch.eye(4))
    _weights, ids = reroute_projection(step, unlike, Settings(1, traffic_price=0.5), FOUR_RANKS)
    # No likeness: substituting by 0, where the token is anyway, costs what dropping does; dropping comes last.
    assert ids.tolist() == [[0, 0], [1, -1]]
    step = Step(torch.tensor([[0.5, 0.4], [0.6, 0.5]]), torch.tensor([[-1, 3], [1, -1]]))
    weights, ids = reroute_projection(step, TABLES, Settings(1, traffic_price=0.5), FOUR_RANKS)
    assert ids.tolist() == [[-1, -1], [1, -1]] and weights.tolist()[0][1] == 0

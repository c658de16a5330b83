"""The study of scheduling: which requests its rules let decode together, and what it measures of that."""

from itertools import combinations, pairwise

import pytest
import torch

from sere_dist.evaluation.lockstep import lockstep
from sere_dist.evaluation.protocol import PROMPT
from sere_dist.evaluation.rerouters import projection_rerouter
from sere_dist.evaluation.traffic import recorded
from sere_dist.method.records import LayerTables
from sere_dist.method.similarity import random_similarity
from studies import scheduling
from studies.grouping import (
    BATCHES,
    BY_ANSWER,
    BY_PROMPT,
    RANDOM,
    SWAPPED,
    WINDOWS,
    Cell,
    arranged,
    cells,
    side_by_side,
    spread,
    swapped,
    without_pause,
)


def two_kinds(kind_of: list[int]) -> torch.Tensor:
    """Returns [N, 4]: requests of kind 0 use the first two experts in each step, those of kind 1 the others."""
    return torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])[kind_of]


def projection_tables(num_experts: int, seed: int) -> LayerTables:
    generator = torch.Generator().manual_seed(seed)
    coefficient_EE = torch.rand(num_experts, num_experts, generator=generator)
    return LayerTables(
        random_similarity(num_experts, seed=seed), coefficient_EE, torch.rand(num_experts, generator=generator) + 0.5
    )


def centred(share_NF: torch.Tensor) -> torch.Tensor:
    return share_NF - share_NF.mean(0)


def expected_union(members_RB: torch.Tensor, share_NF: torch.Tensor) -> float:
    return float((1 - (1 - share_NF[members_RB].double()).prod(dim=1)).sum())


def test_a_request_goes_to_its_like():
    kinds = [0, 1, 1, 0, 1, 0, 0, 1]
    found = spread(centred(two_kinds(kinds)), replicas=2, room=4)
    assert found.tolist() == [[0, 3, 5, 6], [1, 2, 4, 7]]


def test_a_full_replica_takes_no_more():
    found = spread(centred(two_kinds([0, 0, 0, 1, 0, 1])), replicas=2, room=3)
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_even_loads_leave_less_choice():
    profile_NF = torch.randn(24, 10, generator=torch.Generator().manual_seed(0))
    found = spread(profile_NF, replicas=4, room=6, slack=0)
    for place in range(6):  # of each four that come one after the other, each replica gets one
        assert sorted(found[:, place].tolist()) == list(range(4 * place, 4 * place + 4))


def test_swaps_find_the_best_groups():
    share_NF = torch.rand(6, 12, generator=torch.Generator().manual_seed(1)) ** 3
    start = torch.arange(6).view(2, 3)
    found = swapped(start, share_NF)
    assert sorted(found.flatten().tolist()) == list(range(6))
    splits = [
        torch.tensor([mine, [other for other in range(6) if other not in mine]])
        for mine in map(list, combinations(range(6), 3))
    ]
    unions = [expected_union(split, share_NF) for split in splits]
    assert expected_union(found, share_NF) == pytest.approx(min(unions))
    assert min(unions) < expected_union(start, share_NF)


def test_swaps_separate_kinds():
    kinds = [0, 1, 1, 0, 1, 0, 0, 1]
    found = swapped(torch.arange(8).view(2, 4), two_kinds(kinds))
    assert {frozenset(kinds[request] for request in group) for group in found.tolist()} == {
        frozenset({0}),
        frozenset({1}),
    }


def test_steps_side_by_side():
    found = side_by_side(torch.tensor([[4, 2], [0, 1]]), steps=3)
    assert found.text_SB.tolist() == [[4, 2]] * 3 + [[0, 1]] * 3
    assert found.step_SB.tolist() == [[0, 0], [1, 1], [2, 2]] * 2


@pytest.mark.parametrize("window", [1, 2, 6])
def test_requests_decode_without_pause(window):
    profile_NF = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    steps, batch, most = 12, 4, 5
    schedule, passes = without_pause(profile_NF, batch, window, steps, most_passes=most, admit=30)
    assert len(passes) == 30 and max(passes) <= most
    assert (max(passes) == 0) == (window == 1)
    for row in range(batch):
        for (text, step), (next_text, next_step) in pairwise(
            zip(schedule.text_SB[:, row].tolist(), schedule.step_SB[:, row].tolist(), strict=True)
        ):
            same = (next_text, next_step) == (text, step + 1)
            assert same or (step, next_step) == (steps - 1, 0)
    rows = [tuple(sorted(texts)) for texts in schedule.text_SB.tolist()]
    assert all(len({*texts}) == batch and min(texts) >= batch for texts in rows)
    places = list(zip(schedule.text_SB.flatten().tolist(), schedule.step_SB.flatten().tolist(), strict=True))
    assert len({*places}) == len(places), "no step of a request runs twice"
    if window == 1:
        first = list(dict.fromkeys(schedule.text_SB.flatten().tolist()))
        assert sorted(first) == list(range(batch, max(first) + 1))


def test_the_most_similar_of_those_that_wait_is_next():
    profile_NF = centred(two_kinds([0, 0, 0, 0, *([1, 0] * 12)]))
    alike = {}
    for most in (0, 5):
        schedule, passes = without_pause(profile_NF, 4, 8, 12, most_passes=most, admit=16)
        assert max(passes) == most
        alike[most] = float((profile_NF[schedule.text_SB].sum(1).abs().sum(1) / 8).mean())
    assert alike[0] < alike[5]


def test_cells_have_requests_enough():
    found = cells(160)
    assert Cell(8, 16) in found and Cell(2, 64) in found and Cell(4, 64) not in found
    assert all(cell.window is None or cell.batch < 64 for cell in found)
    assert {cell.window for cell in cells(257)} == {None, *WINDOWS} and {cell.batch for cell in cells(257)} == {
        *BATCHES
    }


def test_every_rule_places_every_request():
    generator = torch.Generator().manual_seed(3)
    prompt_NF, answer_NF = torch.rand(2, 90, 6, generator=generator)
    kinds = torch.arange(90) % 3
    for rule, (schedule, _) in arranged(Cell(4, 4), 5, prompt_NF, answer_NF, kinds).items():
        assert sorted(schedule.text_SB[::5].flatten().tolist()) == list(range(16)), rule
    waiting = arranged(Cell(1, 4, 8), 5, prompt_NF, answer_NF, kinds)
    assert {*waiting} == {RANDOM, BY_PROMPT, BY_ANSWER}
    assert max(waiting[RANDOM][1]) == 0 < max(waiting[BY_PROMPT][1]) <= 16


def test_an_oracle_is_better_than_chance():
    kinds = torch.tensor([0, 1]).repeat(8)
    share_NF = two_kinds(kinds.tolist())
    found = arranged(Cell(2, 4), 3, share_NF, share_NF, kinds)
    unions = {rule: expected_union(schedule.text_SB[::3], share_NF) for rule, (schedule, _) in found.items()}
    assert unions[RANDOM] == 8 and unions[BY_PROMPT] == unions[BY_ANSWER] == unions[SWAPPED] == 4


def test_batches_run_what_lockstep_runs(model, heldout_ids):
    """In the first layer, whose inputs no re-routing changed, to the expert; with no re-routing in all layers."""
    ids_BL = heldout_ids[:4, :48]
    found = scheduling.record(model, ids_BL, PROMPT)
    schedule = side_by_side(torch.arange(4)[None], found.steps)
    assert found.steps == 48 - PROMPT - 1
    assert scheduling.active(found, schedule) == pytest.approx(
        lockstep(model, ids_BL, prompt_length=PROMPT).active_experts
    )

    tables = {layer: projection_tables(found.num_experts, seed=layer) for layer in found.routing}
    ran: dict[int, torch.Tensor] = {}
    rerouter = recorded(projection_rerouter(tables, scheduling.TUNED), ran)
    lockstep(model, ids_BL, prompt_length=PROMPT, rerouter=rerouter)
    first = scheduling.Recorded({0: found.routing[0]}, found.prompt_NF, found.answer_NF, found.num_experts)
    counted = [len({*step.flatten().tolist()} - {-1}) for step in ran[0]]
    assert scheduling.active(first, schedule, tables) == pytest.approx(sum(counted) / len(counted))
    assert sum(counted) / len(counted) < 0.8 * scheduling.active(first, schedule)


def test_shares_count_the_tokens_of_prompts_and_answers(model, heldout_ids):
    found = scheduling.record(model, heldout_ids[:2, :48], PROMPT)
    layers, top_k = len(found.routing), model.config.num_experts_per_tok
    for share_NF in (found.prompt_NF, found.answer_NF):
        assert share_NF.shape == (2, layers * found.num_experts)
        torch.testing.assert_close(share_NF.sum(1), torch.full((2,), float(layers * top_k)))
    _, ids_NDK = found.routing[1]
    expert = int(ids_NDK[1, 0, 0])
    share = float((ids_NDK[1] == expert).any(1).float().mean())
    assert float(found.answer_NF[1, found.num_experts + expert]) == pytest.approx(share)


def test_the_verdict_follows_the_rule():
    row = {"batch": 16, "rerouted": True, "rule": BY_PROMPT, "time_saved_h200": 0.01, "time_saved_2-cpu-cores": 0.049}
    others = [row | {"batch": 4}, row | {"rerouted": False}, row | {"rule": SWAPPED}]
    others = [other | {"time_saved_h200": 0.5} for other in others]
    assert not scheduling.verdict([row, *others])["is_worth_it"]
    found = scheduling.verdict([row, *others, row | {"time_saved_h200": 0.05}])
    assert found["is_worth_it"] and found["hardware"] == "h200"

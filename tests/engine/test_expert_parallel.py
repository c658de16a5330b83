"""Expert parallelism in real vLLM: two workers that hold half of the experts each, under tensor parallelism (both see
all tokens) and under data-parallel attention (each has its own tokens, and real dispatch and combine between them).

In float32, so that what one worker computes and what two compute differ in the last bits alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.tiny_moe.data import MODEL, example_texts
from sere_dist.artifact.placement import LayerPlacement, Placement
from tests.support import engines

LAYERS, EXPERTS, TOP_K, HIDDEN, BATCH, PROMPT, NEW = 6, 64, 8, 256, 8, 24, 16
HALVES = [0] * (BATCH // 2) + [1] * (BATCH // 2)  # the rank that each prompt goes to
QUARTERS = [i * 4 // BATCH for i in range(BATCH)]  # likewise, of four
OFF, ON = {"enabled": False}, {"enabled": True}
SHORTER = {"lengths": [NEW] * (BATCH // 2) + [4] * (BATCH // 2)}  # rank 1 runs dry
PRICES = [{"enabled": True, "traffic_price": price} for price in (0.0, 0.02)]
OF_EXPERTS = {**ON, "select_top_k": 1, "traffic_price": 0.0, "balance_price": 0.0}
EXPERT_PRICES = [{**OF_EXPERTS, "expert_price": price} for price in (0.0, 0.02)]
BALANCED = {**EXPERT_PRICES[0], "balance_price": 0.06}
NOTHING_SAFE = {**BALANCED, "select_top_k": 0, "balance_price": 0.5}
# Bytes: a token goes with its weights and ids, all of 4 bytes, and its output comes back.
A_VISIT = 4 * (HIDDEN + TOP_K + TOP_K) + 4 * HIDDEN

Turns = list[dict[str, Any]]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return example_texts("heldout.parquet", PROMPT, BATCH).tolist()


@pytest.fixture(scope="module")
def options(projection_path) -> Callable[..., dict[str, Any]]:
    def options(*, sere: dict[str, Any], **parallel: Any) -> dict[str, Any]:
        return {
            "model": str(MODEL),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "enable_prefix_caching": False,
            "distributed_executor_backend": "mp",
            "additional_config": {"sere": {"artifact": str(projection_path), "select_top_k": 2, **sere}},
            **parallel,
        }

    return options


@pytest.fixture(scope="module")
def papers(options, prompts) -> Turns:
    """One worker that counts as if its experts were on two ranks, the paper's policy: off, on, on with short answers
    for the second half, on for half of the prompts at a time."""
    halves = [{"only": [i for i, home in enumerate(HALVES) if home == rank]} for rank in (0, 1)]
    return engines.run(options(sere={}), prompts, NEW, [{"pretend": [2, HALVES], **OFF}, ON, SHORTER, *halves])


@pytest.fixture(scope="module")
def priced(options, prompts) -> Turns:
    """One worker that prices as if its experts were on two ranks: off and two prices; then the same with homes, and two
    prices of experts, and a price of the largest rank, alone and where no slot is safe."""
    homes = [{"pretend": [2, HALVES], **OFF}, *PRICES, *EXPERT_PRICES, NOTHING_SAFE, BALANCED]
    turns = [{"pretend": [2, None], **OFF}, *PRICES, *homes]
    return engines.run(options(sere={"policy": "projection"}), prompts, NEW, turns)


def tokens(turns: Turns) -> list[list[list[int]]]:
    return [turn["tokens"] for turn in turns]


def total(turn: dict[str, Any], counter: str) -> int:
    """Summed over workers and layers."""
    return sum(layer[counter] for worker in turn["counters"] for layer in worker["layers"].values())


def joined(ranks: list[Turns]) -> Turns:
    """What all data-parallel ranks answered, turn by turn."""
    return [
        {name: [each for turn in turns for each in turn[name]] for name in ("tokens", "counters")}
        for turns in zip(*ranks, strict=True)
    ]


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory) -> Path:
    """A placement of each layer's experts on two ranks, at random."""
    random = torch.Generator().manual_seed(0)
    expected = dict.fromkeys(LayerPlacement.model_fields, 1)  # nobody reads it
    ranks = [torch.randperm(EXPERTS, generator=random).argsort() * 2 // EXPERTS for _ in range(LAYERS)]
    layers = {i: LayerPlacement(**expected | {"rank_of_expert": ranks_E.tolist()}) for i, ranks_E in enumerate(ranks)}
    path = tmp_path_factory.mktemp("placement") / "placement.json"
    placement = Placement(base_model=str(MODEL), num_experts=EXPERTS, num_ranks=2, affinity="similarity", layers=layers)
    placement.save(path)
    return path


def test_tensor_parallel_ranks_with_half_of_the_experts_answer_as_one(options, prompts, papers, shuffled):
    """Wherever the experts were placed."""
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    turns = engines.run(options(sere={"placement": str(shuffled)}, **parallel), prompts, NEW, [OFF, ON])
    assert tokens(turns) == tokens(papers[:2])
    changed = ("largest_rank_after", "active_experts_after")
    assert [total(turns[1], name) for name in changed] != [2 * total(papers[1], name) for name in changed]
    assert total(turns[1], changed[1]) == 2 * total(papers[1], changed[1])
    assert turns[0]["tokens"] != turns[1]["tokens"]
    for turn in turns:
        first, second = turn["counters"]
        assert (first["rank"], second["rank"]) == (0, 1)
        assert first["layers"] == second["layers"], "the ranks do not agree on the primary experts"


@pytest.mark.slow
def test_prices_under_tensor_parallelism(options, prompts, priced):
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    turns = engines.run(options(sere={"policy": "projection"}, **parallel), prompts, NEW, [OFF, *PRICES])
    assert tokens(turns) == tokens(priced[:3])
    for turn, alone in zip(turns, priced[:3], strict=True):
        for worker in turn["counters"]:
            for layer, counted in worker["layers"].items():
                expected = alone["counters"][0]["layers"][layer]
                # The router's weights differ in their last bits, as the sum over ranks has another order.
                error = pytest.approx(expected["estimated_error"], rel=0.01)
                assert counted == expected | {"estimated_error": error}


@pytest.mark.slow
def test_data_parallel_ranks_that_share_the_primary_set_answer_as_one(options, prompts, papers, host_kernels):
    """A rank with nothing to do joins all the same. And so does the backend of GPUs, with the kernel's build for this
    CPU. All-gather dispatch: every byte goes."""
    sere = {"primary_scope": "group"}
    kernel = host_kernels[torch.int32].library._name
    turns = [OFF, ON, SHORTER, {"kernel": [kernel], **OFF}, ON, SHORTER]
    ranks = engines.run_data_parallel(options(sere=sere, enable_expert_parallel=True), prompts, NEW, turns)
    by_cpu, by_kernel = joined(ranks)[:3], joined(ranks)[3:]
    assert tokens(by_cpu) == tokens(by_kernel) == tokens(papers[:3])
    assert [turn["counters"] for turn in by_cpu] == [turn["counters"] for turn in by_kernel]
    off, on, _ = by_cpu
    assert [worker["rank"] for worker in on["counters"]] == [0, 1]
    for counter in ("rows", "rerouted_slots", "domains_after", "remote_domains_after", "remote_slots_after"):
        assert total(on, counter) == total(papers[1], counter), counter
    assert bytes_sent(off) == bytes_sent(on), "all-gather saves no byte"


@pytest.mark.slow
def test_prices_lower_the_bytes_on_the_wire(options, prompts, priced, host_kernels):
    """Sparse dispatch: what is sent follows the remote domains, to the byte.

    Ranks that share the primary set also share what an expert is worth to them, by the backend of GPUs too.
    """
    sere = {"policy": "projection", "primary_scope": "group", "cpu_dispatch": "all_to_all"}
    kernel = host_kernels[torch.int32].library._name
    by_cpu = [OFF, *PRICES, *EXPERT_PRICES, NOTHING_SAFE, BALANCED]
    turns = [*by_cpu, {"kernel": [kernel], **BALANCED}, EXPERT_PRICES[1], NOTHING_SAFE]
    ranks = engines.run_data_parallel(options(sere=sere, enable_expert_parallel=True), prompts, NEW, turns)
    off, free, dear, few_experts, more_experts, nothing_safe, balanced, *by_kernel = together = joined(ranks)
    assert tokens(together[:7]) == tokens(priced[3:])
    assert [balanced, more_experts, nothing_safe] == by_kernel
    largest = [total(turn, "largest_rank_after") for turn in (nothing_safe, few_experts)]
    assert largest[0] < 0.9 * largest[1], "with S = 1 the heaviest slots alone run more"
    assert total(few_experts, "active_experts_after") < total(more_experts, "active_experts_after")
    visits = [total(turn, "remote_domains_after") for turn in together]
    assert visits[:7] == [total(turn, "remote_domains_after") for turn in priced[3:]]
    assert visits[2] < 0.9 * visits[1] <= visits[0]
    by_dispatch = [layer["bytes_by_dispatch"] for worker in dear["counters"] for layer in worker["layers"].values()]
    assert sum(layer["after"]["per_rank"] for layer in by_dispatch) == visits[2] * 2 * 4 * HIDDEN
    assert {layer[when]["all_gather"] for layer in by_dispatch for when in ("before", "after")} == {
        2 * 4 * HIDDEN * BATCH // 2 * (NEW - 1)
    }
    for turn, more in ((free, visits[0] - visits[1]), (dear, visits[0] - visits[2])):
        assert bytes_sent(off) - bytes_sent(turn) == more * A_VISIT


@pytest.mark.slow
def test_four_ranks_answer_as_one(options, prompts):
    """With a quarter of the experts each, in tokens, visits and bytes: under prices of domains, of experts and of the
    largest rank."""
    turns = [OFF, *PRICES, EXPERT_PRICES[1], BALANCED, NOTHING_SAFE]
    sere = {"policy": "projection", "primary_scope": "group", "cpu_dispatch": "all_to_all"}
    ranks = engines.run_data_parallel(options(sere=sere, enable_expert_parallel=True), prompts, NEW, turns, ranks=4)
    four = joined(ranks)
    one = engines.run(
        options(sere={"policy": "projection"}), prompts, NEW, [{"pretend": [4, QUARTERS], **OFF}, *turns[1:]]
    )
    assert tokens(four) == tokens(one)
    visits = [total(turn, "remote_domains_after") for turn in four]
    assert visits == [total(turn, "remote_domains_after") for turn in one]
    assert visits[2] < 0.9 * visits[1] <= visits[0]
    for turn, visited in zip(four, visits, strict=True):
        assert bytes_sent(four[0]) - bytes_sent(turn) == (visits[0] - visited) * A_VISIT


@pytest.mark.slow
def test_a_balance_price_fills_the_smaller_rank(priced):
    """Of the experts that run, the largest rank has half, and more at a price that does not know ranks."""

    def share_of_largest(turn):
        return total(turn, "largest_rank_after") / total(turn, "active_experts_after")

    assert share_of_largest(priced[-1]) < 0.52 < 0.57 < share_of_largest(priced[-3])


@pytest.mark.slow
def test_a_primary_set_of_each_rank_alone(options, prompts, papers):
    """Each data-parallel rank answers as one worker that has its requests alone."""
    ranks = engines.run_data_parallel(options(sere={}, enable_expert_parallel=True), prompts, NEW, [ON])
    assert [turn["tokens"] for (turn,) in ranks] == tokens(papers[3:])
    assert tokens(papers[3:])[0] != papers[1]["tokens"][: BATCH // 2], "company makes no difference: a weak test"


def bytes_sent(turn: dict[str, Any]) -> int:
    return sum(worker["bytes_sent"] for worker in turn["counters"])

"""The tables of the pages in docs/, written from the JSON files that they quote.

python -m studies.tables   # writes them into the page, between their markers
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.smollm2_moe.questions import HELD_OUT_KINDS, KINDS
from studies.common import ENGINES, RESULTS, ROOT, at_kl

PAGES = tuple(ROOT / "docs" / name for name in ("results.md", "log.md", "design.md", "scale.md"))
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
RIVALS = {
    "paper, frobenius": "SERE, the paper's policy",
    "OEA": "OEA",
    "OEA, not renormalised": "OEA, not renormalised",
    "XShare": "XShare",
    "XShare, warm-up 1": "XShare, warm-up 1",
    "XShare, not renormalised": "XShare, warm-up 1, not renormalised",
    "dropping": "dropping",
    "dropping, renormalised": "dropping, renormalised",
    "top-k": "smaller top-k",
    "top-k, renormalised": "smaller top-k, renormalised",
    "projection": "projection (ours), S alone",
    "REAP, pruned": "REAP, the experts pruned for good",
}
PRICED, BATCHES = "expert price, S = 1", (1, 4, 16, 64)
LATER = "dropping-and-top-k"  # folder of the study's second run
NOTHING = 1e-4  # a KL divergence at which a price has changed next to nothing


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plus_minus(row: dict[str, Any], name: str, digits: int = 4, sign: str = "") -> str:
    return f"{row[name]:{sign}.{digits}f} ± {row[name + '_error']:.{digits}f}"


def outcome(row: dict[str, Any]) -> list[str]:
    kept = f"{100 * row['top1']:.1f} ± {100 * row['top1_error']:.1f} %"
    return [f"{row['active_experts']:.1f}", plus_minus(row, "kl"), f"{row['perplexity']:.2f}", kept]


@cache
def field_rows(example: str = "tiny-moe", folder: str = "") -> dict[tuple[int, str, float | None], dict[str, Any]]:
    rows = load(RESULTS / folder / f"quality-{example}.json")["field"]
    return {(row["batch"], row["policy"], row["knob"]): row for row in rows}


def beside_rivals(example: str = "tiny-moe") -> list[dict[str, Any]]:
    """Returns the rows of our policy: beside most rivals, and beside those of a second run of the study."""
    runs = [field_rows(example)]
    if (RESULTS / LATER / f"quality-{example}.json").exists():
        runs.append(field_rows(example, LATER))
    return [row for rows in runs for row in rows.values() if row["policy"] == PRICED]


def quality() -> str:
    """At batch 16: the baseline, every policy at the setting that runs about 24 experts, and the paper's other S."""
    of = field_rows()
    shown: list[tuple[str, tuple[str, float]]] = [
        ("SERE, S = 1", ("paper, frobenius", 1)),
        ("SERE, S = 2", ("paper, frobenius", 2)),
    ]
    shown += [("OEA, k0 = 2", ("OEA", 2)), ("XShare, warm-up 1, budget 24", ("XShare, warm-up 1", 2))]
    shown += [("projection (ours), S = 2", ("projection", 2))]
    shown += [
        ("**projection with `expert_price: 0.02` (ours)**", (PRICED, 0.02)),
        ("SERE, S = 4", ("paper, frobenius", 4)),
    ]
    off = of[16, "off", None]
    rows = [["baseline", f"{off['active_experts']:.1f}", "0", f"{off['perplexity']:.2f}", "100 %"]]
    rows += [[name, *outcome(of[16, *point])] for name, point in shown]
    return markdown(["policy", "active experts", "KL divergence", "perplexity", "likeliest token kept"], rows)


def against_the_field(example: str = "tiny-moe") -> str:
    """The range over all prices of our KL as a factor of a rival's at as many active experts."""
    priced = [row for row in beside_rivals(example) if row["kl"] > NOTHING]
    batches = sorted({row["batch"] for row in priced})
    rows = []
    for name, label in RIVALS.items():
        cells = []
        for batch in batches:
            found = [row["beside"][name]["ratio"] for row in priced if row["batch"] == batch and name in row["beside"]]
            cells.append(f"{min(found):.2f} to {max(found):.2f}" if found else "-")
        if any(cell != "-" for cell in cells):
            rows.append([label, *cells])
    return markdown(["KL as a factor of that of", *(f"batch {batch}" for batch in batches)], rows)


def quality_by_batch(example: str, prices: Sequence[float]) -> str:
    """Every policy of the figures, by batch: active experts and KL divergence."""
    of = field_rows(example)
    batches = sorted({batch for batch, *_ in of})
    shown: list[tuple[str, tuple[str, float]]] = [(f"SERE, S = {s}", ("paper, frobenius", s)) for s in (1, 2, 4)]
    shown += [("SERE with random similarity, S = 2", ("paper, random", 2)), ("OEA, k0 = 2", ("OEA", 2))]
    shown += [("XShare, warm-up 1", ("XShare, warm-up 1", 2)), ("projection (ours), S = 2", ("projection", 2))]
    shown += [(f"`expert_price: {price:g}` (ours)", (PRICED, price)) for price in prices]
    rows = [["baseline", *(f"{of[batch, 'off', None]['active_experts']:.1f}" for batch in batches)]]
    for name, point in shown:
        found = [of[batch, *point] for batch in batches]
        rows.append([name, *(f"{row['active_experts']:.1f} at {plus_minus(row, 'kl')}" for row in found)])
    return markdown(["active experts at KL divergence", *(f"batch {batch}" for batch in batches)], rows)


def smollm2_quality() -> str:
    return quality_by_batch("smollm2-moe", (0.005, 0.02, 0.08))


def smollm2_against_the_field() -> str:
    return against_the_field("smollm2-moe")


def grouped_quality() -> str:
    return quality_by_batch("tiny-grouped", (0.08, 0.16, 0.32))


def grouped_against_the_field() -> str:
    return against_the_field("tiny-grouped")


def pruned() -> str:
    """REAP by the share of the experts' memory that it keeps: active experts and KL divergence at batch 16."""
    examples = {"tiny-moe": "example model", "smollm2-moe": "SmolLM2-MoE", "tiny-grouped": "DeepSeek-V3's kind"}
    of = {example: field_rows(example) for example in examples}
    shares = sorted({knob for _, policy, knob in of["tiny-moe"] if policy == "REAP, pruned" and knob}, reverse=True)
    cells = []
    for share in shares:
        rows = [of[example][16, "REAP, pruned", share] for example in examples]
        cells.append([f"{share:.1%}", *(f"{row['active_experts']:.1f} at {plus_minus(row, 'kl')}" for row in rows)])
    return markdown(["memory of the experts kept", *examples.values()], cells)


def unlike() -> str:
    """What is estimated of a kind of text that neither calibration nor tuning saw, as a factor of what is measured."""
    rows = load(RESULTS / "sensitivity-tiny-moe.json")["unlike"]
    prices = list(dict.fromkeys(row["price"] for row in rows))
    cells = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of = {row["price"]: row for row in rows if row["kind"] == kind}
        cells.append([kind, *(f"{of[price]['estimated'] / of[price]['kl']:.2f}" for price in prices)])
    return markdown(["left out", *(f"`expert_price: {price:g}`" for price in prices)], cells)


def forecast() -> str:
    """How far off the forecasts of decode steps are, by model."""
    found = load(RESULTS / "forecast.json")["errors"]
    columns = list(next(iter(found.values())))
    cells = [[name, *(f"{times[column]:.2f}" for column in columns)] for name, times in found.items()]
    return markdown(["model", *columns], cells)


def drift() -> str:
    rows = []
    for row in load(RESULTS / "drift.json")["scores"]:
        measures = [row[name] for name in ("greedy", "pass@1", "pass@8")]
        scores = [f"{100 * each['score']:.1f} ± {100 * each['error']:.1f} %" for each in measures]
        rows.append([row["kind"], str(row["questions"]), row["policy"], *scores])
    return markdown(["kind", "questions", "re-routing", "greedy", "pass@1", "pass@8"], rows)


def by_batch() -> str:
    of, rows = field_rows(), []
    for batch in BATCHES:
        cells = [str(batch), f"{of[batch, 'off', None]['active_experts']:.1f}"]
        for point in (("paper, frobenius", 2), ("paper, frobenius", 4), (PRICED, 0.02)):
            row = of[batch, *point]
            cells.append(f"{row['active_experts']:.1f} at {plus_minus(row, 'loss_rise', sign='+')}")
        rows.append(cells)
    return markdown(["batch", "baseline", "SERE, S = 2", "SERE, S = 4", "`expert_price: 0.02`"], rows)


def similarity() -> str:
    rows = load(RESULTS / "quality-tiny-moe.json")["beside_random"]
    of = {(row["policy"], row["knob"]): row for row in rows}
    names = list(dict.fromkeys(row["policy"] for row in rows))
    cells = [
        [f"`{name.removeprefix('paper, ')}`", *(plus_minus(of[name, s], "ratio", 2) for s in (1, 2, 4))]
        for name in names
    ]
    return markdown(["KL as a factor of random's", "S = 1", "S = 2", "S = 4"], cells)


def tuning() -> str:
    found = load(RESULTS / "tuning.json")["recommendation"]
    rows = [[f"recommended, batch {each['batch']}", *outcome(each)] for each in found["recommended"]]
    rows += [[f"S = {keep} in all layers, batch 16", *outcome(found["uniform"][keep])] for keep in ("2", "3")]
    off = {f"batch {each['batch']}": f"{each['active_experts']:.1f}" for each in found["off"]}
    for row in rows:
        row.insert(1, off[row[0].rsplit(", ", 1)[1]])
    head = ["setting", "baseline", "active experts", "KL divergence", "perplexity", "likeliest token kept"]
    return markdown(head, rows)


def traffic() -> str:
    points = load(RESULTS / "traffic.json")["points"]
    of = {
        (row["policy"], row["price"], row["placement"]): row
        for row in points
        if (row["batch"], row["ranks"]) == (16, 8)
    }
    names = {("off", None): "baseline", ("paper", None): "SERE", ("dropping", None): "dropping"}
    names |= {("projection", price): f"projection, `traffic_price: {price:g}`" for price in (0.0, 0.0025, 0.01, 0.05)}
    rows = []
    for key, label in names.items():
        cells = [of[*key, placement] for placement in ("linear", "placed by similarity", "placed")]
        rows.append([label, *(f"{row['remote_domains']:.2f} / {abs(row['kl']):.4f}" for row in cells)])
    return markdown(["remote ranks / KL", "placed linearly", "by similarity", "by co-activation"], rows)


def data_parallel() -> str:
    """What real engines did, two and four of them: under the paper's policy and prices, by whose the primary set is."""
    found = [load(RESULTS / name) for name in ENGINES]
    of = {(run["ranks"], row["policy"], row["turn"], row["primary_scope"]): row for run in found for row in run["rows"]}
    shown = [("projection", "off", "baseline"), ("sere", "paper's", "SERE")]
    shown += [
        ("projection", f"price {price:g}", f"projection, `traffic_price: {price:g}`") for price in (0, 0.01, 0.02, 0.05)
    ]
    rows = []
    for policy, turn, label in shown:
        for scope, whose in (("rank", "each rank's"), ("group", "the group's")):
            two_and_four = [of[run["ranks"], policy, turn, scope] for run in found]

            def both(name: str, digits: int, rows: list[dict[str, Any]] = two_and_four) -> str:
                return " / ".join(f"{row[name]:,.{digits}f}" if name in row else "-" for row in rows)

            cells = [both("bytes_per_token_and_layer", 0), both("active_experts_of_a_ranks_tokens", 1)]
            cells += [both("active_experts_on_a_rank", 1), both("active_experts_on_the_largest_rank", 1)]
            rows.append([label, whose, *cells])
    head = ["2 / 4 engines", "primary set", "bytes per token and layer", "experts of a rank's tokens"]
    return markdown([*head, "experts that a rank runs", "that the largest runs"], rows)


def placements() -> str:
    """Largest rank's load, of all tokens and in a step, and ranks and nodes of a token: ours, and vLLM's EPLB."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for row in load(RESULTS / "placement.json")["rows"]:
        key = (row["routing"], *(str(row[name]) for name in ("ranks", "nodes", "redundant")))
        names = ("largest_load", "largest_load_of_a_step", "ranks_of_a_token", "nodes_of_a_token")
        rows.setdefault(key, []).append(" / ".join(f"{row[name]:.2f}" for name in names))
    maps = ["vLLM's start", "EPLB", "`--max-load 1`", "`--max-load 1.1`"]
    return markdown(["routing", "ranks", "nodes", "replicas", *maps], [[*key, *cells] for key, cells in rows.items()])


def decode() -> str:
    rows = load(ROOT / "benchmarks/results/decode-cpu-small.json")["eager"]["rows"]
    of = {(row["batch"], row["setting"]): row for row in rows}
    cells = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        stock = of[batch, "stock"]["ms_per_token"]
        cells.append([str(batch), f"{stock['median']:.0f} ({stock['min']:.0f} to {stock['max']:.0f})"])
        for setting in ("S = 1", "S = 2", "S = 4", "S = 8 (off)"):
            faster = of[batch, setting]["times_faster"]
            cells[-1].append(f"{faster['median']:.2f} ({faster['min']:.2f} to {faster['max']:.2f})")
    return markdown(["batch", "stock vLLM, ms per step", "S = 1, times faster", "S = 2", "S = 4", "S = 8 (off)"], cells)


def calibration() -> str:
    rows = load(ROOT / "benchmarks/results/calibration.json")["similarity"]["rows"]
    of = {(row["method"], row["experts"]): row for row in rows if "ratio" in row}
    cells = []
    for method in dict.fromkeys(method for method, _ in of):
        row = of[method, 64]
        times = [
            f"{row[name]['median']:.3g} s ({row[name]['min']:.3g} to {row[name]['max']:.3g})"
            for name in ("pairwise_s", "ours_s")
        ]
        cells.append([method, *times, *(f"{of[method, experts]['ratio']:.0f}" for experts in (32, 64, 128))])
    return markdown(["method", "loop over pairs", "here", "times faster: 32 experts", "64", "128"], cells)


def accuracy() -> str:
    rows = []
    for keep, file in ((2, "accuracy-tiny-moe.json"), (1, "accuracy-tiny-moe-s1.json")):
        for score in load(RESULTS / file)["tiny_moe_heldout"]["scores"]:
            on = [f"{score[name]:.3f} ± {score[name + '_stderr']:.3f}" for name in ("off", "on")]
            change = f"{score['difference']:+.3f} ± {score['difference_stderr']:.3f}"
            rows.append([f"`{score['metric']}`, S = {keep}", *on, change, f"{score['other_answers']:.0%}"])
    return markdown(["score", "off", "on", "difference", "other answers"], rows)


def tradeoff() -> str:
    names = {"paper": "SERE", "OEA": "OEA", "top-k": "smaller top-k", "price": "**`expert_price`**"}
    rows = []
    for row in load(RESULTS / "tradeoff.json")["at_equal_kl"]:
        times = [
            f"{spread['median']:{form}} ({spread['min']:{form}} to {spread['max']:{form}})"
            for spread, form in (
                (row["ms_per_token"], ".0f"),
                (row["times_faster_than_stock"], ".2f"),
                (row["times_faster_than_paper"], ".2f"),
            )
        ]
        if row["policy"] == "paper":
            times[2] = "1"
        rows.append([str(row["batch"]), f"{row['kl']:.3f}", names[row["policy"]], *times])
    head = ["batch", "KL divergence", "policy", "ms per output token", "times faster than stock", "than SERE, S = 2"]
    return markdown(head, rows)


def speculation() -> str:
    """Active experts at the KL divergence of `expert_price: 0.02` with all rows alike."""
    shown, cells = load(RESULTS / "speculation.json")["rows"], []
    names = ("paper", "price, rows equal", "price, by chance", "and no claims")
    for k, batch in dict.fromkeys((row["k"], row["batch"]) for row in shown):
        of = {(row["rule"], row["number"]): row for row in shown if (row["k"], row["batch"]) == (k, batch)}
        kl = of["price, rows equal", 0.02]["kl"]
        found = [
            at_kl([(row["kl"], row["active_experts"]) for (rule, _), row in of.items() if rule == name], kl)
            for name in names
        ]
        active = ["" if number is None else f"{number:.1f}" for number in (of["stock", 0]["active_experts"], *found)]
        cells.append([str(batch), str(k), f"{kl:.4f}", *active])
    head = ["batch", "drafted tokens", "KL divergence", "baseline", "SERE", "`expert_price`, rows alike"]
    return markdown([*head, "**weighted by acceptance**", "and drafts keep no expert"], cells)


def kernel_instructions() -> str:
    counts = load(ROOT / "benchmarks/results/kernel_instructions.json")["counts"]
    rows = []
    for count in sorted(counts, key=lambda count: count["source"] == "this"):
        source = "now: " + count["layer"] if count["source"] == "this" else f"`{count['source']}`"
        numbers = (f"{count[name]:,}" for name in ("static", "registers", "shortest", "longest"))
        rows.append([source, f"`{count['kernel']}`", *numbers])
    return markdown(["source and layer", "kernel", "instructions", "registers", "shortest way", "longest way"], rows)


def sensitivity() -> str:
    """At a tenth, half and nine tenths of each range of active experts."""
    return at_equal_experts(load(RESULTS / "sensitivity-tiny-moe.json")["rows"], digits=2)


def at_equal_experts(rows: list[dict[str, Any]], digits: int) -> str:
    """KL divergences as factors of the first policy's, at a tenth, half and nine tenths of its range of experts."""
    of = {(row["batch"], row["active_experts"], row["policy"]): row for row in rows}
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    places = list(dict.fromkeys((row["batch"], row["active_experts"]) for row in rows))
    cells = []
    for place in (places[i] for i in range(len(places)) if i % 5 in (0, 2, 4)):
        first, *others = (of[*place, policy] for policy in policies)
        factors = (plus_minus(row, "ratio", digits) if "ratio" in row else "" for row in others)
        cells.append([str(place[0]), f"{place[1]:.1f}", f"{first['kl']:.4f}", *factors])
    return markdown(["batch", "active experts", f"KL, {policies[0]}", *policies[1:]], cells)


def choices() -> str:
    """What the policy's choice costs, beside the exact one, and its error beside the least at as many experts."""
    rows = load(RESULTS / "selection-tiny-moe.json")["choices"]
    of = {(row["batch"], row["price"], row["choice"]): row for row in rows}
    cells = []
    for place in dict.fromkeys((row["batch"], row["price"]) for row in rows):
        names = ("in order", "threshold", "greedy", "exact, free")
        beside = [plus_minus(of[*place, name], "beside_exact", 3) for name in names]
        experts = f"{of[*place, 'in order']['active_experts']:.1f}"
        cells.append([str(place[0]), f"{place[1]:g}", experts, *beside])
    head = ["batch", "`expert_price`", "experts", "in order", "threshold", "greedy", "exact, free"]
    return markdown(head, cells)


def selection() -> str:
    return at_equal_experts(load(RESULTS / "selection-tiny-moe.json")["at_equal_experts"], digits=2)


def fills() -> str:
    rows = load(RESULTS / "selection-tiny-moe.json")["fills"]
    prices = list(dict.fromkeys(row["price"] for row in rows))
    of = {(row["fill"], row["price"]): row for row in rows}
    cells = [
        [fill, *(plus_minus(of[fill, price], "ratio", 3) for price in prices)]
        for fill in dict.fromkeys(row["fill"] for row in rows)
    ]
    return markdown(["fill", *(f"`expert_price: {price:g}`" for price in prices)], cells)


def carving() -> str:
    """Perplexity of SmolLM2 before and after it was carved, by what the recipe had seen."""
    found = load(ROOT / "examples/smollm2_moe/comparison.json")["perplexity"]
    groups = {
        "Bible verses: a kind that it never saw": ["scripture"],
        "answers to kinds of questions that it never saw": list(HELD_OUT_KINDS),
        "answers about other topics, of kinds that it saw": [*KINDS, "sum"],
        "manuals: other texts of a kind that it saw": ["manual"],
        "dictionary entries: likewise": ["dictionary"],
    }
    rows = []
    for label, kinds in groups.items():
        of_kinds = [found[kind] for kind in kinds]
        texts, times = ([each[name] for each in of_kinds] for name in ("texts", "times"))
        names = ("perplexity_dense", "perplexity_moe", "times")
        dense, moe, mean = (fmean([math.log(each[name]) for each in of_kinds], texts) for name in names)
        spread = f" ({min(times):.2f} to {max(times):.2f} by kind)" if len(kinds) > 1 else ""
        cells = [f"{math.exp(dense):.1f}", f"{math.exp(moe):.1f}", f"{math.exp(mean):.2f}{spread}"]
        rows.append([label, str(sum(texts)), *cells])
    return markdown(["held-out text", "texts", "dense", "mixture of experts", "times"], rows)


def scheduling() -> str:
    """Active experts by what was grouped, as a factor of those at random."""
    found = load(RESULTS / "scheduling-tiny-moe.json")["rows"]
    of = {(row["rule"], row["replicas"], row["window"], row["batch"], row["rerouted"]): row for row in found}
    names = {("by kind", 4, None): "4 replicas, by the kind of text"}
    names |= {("by prompt, even loads", 4, None): "4 replicas, by the prompt's experts, even loads at any time"}
    names |= {("by prompt", 4, None): "4 replicas, by the prompt's experts, even loads at the end"}
    names |= {("by answer, swapped", 4, None): "4 replicas, by the answer's experts, the best swaps (an oracle)"}
    names |= {("by prompt", 1, window): f"1 of {window} that wait, by the prompt's experts" for window in (2, 8, 32)}
    names |= {("by answer", 1, 32): "1 of 32 that wait, by the answer's experts (an oracle)"}
    columns = [(batch, is_on) for batch in (4, 16, 64) for is_on in (False, True)]
    cells = [
        [label, *(plus_minus(of[*place, *column], "ratio", 3) for column in columns)] for place, label in names.items()
    ]
    head = [f"batch {batch}, {'re-routed' if is_on else 'off'}" for batch, is_on in columns]
    return markdown(["chosen among", *head], cells)


def survival() -> str:
    found = load(ROOT / "tests/soak/results/survival.json")["survival"]
    rows = []
    for name in dict.fromkeys(event["name"] for event in found["events"]):
        seconds = [event["whole_after"] for event in found["events"] if event["name"] == name]
        after = [row for row in found["why"] if row["after"] == name]
        failed, latest = (
            sum(row["times"] for row in after),
            max((row["seconds_later"]["max"] for row in after), default=0),
        )
        took = ", ".join(f"{each:.0f}" for each in seconds)
        rows.append([name, took, f"{failed}, within {math.ceil(latest)} s" if failed else "0"])
    return markdown(["what was done to it", "seconds until whole, each time", "requests that failed"], rows)


SAVERS = ("balance price, S = 1", "balance price, S = 0", "expert price, S = 1", "expert price, S = 0")
MAIN = "H200, 8 to a node, per_slot"


def signed_range(errors: Sequence[float]) -> str:
    return f"{min(errors):+.0%} to {max(errors):+.0%}"


def scale_evidence() -> str:
    """What was measured, what was simulated and estimated, and how far that is off."""
    found = load(RESULTS / "simulation.json")
    errors: dict[str, list[float]] = {}
    for row in found["validation"]:
        kind = next(name for name in ("MoE layer", "72 ranks", "engines", "ranks") if name in row["what"])
        is_step = row["what"].startswith("decode step") and kind == "engines"
        errors.setdefault(kind + ", time" * is_step, []).append(row["error"])
    replayed = [
        row[f"synthetic_{name}"] / row[name] - 1
        for row in found["replayed"]
        for name in ("active_experts", "largest_rank")
    ]
    ratios = [row["kl"] / row["estimated_error"] for row in found["real"] if row["kl"] > 1e-3]
    kl = max(row["kl_error"] / row["kl"] for row in found["real"] if row["kl"] > 1e-3)
    rows = [
        [
            "KL divergence, active experts and largest rank of the example model",
            "measured",
            f"standard error of KL: up to {kl:.0%}",
        ],
        [
            "remote ranks and slots, bytes and active experts of two and of four real engines",
            "measured, and replayed from recorded routing",
            f"{signed_range(errors['engines'])}",
        ],
        [
            "what the slowest rank's experts take",
            "simulated",
            f"{signed_range(errors['MoE layer'])} of {len(errors['MoE layer'])} published times; nothing was fitted",
        ],
        [
            "dispatch and combine, one copy a slot",
            "simulated",
            f"{signed_range(errors['ranks'])} of {len(errors['ranks'])} published times, which chose its constants",
        ],
        [
            "a whole step of a group on GPUs",
            "simulated",
            f"{errors['72 ranks'][0]:+.0%} of the one published figure whose set-up is known well enough",
        ],
        [
            "a whole step of two and of four engines on a CPU",
            "simulated",
            f"{' and '.join(f'{error:+.0%}' for error in errors['engines, time'])}: of no use there",
        ],
        [
            "active experts and largest rank of synthetic routers",
            "simulated",
            f"{signed_range(replayed)} at the recorded shape; at other shapes not known",
        ],
        [
            "error of a policy under synthetic routing",
            "estimated",
            f"on the example model, KL divergence is {min(ratios):.2f} to {max(ratios):.2f} times the estimate",
        ],
    ]
    return markdown(["figure", "how it was found", "how far it is off"], rows)


def saved_cells(row: dict[str, Any]) -> list[str]:
    """What each policy of ours saves, with the range where one part of the step is off by a third.

    A policy that no price makes change anything is the baseline.
    """
    return [
        f"{row['saved'][name][0]:.0%} ({row['saved'][name][1]:.0%} to {row['saved'][name][2]:.0%})"
        if name in row["saved"]
        else "as baseline"
        for name in SAVERS
    ]


def scale_real() -> str:
    rows = []
    for row in load(RESULTS / "simulation.json")["savings"]:
        if row["where"] == MAIN:
            cells = [str(row["ranks"]), str(row["batch"]), f"{row['S']:.0f}", f"{row['kl']:.4f}"]
            rows.append([*cells, f"{row['off_ms']:.1f}", f"{row['paper_ms']:.1f}", *saved_cells(row)])
    head = ["ranks", "rows", "S", "KL divergence", "baseline, ms", "SERE, ms", *SAVERS]
    return markdown(head, rows)


def scale_synthetic() -> str:
    """At the paper's middle S, a quarter of the top-k, on 32 ranks and more of one kind of hardware."""
    found = load(RESULTS / "simulation.json")["synthetic_savings"]
    of = {(row["model"], row["ranks"], row["rows_per_rank"], row["S"], row["where"]): row for row in found}
    rows = []
    for (model, ranks, per_rank, keep, where), row in of.items():
        if where != MAIN or ranks < 32 or keep != (4 if model == "Kimi-K3" else 2):
            continue
        cells = [model, str(ranks), str(per_rank)]
        rows.append([*cells, f"{row['off_ms']:.1f}", f"{row['paper_ms']:.1f}", *saved_cells(row)])
    head = ["shape", "ranks", "rows per rank", "baseline, ms", "SERE, ms", *SAVERS]
    return markdown(head, rows)


def control() -> str:
    days = load(RESULTS / "control.json")["days"]
    rows = [
        [
            *(way, str(day["requests"]), str(day["good"]), f"{day['good'] / days['off']['good']:.2f}"),
            *(f"{day['kl']:.4f}", f"{day['active_experts']:.1f}"),
        ]
        for way, day in days.items()
    ]
    head = ["price", "requests", "within the objective", "times off", "KL divergence, nats per token", "active experts"]
    return markdown(head, rows)


def narrow_link_rows(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns head and cells: by setting and link, milliseconds of a step, measured and predicted."""
    links = list(dict.fromkeys(row["link"] for row in rows))
    cells: dict[str, list[str]] = {}
    for row in rows:
        sent = f"{row['sent_bytes'] / 1e3:.0f}, predicted {row['predicted_bytes'] / 1e3:.0f}"
        mine = cells.setdefault(row["setting"], [row["setting"], f"{abs(row['kl']):.4f} ± {row['kl_error']:.4f}", sent])
        ms = row["ms"]
        predicted = "" if row["link"] == links[0] else f", predicted {row['predicted_ms']:.0f}"
        mine.append(f"{ms['median']:.0f} ({ms['min']:.0f} to {ms['max']:.0f}){predicted}")
    return ["setting", "KL divergence", "KB that a rank sends in a step", *links], list(cells.values())


def narrow_link() -> str:
    return markdown(*narrow_link_rows(load(RESULTS / "narrow-link.json")["rows"]))


def narrow_link_gains() -> str:
    """How many times as fast as without re-routing, over the same link and in the same round."""
    rows = load(RESULTS / "narrow-link.json")["rows"]
    cells: dict[str, list[str]] = {}
    for row in rows:
        faster = row["times_faster"]
        mine = cells.setdefault(row["setting"], [row["setting"]])
        mine.append(f"{faster['median']:.2f} ({faster['min']:.2f} to {faster['max']:.2f})")
    del cells["off"]
    return markdown(["times as fast as off", *dict.fromkeys(row["link"] for row in rows)], list(cells.values()))


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(quality, against_the_field, pruned, by_batch, similarity, tuning, traffic, placements),
        *(tradeoff, speculation, decode, calibration, accuracy, kernel_instructions, survival),
        *(
            *(sensitivity, unlike, choices, selection, fills, carving, smollm2_quality, smollm2_against_the_field),
            *(grouped_quality, grouped_against_the_field, drift, scheduling, control, forecast),
        ),
        *(scale_evidence, scale_real, scale_synthetic, narrow_link, narrow_link_gains, data_parallel),
    )
}


def written(page: str) -> str:
    """Returns the page with all its tables as the JSON files have them."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text()))

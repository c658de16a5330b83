"""What re-routing costs in quality, by every policy of the field, at the same decode steps.

    python -m studies.quality                        # the example model of the tests: 31 minutes on 2 cores
    python -m studies.quality --example smollm2-moe  # SmolLM2-MoE, once the demo has put it together
    python -m studies.quality --example tiny-grouped # a router like DeepSeek-V3's
    python -m studies.quality --draw                 # only the pictures, from the JSON

Held-out texts are decoded in lockstep batches (see sere_dist.evaluation.lockstep): KL from the model as it is, loss,
the share of steps whose likeliest token stays, against the experts that a layer runs in a step. In parts (`--parts`):

- field: every policy over its knob. A batch holds texts of all kinds, as a server's does: its requests are strangers'.
- kinds: some of them in batches of one kind of text.
- beside-random: substitutes by similarities that were calibrated, and by random ones, of several draws.
- transfer: calibrated on one kind of text, evaluated on another.
- samples: calibrated on more and more texts.

Texts, their halves and batches are those of `sere_dist.evaluation.protocol`. Whoever chooses a policy, a parameter or a
model by this study does so with `--half choice`. Nothing here is chosen by either half: similarities and sensitivities
come from the calibration texts, XShare's budgets are the active experts of the paper's policy, an expert's prices and
the shares of experts that REAP keeps are fixed sweeps.

Errors are standard errors over texts, of differences and ratios by pairs. Prints tables and one JSON line last; writes
`studies/results/quality-<example>.json` and, in `docs/`, `quality-<example>-by-batch.png` and
`quality-<example>-batch-16.png`.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from examples.application import EXAMPLES
from sere_dist.artifact.recommendation import Outcome
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import LayerResult, expert_inputs, score_layer, text_blocks
from sere_dist.calibration.sensitivity import layer_sensitivities, weigh_layers
from sere_dist.console import tables
from sere_dist.evaluation.figures import (
    ACTIVE_EXPERTS,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    KL_DIVERGENCE,
    ORANGE,
    PURPLE,
    RED,
    Curve,
    draw_trade_off,
)
from sere_dist.evaluation.lockstep import HeldOut, LockstepResult, Rerouter, unchanged
from sere_dist.evaluation.outcome import outcome_of
from sere_dist.evaluation.protocol import (
    BATCH,
    BATCHES,
    CALIBRATION_LENGTH,
    CALIBRATION_TEXTS,
    LENGTH,
    PROMPT,
    TEXTS,
    Half,
    Text,
    by_kind,
    cut,
    decoded,
    half_of,
    held_out_texts,
    mixed,
    read_texts,
)
from sere_dist.evaluation.rerouters import paper_rerouter, projection_rerouter
from sere_dist.evaluation.rivals import (
    dropping_rerouter,
    oea_rerouter,
    reap_rerouter,
    top_k_rerouter,
    xshare_rerouter,
)
from sere_dist.method.records import LayerTables, Settings
from sere_dist.method.similarity import MethodName, random_similarity
from sere_dist.moe import MoeShape, load_model, routed_experts
from sere_dist.provenance import line_by_line, machine, rounded, versions
from sere_dist.standard_errors import difference_with_error, ratio_with_error, with_error
from studies.common import RESULTS, ROOT


class Part(StrEnum):
    """A part of the study, as it is named above."""

    FIELD = "field"
    KINDS = "kinds"
    BESIDE_RANDOM = "beside-random"
    TRANSFER = "transfer"
    SAMPLES = "samples"


SAMPLES = (16, 32, 64, 128, 256)  # texts of a calibration, beside those that all other parts use
SAMPLES_OF_CKA, SAMPLES_OF_KIND = 32, 128  # CKA takes the square of its tokens in time
SENSITIVITY_SAMPLES = 64  # of the texts of a calibration, those that sensitivities are found on
KEEPS, KEEPS_OF_PARTS, KEEP_OF_CALIBRATIONS = (1, 2, 3, 4, 6), (1, 2, 4), 2
RANDOM_DRAWS = 5
PRICES = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)  # of an expert, where every token keeps one of its own
KEPT = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # shares of a layer's experts, and of their memory, that REAP keeps
REAP = "REAP, pruned"
OFF, PAPER, RANDOM, PROJECTION, PRICED = "off", "paper, frobenius", "paper, random", "projection", "expert price, S = 1"
RIVALS = (
    PAPER,
    "OEA",
    "OEA, not renormalised",
    "XShare",
    "XShare, warm-up 1",
    "XShare, not renormalised",
    "dropping",
    "dropping, renormalised",
    "top-k",
    "top-k, renormalised",
    REAP,
    PROJECTION,
)
CALIBRATED = (PAPER, "paper, cosine", "paper, CKA", "paper, projection", "paper, weights")
OF_KINDS = (PAPER, RANDOM, "dropping, renormalised", "OEA", "XShare, warm-up 1", PROJECTION)
LOOKS = {  # in the figures: label and style
    "top-k, renormalised": ("smaller top-k, renormalised", {"color": GREY, "marker": "s"}),
    PAPER: ("SERE, the paper's policy", {"color": RED, "marker": "o"}),
    RANDOM: ("SERE, random similarity", {"color": RED, "marker": "x", "linestyle": ":"}),
    "dropping, renormalised": ("dropping, renormalised", {"color": GREEN, "marker": "v"}),
    "OEA": ("OEA", {"color": PURPLE, "marker": "^"}),
    "XShare, warm-up 1": ("XShare", {"color": ORANGE, "marker": "D"}),
    PROJECTION: ("projection (ours)", {"color": BLUE, "marker": "P", "markersize": 6}),
    PRICED: ("projection with expert_price (ours)", {"color": BLACK, "marker": "*", "markersize": 8}),
}
IN_README = (PAPER, "OEA", "XShare, warm-up 1", PROJECTION, PRICED)
LEAST_DRAWN = 1e-4  # KL divergence, nats per token: at less a price has changed next to nothing
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of a curve's range of active experts: where other studies compare curves
BEYOND = 0.05  # of the paper's range of active experts: how far its curve is drawn on


class Point(NamedTuple):
    """A policy and its knob.

    That is S, k0, an expert's price, the share of experts that REAP keeps, or for XShare the S of the paper's policy
    whose active experts are its budget.
    """

    policy: str
    knob: float


@dataclass(frozen=True)
class Calibration:
    """What one method found on some texts, by decoder layer."""

    layers: dict[int, LayerResult]

    @property
    def tables(self) -> dict[int, LayerTables]:
        return {layer: found.tables for layer, found in self.layers.items()}

    @property
    def saliency(self) -> dict[int, torch.Tensor]:
        """REAP's, of each layer's experts [E]; of method projection alone."""
        return {layer: found.saliency_E for layer, found in self.layers.items() if found.saliency_E is not None}

    def substitutes(self, select_top_k: int) -> Rerouter:
        return paper_rerouter(self.tables, Settings(select_top_k))

    def projection(self, select_top_k: int, expert_price: float = 0.0) -> Rerouter:
        return projection_rerouter(self.tables, Settings(select_top_k, expert_price=expert_price))


def calibrate(checkpoint: Checkpoint, texts: Sequence[Text], methods: Sequence[MethodName]) -> list[Calibration]:
    """Returns what each method finds on the texts, in this process."""
    inputs = dict(expert_inputs(checkpoint, text_blocks([text.ids for text in texts])))
    found = {
        method: {layer: score_layer(checkpoint, layer, of_layer, method) for layer, of_layer in inputs.items()}
        for method in methods
    }
    if "projection" in found:
        ids = [text.ids for text in texts[:SENSITIVITY_SAMPLES]]
        weigh_layers(found["projection"], layer_sensitivities(checkpoint, ids))
    return [Calibration(layers) for layers in found.values()]


def at_active_experts(curve: Sequence[LockstepResult], active: float) -> list[float] | None:
    """Returns the KL of each text that the policy of this curve would have at so many active experts.

    It lies between two of its settings, geometrically, as KL falls by factors. None: too far beyond either end, or all
    settings run equally many.
    """
    curve = sorted(curve, key=lambda result: result.active_experts)
    low, high = curve[0].active_experts, curve[-1].active_experts
    if low == high or not (1 - BEYOND) * low <= active <= (1 + BEYOND) * high:
        return None
    segments = list(pairwise(curve))
    left, right = next((pair for pair in segments if active <= pair[1].active_experts), segments[-1])
    share = (active - left.active_experts) / (right.active_experts - left.active_experts)
    pairs = zip(left.divergence_of_texts, right.divergence_of_texts, strict=True)
    # A divergence next to nothing may be less than nothing by rounding.
    return [max(a, 1e-9) ** (1 - share) * max(b, 1e-9) ** share for a, b in pairs]


def kl_of_kinds(result: LockstepResult, kinds: Sequence[str]) -> dict[str, list[float]]:
    """Returns the KL divergence of each kind of text that there are two of, and its standard error.

    `kinds` are those of the texts.
    """
    kinds = kinds[: len(result.losses)]  # texts that do not fill a batch are left out
    found = {}
    for kind in sorted(set(kinds)):
        divergences = [kl for kl, of in zip(result.divergence_of_texts, kinds, strict=True) if of == kind]
        if len(divergences) > 1:
            found[kind] = [rounded(number) for number in with_error(divergences)]
    return found


def compared(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Returns by what factor and by how much our KL is theirs, of the same texts."""
    ratio, ratio_error = ratio_with_error(ours, theirs)
    difference, difference_error = difference_with_error(ours, theirs)
    found = {"ratio": ratio, "ratio_error": ratio_error}
    found |= {"difference": difference, "difference_error": difference_error}
    return {name: rounded(value) for name, value in found.items()}


def at_equal_experts(
    found: Mapping[str, Sequence[LockstepResult]], baseline: str, batch: int, shares: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns each policy's KL divergence as a factor of that of `baseline`, at as many active experts.

    These are the `shares` of the range of active experts that the curve of `baseline` covers.
    """
    active = [result.active_experts for result in found[baseline]]
    rows = []
    for share in shares:
        wanted = min(active) + share * (max(active) - min(active))
        theirs = at_active_experts(found[baseline], wanted)
        assert theirs is not None
        for policy, curve in found.items():
            row: dict[str, Any] = {"batch": batch, "policy": policy, "active_experts": rounded(wanted)}
            if (ours := at_active_experts(curve, wanted)) is not None:
                row |= {"kl": rounded(sum(ours) / len(ours)), **compared(ours, theirs)}
            rows.append(row)
    return rows


def equal_experts_table(
    rows: Sequence[dict[str, Any]], baseline: str, batch: int, policies: Iterable[str], title: str
) -> Table:
    """Returns what `at_equal_experts` found for these policies, and the numbers of experts above it."""
    of_batch = [row for row in rows if row["batch"] == batch]
    head = [f"{x['active_experts']:.1f} active\nKL {x['kl']:.4f}" for x in of_batch if x["policy"] == baseline]
    table = Table("policy", *head, title=f"batch {batch}{title}")
    for policy in policies:
        of_policy = [row for row in of_batch if row["policy"] == policy]
        cells = [f"{row['ratio']:.2f} ±{row['ratio_error']:.2f}" if "ratio" in row else "-" for row in of_policy]
        table.add_row(policy, *cells)
    return table


def policies(model: PreTrainedModel, calibrations: dict[str, Calibration]) -> dict[str, Callable[[int], Rerouter]]:
    """Returns all policies by name, each a function of its S, k0 or budget."""
    num_experts = MoeShape.from_config(model.config).num_experts
    random = {layer: LayerTables(random_similarity(num_experts, seed=layer)) for layer in routed_experts(model)}
    return {
        **{name: calibration.substitutes for name, calibration in calibrations.items()},
        RANDOM: lambda s: paper_rerouter(random, Settings(s)),
        PROJECTION: calibrations["paper, projection"].projection,
        "dropping": lambda s: dropping_rerouter(num_experts, s),
        "dropping, renormalised": lambda s: dropping_rerouter(num_experts, s, renormalise=True),
        "top-k": top_k_rerouter,
        "top-k, renormalised": lambda s: top_k_rerouter(s, renormalise=True),
        "OEA": oea_rerouter,
        "XShare": xshare_rerouter,
        "XShare, warm-up 1": lambda budget: xshare_rerouter(budget, warm_up=1),
        "OEA, not renormalised": lambda s: oea_rerouter(s, renormalise=False),
        "XShare, not renormalised": lambda budget: xshare_rerouter(budget, warm_up=1, renormalise=False),
    }


def field(
    bench: HeldOut,
    kinds: Sequence[str],
    field_of: dict[str, Callable[[int], Rerouter]],
    batches: Sequence[int],
    keeps: Sequence[int],
    prices: Sequence[float],
    priced: Callable[[float], Rerouter],
    pruned: Callable[[float], Rerouter],
) -> list[dict[str, Any]]:
    """Returns a row for each batch, policy and knob, with its KL beside the paper's at as many active experts.

    `kinds` are those of the texts. `priced` is projection at an expert's price; it is compared with all `RIVALS`.
    `pruned` is REAP at a share of experts.
    """
    rows = []
    bar = tqdm(total=len(batches) * (1 + len(field_of) * len(keeps) + len(prices) + len(KEPT)), desc="field")
    for batch in batches:
        off, results = bench.run(unchanged, batch), {}
        bar.update()
        for name, rerouter_of in field_of.items():
            for keep in keeps:
                budget = round(results[Point(PAPER, keep)].active_experts) if name.startswith("XShare") else keep
                results[Point(name, keep)] = bench.run(rerouter_of(budget), batch)
                bar.update()
        for name, policy, knobs in ((PRICED, priced, prices), (REAP, pruned, KEPT)):
            for knob in knobs:
                results[Point(name, knob)] = bench.run(policy(knob), batch)
                bar.update()
        by_kinds = {"kl_of_kinds": kl_of_kinds(off, kinds)}
        rows.append({"policy": OFF, "knob": None, **outcome_of(off, off, batch).model_dump(), **by_kinds})
        curves = {name: [results[Point(name, keep)] for keep in keeps] for name in RIVALS if name in field_of}
        curves[REAP] = [results[Point(REAP, share)] for share in KEPT]
        for point, result in results.items():
            row = {**point._asdict(), **outcome_of(result, off, batch).model_dump()}
            beside = {}
            for rival in curves if point.policy == PRICED else (PAPER,):
                if (theirs := at_active_experts(curves[rival], result.active_experts)) is not None:
                    beside[rival] = compared(result.divergence_of_texts, theirs)
            rows.append(row | {"kl_of_kinds": kl_of_kinds(result, kinds), "beside": beside})
    bar.close()
    return rows


def in_batches_of_one_kind(
    benches: dict[str, HeldOut], field_of: dict[str, Callable[[int], Rerouter]]
) -> list[dict[str, Any]]:
    rows = []
    for kind, bench in tqdm(benches.items(), desc="kinds"):
        off = bench.run(unchanged, BATCH)
        rows.append({"kind": kind, "policy": OFF, "knob": None, **outcome_of(off, off, BATCH).model_dump()})
        for keep in KEEPS_OF_PARTS:
            paper = bench.run(field_of[PAPER](keep), BATCH)
            for name in OF_KINDS:
                knob = round(paper.active_experts) if name.startswith("XShare") else keep
                result = paper if name == PAPER else bench.run(field_of[name](knob), BATCH)
                of_point = outcome_of(result, off, BATCH).model_dump()
                rows.append({"kind": kind, **Point(name, keep)._asdict(), **of_point})
    return rows


def compare_with_random(bench: HeldOut, field_of: dict[str, Callable[[int], Rerouter]]) -> list[dict[str, Any]]:
    """Returns the KL with each calibrated similarity beside the mean over draws of random ones, text by text."""
    rows, layers = [], routed_experts(bench.model)
    for keep in tqdm(KEEPS_OF_PARTS, desc="beside random"):
        draws = []
        for draw in range(RANDOM_DRAWS):
            drawn = {
                layer: LayerTables(random_similarity(experts.num_experts, seed=1000 * draw + layer))
                for layer, (_, experts) in layers.items()
            }
            draws.append(bench.run(paper_rerouter(drawn, Settings(keep)), BATCH).divergence_of_texts)
        random = [math.fsum(of_text) / len(draws) for of_text in zip(*draws, strict=True)]
        of_draws = [rounded(math.fsum(draw) / len(draw)) for draw in draws]
        for name in CALIBRATED:
            ours = bench.run(field_of[name](keep), BATCH).divergence_of_texts
            rows.append({"policy": name, "knob": keep, "kl_of_draws": of_draws, **compared(ours, random)})
    return rows


def transfer(benches: dict[str, HeldOut], checkpoint: Checkpoint, texts: dict[str, list[Text]]) -> list[dict[str, Any]]:
    """Returns the KL on each kind of text when calibrated on each, beside that of the kind itself."""
    rows = []
    calibrations = {
        kind: calibrate(checkpoint, texts[kind][:SAMPLES_OF_KIND], ("frobenius", "projection"))
        for kind in tqdm(benches, desc="calibrating kinds")
    }
    for kind, bench in tqdm(benches.items(), desc="transfer"):
        runs: dict[tuple[str, str], list[float]] = {}
        for calibrated_on, (frobenius, projection) in calibrations.items():
            for name, rerouter_of in ((PAPER, frobenius.substitutes), (PROJECTION, projection.projection)):
                result = bench.run(rerouter_of(KEEP_OF_CALIBRATIONS), BATCH)
                runs[name, calibrated_on] = result.divergence_of_texts
        for (name, calibrated_on), kl_of_texts in runs.items():
            kl, kl_error = map(rounded, with_error(kl_of_texts))
            about = {"policy": name, "calibrated_on": calibrated_on, "evaluated_on": kind}
            rows.append(about | {"kl": kl, "kl_error": kl_error, **compared(kl_of_texts, runs[name, kind])})
    return rows


def by_samples(bench: HeldOut, by_count: dict[int, list[Calibration]]) -> list[dict[str, Any]]:
    """Returns the KL by calibration texts, beside that of the most."""
    rows: list[dict[str, Any]] = []
    for which, name in enumerate((PAPER, PROJECTION)):
        runs = {}
        for count, calibrations in tqdm(by_count.items(), desc="samples"):
            calibration = calibrations[which]
            rerouter_of = calibration.projection if name == PROJECTION else calibration.substitutes
            runs[count] = bench.run(rerouter_of(KEEP_OF_CALIBRATIONS), BATCH).divergence_of_texts
        for count, kl_of_texts in runs.items():
            kl, kl_error = map(rounded, with_error(kl_of_texts))
            found = {"kl": kl, "kl_error": kl_error, **compared(kl_of_texts, runs[max(runs)])}
            rows.append({"policy": name, "samples": count, **found})
    return rows


def outcomes_of(rows: Sequence[dict[str, Any]], policy: str) -> list[Outcome]:
    return [
        Outcome.model_validate({name: row[name] for name in Outcome.model_fields})
        for row in rows
        if row["policy"] == policy
    ]


def draw_by_batch(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the whole field, a small picture for each batch."""
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(13, 4.2), dpi=150, layout="constrained")
    all_axes = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for batch, axes in zip(batches, all_axes, strict=True):
        of_batch = [row for row in rows if row["batch"] == batch]
        (baseline,) = outcomes_of(of_batch, OFF)
        curves = [Curve(label, outcomes_of(of_batch, name), style) for name, (label, style) in LOOKS.items()]
        draw_trade_off(axes, curves, baseline)
        axes.set_title(f"batch {batch}; baseline: {baseline.active_experts:.1f} experts", fontsize="medium")
    all_axes[0].set_ylim(bottom=max(all_axes[0].get_ylim()[0], LEAST_DRAWN))
    all_axes[0].set_ylabel(KL_DIVERGENCE)
    figure.supxlabel(ACTIVE_EXPERTS, fontsize="medium")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path)


def draw_batch(rows: list[dict[str, Any]], batch: int, path: Path) -> None:
    """Draws the picture of the README: one batch, and the policies that choose among active experts."""
    of_batch = [row for row in rows if row["batch"] == batch]
    (baseline,) = outcomes_of(of_batch, OFF)
    figure = Figure(figsize=(7.2, 4.4), dpi=200, layout="constrained")
    axes = figure.subplots()
    looks = [(name, *LOOKS[name]) for name in IN_README]
    draw_trade_off(axes, [Curve(label, outcomes_of(of_batch, name), style) for name, label, style in looks], baseline)
    axes.annotate(
        f"baseline:\n{baseline.active_experts:.1f} experts",
        (baseline.active_experts, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(-6, 0),
        textcoords="offset points",
        ha="right",
        va="top",
        color=GREY,
    )
    axes.set_ylim(bottom=max(axes.get_ylim()[0], LEAST_DRAWN))
    axes.set_xlabel(f"{ACTIVE_EXPERTS}, batch {batch}")
    axes.set_ylabel(KL_DIVERGENCE)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path)


def draw(report: dict[str, Any], pictures: Path) -> None:
    """Draws both pictures from the JSON of a run; the second only if batch 16 was measured."""
    draw_by_batch(report["field"], pictures / f"quality-{report['example']}-by-batch.png")
    if any(row["batch"] == BATCH for row in report["field"]):
        draw_batch(report["field"], BATCH, pictures / f"quality-{report['example']}-batch-{BATCH}.png")


def plus_minus(row: dict[str, Any], name: str, digits: int) -> str:
    return f"{row[name]:.{digits}f} ±{row[name + '_error']:.{digits}f}"


def field_table(rows: list[dict[str, Any]], batch: int, keeps: Sequence[int]) -> Table:
    of_batch = {(row["policy"], row["knob"]): row for row in rows if row["batch"] == batch}
    names = list(dict.fromkeys(name for name, _knob in of_batch if name not in (OFF, PRICED, REAP)))
    off = of_batch[OFF, None]
    title = f"batch {batch}, texts of all kinds; as it is {off['active_experts']:.1f} active experts, perplexity "
    title += f"{off['perplexity']:.2f}. KL in nats a token, and its factor of the paper's policy (frobenius)\n"
    title += "at as many active experts. Active experts are the paper's at that S: another policy's in brackets"
    table = Table("policy", title=title, title_justify="left", box=box.SIMPLE)
    for keep in keeps:
        paper = of_batch[PAPER, keep]["active_experts"]
        table.add_column(f"S = {keep}\n{paper:.1f} active")
    for name in names:
        cells = []
        for keep in keeps:
            row, paper = of_batch[name, keep], of_batch[PAPER, keep]["active_experts"]
            factor = row["beside"].get(PAPER)
            cells.append(
                f"{row['kl']:.4f}" + (f" x{factor['ratio']:.2f} ±{factor['ratio_error']:.2f}" if factor else "")
            )
            if abs(row["active_experts"] / paper - 1) > BEYOND:
                cells[-1] += f" ({row['active_experts']:.1f})"
        table.add_row(name, *cells)
    return table


def priced_table(rows: list[dict[str, Any]], batch: int) -> Table:
    title = f"batch {batch}, {PRICED}: KL in nats a token, and its factor of others' at as many active experts"
    table = Table("price", "active", "KL", *RIVALS, title=title, title_justify="left", box=box.SIMPLE)
    for row in rows:
        if (row["batch"], row["policy"]) == (batch, PRICED):
            cells = [plus_minus(found, "ratio", 2) if (found := row["beside"].get(name)) else "" for name in RIVALS]
            table.add_row(f"{row['knob']:g}", f"{row['active_experts']:.1f}", plus_minus(row, "kl", 4), *cells)
    return table


def pruned_table(rows: list[dict[str, Any]], batch: int) -> Table:
    title = f"batch {batch}, {REAP}: KL in nats a token, and its factor of the paper's at as many active experts"
    table = Table(
        "experts kept", "active", "KL", "perplexity", PAPER, title=title, title_justify="left", box=box.SIMPLE
    )
    for row in rows:
        if (row["batch"], row["policy"]) == (batch, REAP):
            factor = plus_minus(found, "ratio", 2) if (found := row["beside"].get(PAPER)) else ""
            cells = [f"{row['active_experts']:.1f}", plus_minus(row, "kl", 4), f"{row['perplexity']:.2f}", factor]
            table.add_row(f"{row['knob']:.1%}", *cells)
    return table


def kinds_table(rows: list[dict[str, Any]]) -> Table:
    kinds = sorted({row["kind"] for row in rows})
    title = f"batches of one kind, batch {BATCH}: KL"
    table = Table("policy", "S", *kinds, title=title, title_justify="left", box=box.SIMPLE)
    for name in OF_KINDS:
        for keep in KEEPS_OF_PARTS:
            of = {row["kind"]: row for row in rows if (row["policy"], row["knob"]) == (name, keep)}
            cells = [f"{plus_minus(of[kind], 'kl', 4)} ({of[kind]['active_experts']:.1f} active)" for kind in kinds]
            table.add_row(name, str(keep), *cells)
    return table


def random_table(rows: list[dict[str, Any]]) -> Table:
    title = f"calibrated beside random, batch {BATCH}: factor of the KL, mean of {RANDOM_DRAWS} draws"
    keeps = [f"S = {keep}" for keep in KEEPS_OF_PARTS]
    table = Table("similarity", *keeps, title=title, title_justify="left", box=box.SIMPLE)
    for name in CALIBRATED:
        of = {row["knob"]: row for row in rows if row["policy"] == name}
        table.add_row(name, *(f"x{plus_minus(of[keep], 'ratio', 3)}" for keep in KEEPS_OF_PARTS))
    return table


def transfer_table(rows: list[dict[str, Any]], policy: str) -> Table:
    kinds = sorted({row["evaluated_on"] for row in rows})
    title = f"{policy}, S = {KEEP_OF_CALIBRATIONS}, batch {BATCH}: KL on, and factor of that calibrated there"
    table = Table("calibrated on", *kinds, title=title, title_justify="left", box=box.SIMPLE)
    for calibrated_on in kinds:
        of = {
            row["evaluated_on"]: row for row in rows if (row["policy"], row["calibrated_on"]) == (policy, calibrated_on)
        }
        cells = [f"{of[kind]['kl']:.4f} x{plus_minus(of[kind], 'ratio', 3)}" for kind in kinds]
        table.add_row(calibrated_on, *cells)
    return table


def samples_table(rows: list[dict[str, Any]]) -> Table:
    title = f"S = {KEEP_OF_CALIBRATIONS}, batch {BATCH}: KL, and factor of that with the most calibration texts"
    counts = sorted({row["samples"] for row in rows})
    table = Table("policy", *map(str, counts), title=title, title_justify="left", box=box.SIMPLE)
    for policy in (PAPER, PROJECTION):
        of = {row["samples"]: row for row in rows if row["policy"] == policy}
        table.add_row(policy, *(f"{of[count]['kl']:.4f}\nx{plus_minus(of[count], 'ratio', 3)}" for count in counts))
    return table


def main(
    example: Annotated[str, typer.Option(help=f"The model: {' or '.join(EXAMPLES)}.")] = "tiny-moe",
    parts: Annotated[list[Part] | None, typer.Option(help="What to measure. By default, all of it.")] = None,
    only_drawn: Annotated[bool, typer.Option("--drawn", help="Of the field, only what the figures show.")] = False,
    rivals: Annotated[
        list[str] | None, typer.Option("--policy", help="Of the field, only these beside the paper's and ours.")
    ] = None,
    batches: Annotated[list[int] | None, typer.Option(help=f"Batches of the field, {BATCHES} by default.")] = None,
    keeps: Annotated[list[int] | None, typer.Option(help=f"Values of S of the field, {KEEPS} by default.")] = None,
    prices: Annotated[list[float] | None, typer.Option(help=f"An expert's prices, {PRICES} by default.")] = None,
    half: Annotated[Half, typer.Option(help="The half of each kind's held-out texts: final, or choice.")] = "final",
    texts: Annotated[int, typer.Option(help="Held-out texts of all kinds together.")] = TEXTS,
    texts_of_kind: Annotated[int, typer.Option(help="Held-out texts of each kind, in batches of one kind.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of a held-out text.")] = LENGTH,
    prompt: Annotated[int, typer.Option(help="Tokens of these that are prefill.")] = PROMPT,
    samples: Annotated[int, typer.Option(help="Texts of the calibration.")] = CALIBRATION_TEXTS,
    calibration_length: Annotated[int, typer.Option(help="Tokens of a calibration text.")] = CALIBRATION_LENGTH,
    results: Annotated[Path, typer.Option(help="Folder for the JSON.")] = RESULTS,
    pictures: Annotated[Path, typer.Option(help="Folder for the pictures.")] = ROOT / "docs",
    only_draw: Annotated[bool, typer.Option("--draw", help="Draw the pictures of --results; measure nothing.")] = False,
) -> None:
    file = results / f"quality-{example}.json"
    if only_draw:
        return draw(json.loads(file.read_text()), pictures)
    started, console, parts = time.perf_counter(), tables(), parts or list(Part)
    own = EXAMPLES[example]
    tokenizer, checkpoint = AutoTokenizer.from_pretrained(own.model), Checkpoint(str(own.model))
    loaded = load_model(str(own.model), "cpu")
    of_all = held_out_texts(own.held_out, tokenizer, half=half, count=texts, length=length)
    of_kinds = by_kind(cut(half_of(read_texts(own.held_out, tokenizer), half), length))
    bench = decoded(loaded, of_all, prompt)
    to_calibrate = cut(read_texts(own.calibration, tokenizer), calibration_length)
    top_k = MoeShape.from_config(loaded.config).num_experts_per_token
    keeps = [keep for keep in keeps or KEEPS if keep < top_k]

    in_turn = mixed(to_calibrate)
    counts = [count for count in SAMPLES if count < min(samples, len(in_turn))] if Part.SAMPLES in parts else []
    counts.append(min(samples, len(in_turn)))
    by_count = {
        count: calibrate(checkpoint, in_turn[:count], ("frobenius", "projection"))
        for count in tqdm(counts, desc="calibrating")
    }
    frobenius, projection = by_count[counts[-1]]
    calibrations = {PAPER: frobenius, "paper, projection": projection}
    if Part.BESIDE_RANDOM in parts or not (only_drawn or rivals):
        cosine, weights = calibrate(checkpoint, in_turn[: counts[-1]], ("cosine", "weights"))
        (cka,) = calibrate(checkpoint, in_turn[:SAMPLES_OF_CKA], ("cka",))
        calibrations |= dict(zip(CALIBRATED, (frobenius, cosine, cka, projection, weights), strict=True))
    field_of = policies(loaded, calibrations)
    needs_kinds = {Part.KINDS, Part.TRANSFER} & {*parts}
    benches = {kind: decoded(loaded, of_kinds[kind][:texts_of_kind], prompt) for kind in of_kinds if needs_kinds}

    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "studies.quality", *sys.argv[1:]]),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions("sere-dist", "torch", "transformers"),
        "example": example,
        "half": half,
        "texts": {kind: len(of_kind) for kind, of_kind in by_kind(of_all).items()},
        "texts_of_kind": {kind: len(of_kind.ids_NL) for kind, of_kind in benches.items()},
        "length": length,
        "prompt": prompt,
        "calibration_texts": {"all": counts[-1], "CKA": SAMPLES_OF_CKA, "each kind": SAMPLES_OF_KIND},
        "sensitivity_texts": SENSITIVITY_SAMPLES,
        "calibration_length": calibration_length,
    }

    def save() -> None:
        report["seconds"] = round(time.perf_counter() - started)
        results.mkdir(parents=True, exist_ok=True)
        file.write_text(line_by_line(report))

    if Part.FIELD in parts:
        kinds = [text.kind for text in of_all]
        shown = {PAPER, *rivals} if rivals else LOOKS if only_drawn else field_of
        wanted = {name: rerouter_of for name, rerouter_of in field_of.items() if name in shown}
        sizes = batches or BATCHES
        saliency = projection.saliency
        num_experts = MoeShape.from_config(loaded.config).num_experts

        def pruned(share: float) -> Rerouter:
            return reap_rerouter(saliency, round(share * num_experts))

        priced = partial(projection.projection, 1)
        report["field"] = field(bench, kinds, wanted, sizes, keeps, prices or PRICES, priced, pruned)
        save()  # it takes the longest
        for batch in sizes:
            console.print(field_table(report["field"], batch, keeps))
            console.print(priced_table(report["field"], batch))
            console.print(pruned_table(report["field"], batch))
        draw(report, pictures)
    if Part.KINDS in parts:
        report["kinds"] = in_batches_of_one_kind(benches, field_of)
        console.print(kinds_table(report["kinds"]))
    if Part.BESIDE_RANDOM in parts:
        report["beside_random"] = compare_with_random(bench, field_of)
        console.print(random_table(report["beside_random"]))
    if Part.TRANSFER in parts:
        report["transfer"] = transfer(benches, checkpoint, by_kind(to_calibrate))
        for policy in (PAPER, PROJECTION):
            console.print(transfer_table(report["transfer"], policy))
    if Part.SAMPLES in parts:
        report["samples"] = by_samples(bench, by_count)
        console.print(samples_table(report["samples"]))
    save()
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)

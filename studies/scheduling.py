"""Whether requests that share experts should decode together: chosen among replicas, or among those that wait.

    python -m studies.scheduling                        # the example model of the tests
    python -m studies.scheduling --example smollm2-moe  # SmolLM2-MoE, once the demo has put it together

The routing of the held-out texts is recorded once, and batches are put together from it. What re-routing makes of a
batch is computed from the recorded router weights, so errors of earlier layers do not change later ones. Requests come
in a random order. No text comes twice, so cells that need more requests than there are texts are left out.

Across replicas, each of R gets as many requests as its batch has room for:

- at random: what balancing comes to where loads are equal.
- by kind of text, sorted: what a router would do that is told the kind.
- by the prompt: a request goes to the replica with room whose requests' prompts use the most similar experts (cosine of
  the counts of each expert in each layer, less their means). With even loads, only replicas with the fewest requests
  are asked.
- by the answer: the same with the decoded tokens' experts, which no router can know; and the best that swaps of two
  requests find, by the expected union (`swapped`).

Among those that wait at one replica, which decodes without pause, the most similar of the first W is next when a
request ends. One that 2 W others have passed goes first.

The rule, from before anything was measured: grouping is worth a place here if, by the prompt, at batch 16 and with
re-routing on, the forecast of a decode step of Qwen3-30B-A3B is at least 5% shorter than at random.

Errors are standard errors over random orders, of ratios by pairs; all orders draw from the same texts. Prints a table
and one JSON line last; writes `studies/results/scheduling-<example>.json`.
"""

import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich import box
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from examples.application import EXAMPLES
from sere_dist import console
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.evaluation.lockstep import Routed, active_by_step, decode_logits
from sere_dist.evaluation.protocol import (
    BATCH,
    CALIBRATION_TEXTS,
    LENGTH,
    PROMPT,
    calibration_texts,
    cut,
    mixed,
    read_texts,
)
from sere_dist.forecast import DEVICES, ModelCost, decode_step
from sere_dist.method.projection import primary_by_price
from sere_dist.method.records import LayerTables, Settings, Step
from sere_dist.moe import MoeShape, load_model
from sere_dist.provenance import line_by_line, machine, rounded, versions
from sere_dist.standard_errors import ratio_with_error
from studies.common import RESULTS, ROOT
from studies.grouping import BY_PROMPT, PROMPT_EVEN, RANDOM, Schedule, arranged, cells
from studies.quality import calibrate

MEASURED = 96  # steps of each schedule, evenly spaced: neighbours' unions are alike
TUNED = Settings(1, expert_price=0.02)
SHAPE, CONTEXT, HARDWARE = ROOT / "benchmarks/shapes/qwen3-30b-a3b", 640, ("h200", "2-cpu-cores")
WORTH_IT = 0.05


@dataclass(frozen=True)
class Recorded:
    """What the routers chose for N texts. D decode steps, K experts per token, E experts, F layers times experts."""

    routing: dict[int, Routed]  # by layer: weights and ids [N, D, K]
    prompt_NF: torch.Tensor  # the share of a text's tokens that use each expert of each layer
    answer_NF: torch.Tensor
    num_experts: int

    @property
    def steps(self) -> int:
        return next(iter(self.routing.values()))[0].shape[1]


def record(model: PreTrainedModel, ids_NL: torch.Tensor, prompt_length: int) -> Recorded:
    """Decodes texts. The first token of each is left out, and the last has no next one."""
    seen: dict[int, list[Routed]] = {}
    num_experts = MoeShape.from_config(model.config).num_experts

    def look(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: torch.Tensor | None) -> Routed:
        seen.setdefault(layer, []).append((weights_DBK.transpose(0, 1).float(), ids_DBK.transpose(0, 1)))
        return weights_DBK, ids_DBK

    for part_BL in tqdm(ids_NL.split(8), desc="recording"):
        decode_logits(model, part_BL, prompt_length=1, rerouter=look)
    of_all = {layer: tuple(map(torch.cat, zip(*parts, strict=True))) for layer, parts in seen.items()}
    ends = slice(0, prompt_length - 1), slice(prompt_length - 1, None)
    routing = {layer: (weights[:, ends[1]], ids[:, ends[1]]) for layer, (weights, ids) in of_all.items()}
    shares = (
        torch.cat([F.one_hot(ids[:, part], num_experts).sum(2).float().mean(1) for _, ids in of_all.values()], dim=1)
        for part in ends
    )
    return Recorded(routing, *shares, num_experts)


def primary(weights_BK: torch.Tensor, ids_BK: torch.Tensor, tables: LayerTables) -> torch.Tensor:
    return primary_by_price(Step(weights_BK, ids_BK), tables, TUNED)


def active(recorded: Recorded, schedule: Schedule, tables: Mapping[int, LayerTables] | None = None) -> float:
    """Returns the experts that a layer runs in a step, the mean over layers and steps.

    With tables (of method projection, by layer) it is re-routed by an expert's price. What runs then are the primary
    experts: each has a slot that stays, and all other slots go to one of them or are dropped.
    """
    means = []
    for layer, routing in recorded.routing.items():
        weights_SBK, ids_SBK = (each[schedule.text_SB, schedule.step_SB] for each in routing)
        if tables is None:
            runs_SE = active_by_step(ids_SBK, recorded.num_experts)
        else:
            runs_SE = torch.vmap(partial(primary, tables=tables[layer]))(weights_SBK, ids_SBK)
        means.append(float(runs_SE.sum(1).float().mean()))
    return statistics.fmean(means)


def step_seconds(cost: ModelCost, hardware: str, batch: int, share: float) -> float:
    """Returns the forecast of a step that runs this share of all experts."""
    return decode_step(cost, DEVICES[hardware], batch, share * cost.shape.num_experts, CONTEXT).seconds


def measure(
    recorded: Recorded, kinds: torch.Tensor, tables: Mapping[int, LayerTables], orders: int
) -> Iterator[dict[str, Any]]:
    """Yields a row for each cell and rule, with and without re-routing, beside random of the same."""
    cost = ModelCost.of(Checkpoint(str(SHAPE)).empty_model(), 2.0)
    for cell in tqdm(cells(len(kinds)), desc="scheduling"):
        found: dict[tuple[str, bool], list[float]] = {}
        passes: dict[str, list[int]] = {}
        for seed in range(orders):
            order_N = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed))
            known = (each[order_N] for each in (recorded.prompt_NF, recorded.answer_NF, kinds))
            for rule, (schedule, passed) in arranged(cell, recorded.steps, *known).items():
                passes.setdefault(rule, []).extend(passed)
                some = torch.linspace(0, len(schedule.text_SB) - 1, MEASURED).round().long()
                schedule = Schedule(order_N[schedule.text_SB[some]], schedule.step_SB[some])
                for is_on in (False, True):
                    ran = active(recorded, schedule, tables if is_on else None)
                    found.setdefault((rule, is_on), []).append(ran)
        for (rule, is_on), ours in found.items():
            theirs = found[RANDOM, is_on]
            about = {**cell._asdict(), "rule": rule, "rerouted": is_on, "active_experts": statistics.fmean(ours)}
            about["ratio"], about["ratio_error"] = ratio_with_error(ours, theirs)
            shares = [statistics.fmean(each) / recorded.num_experts for each in (ours, theirs)]
            for hardware in HARDWARE:
                our_time, their_time = (step_seconds(cost, hardware, cell.batch, share) for share in shares)
                about[f"time_saved_{hardware}"] = 1 - our_time / their_time
            if passed := passes[rule]:
                about |= {"passes_mean": statistics.fmean(passed), "passes_most": max(passed)}
            yield {name: rounded(value) if isinstance(value, float) else value for name, value in about.items()}


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Applies the rule to the best of what a router could do."""
    candidates = [
        (row[f"time_saved_{hardware}"], hardware, row)
        for row in rows
        for hardware in HARDWARE
        if row["batch"] == BATCH and row["rerouted"] and row["rule"] in (BY_PROMPT, PROMPT_EVEN)
    ]
    saved, hardware, row = max(candidates, key=lambda candidate: candidate[0])
    return {"is_worth_it": saved >= WORTH_IT, "time_saved": saved, "hardware": hardware, "where": row}


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table("batch", "replicas", "of those waiting", "rule", "off", "re-routed", "passes", box=box.SIMPLE)
    of = {(row["batch"], row["replicas"], row["window"], row["rule"], row["rerouted"]): row for row in rows}
    for *place, is_on in of:
        if not is_on:
            off, on = (of[*place, each] for each in (False, True))
            passes = f"{off['passes_mean']:.1f}, at most {off['passes_most']}" if "passes_most" in off else ""
            ran = [f"{row['active_experts']:.1f} x{row['ratio']:.3f} ±{row['ratio_error']:.3f}" for row in (off, on)]
            table.add_row(*map(str, place), *ran, passes)
    return table


def main(
    example: Annotated[str, typer.Option(help=f"The model: {' or '.join(EXAMPLES)}.")] = "tiny-moe",
    texts: Annotated[int | None, typer.Option(help="Held-out texts, of both halves. By default, all.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of these that are prefill.")] = PROMPT,
    calibration: Annotated[int, typer.Option(help="Texts to calibrate on.")] = CALIBRATION_TEXTS,
    orders: Annotated[int, typer.Option(help="Random orders of arrival.")] = 10,
    results: Annotated[Path, typer.Option(help="Folder for the JSON.")] = RESULTS,
) -> None:
    started, own = time.perf_counter(), EXAMPLES[example]
    tokenizer, checkpoint = AutoTokenizer.from_pretrained(own.model), Checkpoint(str(own.model))
    model = load_model(str(own.model), "cpu")
    of_all = mixed(cut(read_texts(own.held_out, tokenizer), LENGTH))[:texts]
    names = sorted({text.kind for text in of_all})
    kinds = torch.tensor([names.index(text.kind) for text in of_all])
    to_calibrate = calibration_texts(own.calibration, tokenizer, count=calibration)
    (projection,) = calibrate(checkpoint, to_calibrate, ("projection",))
    recorded = record(model, torch.tensor([text.ids for text in of_all]), prompt)
    rows = list(measure(recorded, kinds, projection.tables, orders))
    report = {
        "command": shlex.join(["python", "-m", "studies.scheduling", *sys.argv[1:]]),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions("sere-dist", "torch", "transformers"),
        "example": example,
        "texts": len(of_all),
        "kinds": len(names),
        "prompt": prompt,
        "length": LENGTH,
        "calibration_texts": calibration,
        "orders": orders,
        "settings": TUNED._asdict(),
        "verdict": verdict(rows),
        "rows": rows,
        "seconds": round(time.perf_counter() - started),
    }
    console.tables().print(table_of(rows))
    results.mkdir(parents=True, exist_ok=True)
    (results / f"scheduling-{example}.json").write_text(line_by_line(report))
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)

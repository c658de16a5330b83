"""Active experts against held-out perplexity of the example model, for every S: the figure of the README.

    python -m benchmarks.tradeoff --artifact build/tiny-moe-sere

Batches of 16 held-out texts decoded in lockstep (see sere_dist.evaluation.lockstep), and for some S batches of 1 to 32:
what re-routing costs falls as the batch grows. Prints tables and one JSON line last; writes
`benchmarks/results/tradeoff.json` and `docs/tradeoff.png`.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import ROOT, TINY_MOE, example_texts
from sere_dist.artifact import Artifact
from sere_dist.evaluation.errors import difference_with_error
from sere_dist.evaluation.lockstep import LockstepResult, lockstep
from sere_dist.evaluation.policies import similarity_policy
from sere_dist.moe import load_model

matplotlib.use("agg")
import matplotlib.pyplot as plt

BATCH, LENGTH, PROMPT = 16, 256, 32
BATCHES, TEXTS_OF_BATCHES, S_OF_BATCHES = (1, 2, 4, 8, 16, 32), 64, (1, 2, 4)


def summary(select_top_k: int, on: list[LockstepResult], off: list[LockstepResult]) -> dict:
    """Returns active experts, perplexity, and the rise of the loss over the model's own, paired by batch."""
    total = sum(on[1:], on[0])
    rise, error = difference_with_error([result.loss for result in on], [result.loss for result in off])
    return {
        "select_top_k": select_top_k,
        "active_experts": round(total.active_experts, 2),
        "perplexity": round(total.perplexity, 3),
        "loss_rise": round(rise, 5),
        "loss_rise_standard_error": round(error, 5),
    }


def draw(points: list[dict], top_k: int, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=150)
    axes.plot([p["active_experts"] for p in points], [p["perplexity"] for p in points], "o-", color="tab:blue")
    for point in points:
        label = f"{point['select_top_k']}" + (" = off" if point["select_top_k"] == top_k else "")
        place = (point["active_experts"], point["perplexity"])
        axes.annotate(label, place, xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set_title("S, the experts that every token keeps, beside each point", fontsize="medium")
    axes.set_xlabel(f"experts that a layer runs in a decode step (batch {BATCH}, 64 experts, top-{top_k})")
    axes.set_ylabel("held-out perplexity")
    axes.margins(0.08, 0.15)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main(
    artifact: Annotated[Path, typer.Option(help="Artifact of the example model.")] = ROOT / "build" / "tiny-moe-sere",
    results: Annotated[Path, typer.Option(help="Where the JSON goes.")] = ROOT / "benchmarks/results/tradeoff.json",
    picture: Annotated[Path, typer.Option(help="Where the figure goes.")] = ROOT / "docs" / "tradeoff.png",
) -> None:
    loaded, model = Artifact.load(artifact), load_model(str(TINY_MOE / "model"), "cpu")
    ids_BL = example_texts("heldout.parquet", LENGTH)
    batches = [batch for batch in ids_BL.split(BATCH) if len(batch) == BATCH]
    top_k = loaded.config.num_experts_per_token

    def run(batches: list[torch.Tensor], select_top_k: int) -> list[LockstepResult]:
        policy = similarity_policy(loaded.similarity, select_top_k)
        return [lockstep(model, batch, prompt_length=PROMPT, policy=policy) for batch in batches]

    results_by_s = {s: run(batches, s) for s in track(range(1, top_k + 1), "settings")}
    by_batch = []
    for size in track(BATCHES, "batches"):
        parts = ids_BL[:TEXTS_OF_BATCHES].split(size)
        off = run(parts, top_k)
        by_batch += [{"batch": size, **summary(s, run(parts, s), off)} for s in S_OF_BATCHES]
    points = [summary(select_top_k, on, results_by_s[top_k]) for select_top_k, on in results_by_s.items()]

    table = Table("S", "active experts", "perplexity", "loss rise, nats a token")
    for point in points:
        rise = f"{point['loss_rise']:.4f} +- {point['loss_rise_standard_error']:.4f}"
        table.add_row(str(point["select_top_k"]), f"{point['active_experts']}", f"{point['perplexity']}", rise)
    Console().print(table)
    table = Table("batch", *(f"S = {s}: active experts, loss rise" for s in S_OF_BATCHES))
    for size in BATCHES:
        of_size = [point for point in by_batch if point["batch"] == size]
        cells = [f"{p['active_experts']}, {p['loss_rise']:.3f} +- {p['loss_rise_standard_error']:.3f}" for p in of_size]
        table.add_row(str(size), *cells)
    Console().print(table)
    draw(points, top_k, picture)
    report = {
        "command": "python -m benchmarks.tradeoff",
        "method": loaded.config.method,
        "batch": BATCH,
        "texts": BATCH * len(batches),
        "tokens": LENGTH,
        "prompt": PROMPT,
        "points": points,
        "by_batch": by_batch,
        "texts_by_batch": TEXTS_OF_BATCHES,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("sere-dist", "torch", "transformers")},
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)

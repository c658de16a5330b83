"""What a tuning finds for the example model, and what that costs on held-out texts.

    python -m studies.tuning          # 5 minutes on 2 cores; calibrates into build/studies if nothing is there
    python -m studies.tuning --draw   # only the picture, from the JSON

Tunes on the half of the held-out texts that is there for choices, for batch 16 and a KL divergence of at most 0.02 nats
per token. Measures the recommendation on the other half, by the protocol of `sere_dist.evaluation.protocol`: at every
batch, and at batch 16 beside the same S in all layers. Prints a table and one JSON line last; writes
`studies/results/tuning.json` and `docs/tuning.png`.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import ray
import torch
import typer
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer

from calibration_jobs.tune import TuningConfig, tune
from examples.tiny_moe.data import HELDOUT, MODEL
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.recommendation import LayerSetting, Outcome, Recommendation
from sere_dist.console import tables
from sere_dist.evaluation.figures import ACTIVE_EXPERTS, KL_DIVERGENCE, draw_recommendation
from sere_dist.evaluation.lockstep import HeldOut, unchanged
from sere_dist.evaluation.outcome import outcome_of
from sere_dist.evaluation.protocol import (
    BATCH,
    BATCHES,
    LENGTH,
    PROMPT,
    cut,
    decoded,
    half_of,
    held_out_texts,
    read_texts,
)
from sere_dist.evaluation.tuning import rerouter_of
from sere_dist.moe import load_model
from sere_dist.provenance import line_by_line, machine, versions
from studies.artifacts import ARTIFACTS, calibrated, write_texts
from studies.common import RESULTS, ROOT

MAX_KL = 0.02


def measured(recommended: Recommendation, artifact: Artifact, texts: HeldOut) -> Recommendation:
    """Returns the recommendation with its evidence from the protocol's texts instead of the job's."""
    off = {batch: texts.run(unchanged, batch) for batch in BATCHES}

    def outcome(layers: dict[int, LayerSetting], batch: int) -> Outcome:
        result = texts.run(rerouter_of(artifact.tables, recommended.policy, layers), batch)
        return outcome_of(result, off[batch], batch)

    same = {keep: dict.fromkeys(recommended.layers, LayerSetting(select_top_k=keep)) for keep in recommended.uniform}
    evidence = {
        "off": [outcome_of(result, result, batch) for batch, result in off.items()],
        "recommended": [outcome(recommended.layers, batch) for batch in tqdm(BATCHES, desc="recommended")],
        "uniform": {keep: outcome(layers, BATCH) for keep, layers in tqdm(same.items(), desc="the same S")},
    }
    return recommended.model_copy(update=evidence)


def draw(recommended: Recommendation, path: Path) -> None:
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    draw_recommendation(axes, recommended)
    axes.set_xlabel(f"{ACTIVE_EXPERTS}, batch {recommended.batch}")
    axes.set_ylabel(KL_DIVERGENCE)
    axes.legend(frameon=False)
    figure.savefig(path)


def table_of(recommended: Recommendation) -> Table:
    found = Table("", "batch", "active experts", "KL", "loss", "perplexity", "likeliest token kept", box=box.SIMPLE)
    rows = [("baseline", each) for each in recommended.off]
    rows += [("recommended", each) for each in recommended.recommended]
    rows += [(f"S = {keep}", each) for keep, each in recommended.uniform.items()]
    for name, each in rows:
        kl, rise = f"{each.kl:.4f} ±{each.kl_error:.4f}", f"{each.loss_rise:+.4f} ±{each.loss_rise_error:.4f}"
        top1 = f"{each.top1:.1%} ±{each.top1_error:.1%}"
        found.add_row(name, str(each.batch), f"{each.active_experts:.1f}", kl, rise, f"{each.perplexity:.2f}", top1)
    return found


def main(
    artifacts: Annotated[Path, typer.Option(help="Folder of the example model's artifacts.")] = ARTIFACTS,
    results: Annotated[Path, typer.Option(help="File for the JSON.")] = RESULTS / "tuning.json",
    picture: Annotated[Path, typer.Option(help="File for the figure.")] = ROOT / "docs/tuning.png",
    only_draw: Annotated[bool, typer.Option("--draw", help="Draw the picture of --results; measure nothing.")] = False,
) -> None:
    if only_draw:
        return draw(Recommendation.model_validate(json.loads(results.read_text())["recommendation"]), picture)
    path, tokenizer = calibrated("projection", artifacts), AutoTokenizer.from_pretrained(MODEL)
    to_choose = cut(half_of(read_texts(HELDOUT, tokenizer), "choice"), LENGTH)
    dataset = write_texts(artifacts / "choice.parquet", to_choose)
    started = time.perf_counter()
    recommended = tune(
        TuningConfig(
            model=str(MODEL),
            artifact=path,
            dataset=str(dataset),
            batch=BATCH,
            max_kl=MAX_KL,
            num_samples=len(to_choose) // 2,
            length=LENGTH,
            prompt_length=PROMPT,
        )
    )
    assert recommended is not None  # it is no dry run
    seconds = round(time.perf_counter() - started)
    ray.shutdown()

    texts = decoded(load_model(str(MODEL), "cpu"), held_out_texts(HELDOUT, tokenizer))
    about = (
        f"{len(to_choose) // 2} texts of the choice half to tune on; {len(texts.ids_NL)} of the final half to report on"
    )
    recommended = measured(recommended, Artifact.load(path), texts).model_copy(update={"texts": about})
    tables().print(table_of(recommended))
    draw(recommended, picture)
    report = {
        "command": "python -m studies.tuning",
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions("sere-dist", "torch", "transformers", "ray"),
        "seconds_of_tuning": seconds,
        "recommendation": recommended.model_dump(mode="json"),
    }
    results.write_text(line_by_line(report))
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)

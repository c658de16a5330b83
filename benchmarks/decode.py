"""Time per output token of real vLLM, re-routing off and on in turns, on random weights of a real shape.

    python -m benchmarks.decode                                   # cpu-small, about 20 minutes on 2 cores
    python -m benchmarks.decode --preset qwen3-30b-a3b --batches 1,4,16,32,64,128 --keep 1,2,4,8   # an H200
    python -m benchmarks.decode --dry-run                         # lists what it would time
    python -m benchmarks.decode --compiled --batches 4,16 --top-k 4     # beside a model that chooses 4 experts a token

On a CPU, in eager mode, one engine takes turns: with the routers that vLLM gave it ("stock"), and with each policy and
setting. What compiled code or CUDA graphs hold can't be taken out, so there each policy has an engine of its own; two
engines differ by some per cent by where their weights lie in memory. What S = K costs is less than ratios can tell: in
eager runs on a CPU the worker times its re-routing itself. A measurement sends a batch of random prompts, lets all of
them through prefill, and times decode steps one by one. Tokens are sampled, so that requests don't fall into step with
one another.

Random weights route nearly uniformly, which is the largest union a batch can have: that flatters every method that
shrinks it. Trained models route less evenly: the example model, on text, runs 54.3 of 64 experts at batch 16 where
uniform routing predicts 56.4 (studies.quality). The run fails if the measured union is not the one that uniform
routing predicts. Prints a table and one JSON line last; writes
`benchmarks/results/decode-<preset>.json` and `docs/decode-<preset>.png`.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # sends `follow` to the worker
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import matplotlib
import torch
import typer
from rich.progress import track
from rich.table import Table

from benchmarks.common import RESULTS, ROOT, numbers, ranged, spread
from benchmarks.policies import REROUTED, Setting, follow, rerouting_seconds
from sere_dist.console import progress, tables
from sere_dist.provenance import keep, machine, rounded, versions

matplotlib.use("agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from vllm import LLM

SHAPES = ROOT / "benchmarks" / "shapes"
PROMPT = 32
STOCK = "stock"
TOLERANCE = 0.1  # of the union that uniform routing predicts


@contextmanager
def engine(model: Path, compiled: bool, most_rows: int, load_format: str = "dummy", **options: Any) -> Generator["LLM"]:
    from vllm import LLM

    llm = LLM(
        str(model),
        skip_tokenizer_init=True,
        load_format=load_format,
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


def random_prompts(batch: int, vocabulary: int, seed: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, PROMPT), generator=random).tolist()


def step_seconds(llm: "LLM", prompts: list[list[int]], steps: int) -> list[float]:
    """Returns the seconds of each decode step of a batch of prompts, all in decode from the first on."""
    from vllm import RequestOutput, SamplingParams

    parameters = SamplingParams(temperature=1, max_tokens=steps + 2, ignore_eos=True, detokenize=False)
    for ids in prompts:
        llm.llm_engine.add_request(uuid4().hex, {"prompt_token_ids": ids}, parameters)
    seconds, prefilled, batch = [], set(), len(prompts)
    while llm.llm_engine.has_unfinished_requests():
        started = time.perf_counter()
        answers = llm.llm_engine.step()
        took = time.perf_counter() - started
        if len(prefilled) == batch:
            seconds.append(took)
        generated = [answer for answer in answers if isinstance(answer, RequestOutput)]
        prefilled |= {answer.request_id for answer in generated if answer.outputs[0].token_ids}
    return seconds[1 : steps + 1]


def active_experts(llm: "LLM") -> tuple[float, float]:
    """Returns active experts a layer and step, before and after re-routing, since the last call."""
    worker = llm.collective_rpc("sere_counters", kwargs={"reset": True})[0]
    layers = worker["layers"].values()
    steps = sum(layer["steps"] for layer in layers)
    return tuple(sum(layer[f"active_experts_{when}"] for layer in layers) / steps for when in ("before", "after"))


def measure(
    settings: list[Setting],
    batches: list[int],
    steps: int,
    rounds: int,
    engine_of: Callable[[Setting], "LLM"],
    artifacts: dict[str, str] | None,
    prompts: Callable[[int, int], list[list[int]]],
) -> list[dict[str, Any]]:
    """Returns a row for each batch and setting. All take turns in every round, each time in another order.

    Args:
        artifacts: those that an eager engine changes between; None: engines keep their policies.
        prompts: those of a batch in a round.
    """
    seconds: dict[tuple[int, Setting], list[float]] = {(b, s): [] for b in batches for s in settings}
    active: dict[tuple[int, Setting], list[tuple[float, float]]] = {each: [] for each in seconds}
    rerouting_ms: dict[tuple[int, Setting], list[float]] = {each: [] for each in seconds}
    order = Random(0)
    turns = [(b, s, t) for t in range(rounds + 1) for b in batches for s in order.sample(settings, len(settings))]
    for batch, setting, turn in track(turns, "decode", console=progress()):
        llm, is_rerouted = engine_of(setting), setting.kind in REROUTED
        if artifacts is not None:
            llm.collective_rpc(follow, args=(setting.kind, setting.number, artifacts))
            llm.collective_rpc(rerouting_seconds)
        elif is_rerouted:
            llm.collective_rpc("sere_settings", kwargs=setting.changes)
        if is_rerouted:
            llm.collective_rpc("sere_counters", kwargs={"reset": True})
        took = step_seconds(llm, prompts(batch, turn), steps if turn else 3)
        if turn:  # the first warms up
            seconds[batch, setting].append(statistics.median(took))
            if is_rerouted:
                active[batch, setting].append(active_experts(llm))
            if artifacts is not None:
                rerouting_ms[batch, setting].append(1e3 * llm.collective_rpc(rerouting_seconds)[0])
    rows = []
    for (batch, setting), values in seconds.items():
        row: dict[str, Any] = {
            "batch": batch,
            "setting": str(setting),
            "ms_per_token": spread([1e3 * value for value in values]),
            "ms_by_round": [rounded(1e3 * value) for value in values],
        }
        ratios = [a / b for a, b in zip(seconds[batch, settings[0]], values, strict=True)]
        row["times_faster"] = spread(ratios)
        if active[batch, setting]:
            before, after = (statistics.mean(each) for each in zip(*active[batch, setting], strict=True))
            row |= {"active_before": rounded(before), "active_after": rounded(after)}
        if artifacts is not None and setting.kind != STOCK:
            row["rerouting_ms"] = spread(rerouting_ms[batch, setting])
        rows.append(row)
    return rows


def measure_shape(
    model: Path, settings: list[Setting], batches: list[int], steps: int, rounds: int, compiled: bool, artifact: Path
) -> list[dict[str, Any]]:
    """Measures random weights of a shape, on random prompts."""
    from transformers import AutoConfig

    from sere_dist.moe import MoeShape

    config = AutoConfig.from_pretrained(model)
    experts, top_k = MoeShape.from_config(config).num_experts, MoeShape.from_config(config).num_experts_per_token
    is_one_engine = not compiled and not torch.cuda.is_available()
    sere = {"artifact": str(artifact), "select_top_k": top_k, "min_rows": 0}

    def engine_name(setting: Setting) -> str:
        """Settings of one policy share an engine; so do all, where one engine can follow every policy."""
        return "all" if is_one_engine else REROUTED.get(setting.kind, str(setting))

    configurations: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name = engine_name(setting)
        if name == "all":
            configurations[name] = {"additional_config": {"sere": sere}}
        elif setting.kind in REROUTED:
            configurations[name] = {"additional_config": {"sere": sere | {"policy": name}}}
        else:
            configurations[name] = {"hf_overrides": {"num_experts_per_tok": int(setting.number) or top_k}}
    options: dict[str, Any] = {}
    if torch.cuda.is_available():
        options["gpu_memory_utilization"] = 0.94 / len(configurations)
    with ExitStack() as stack:
        start = partial(engine, model, compiled, max(batches), **options)
        engines = {name: stack.enter_context(start(**configuration)) for name, configuration in configurations.items()}
        for llm in engines.values():  # one that is to re-route stops if its first decode step is not re-routed
            step_seconds(llm, random_prompts(1, config.vocab_size, seed=1), 1)
        rows = measure(
            settings,
            batches,
            steps,
            rounds,
            lambda setting: engines[engine_name(setting)],
            dict.fromkeys(REROUTED.values(), str(artifact)) if is_one_engine else None,
            lambda batch, turn: random_prompts(batch, config.vocab_size, seed=turn * 1000 + batch),
        )
    for row in rows:
        if "active_before" in row:
            row["uniform"] = rounded(experts * (1 - (1 - top_k / experts) ** row["batch"]))
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
        *("batch", "engine", "ms per output token", "times faster", "ms of it re-routing"),
        *("active experts: router, run", "uniform"),
        title=f"{result['preset']}, {'compiled' if result['compiled'] else 'eager'}: medians of rounds (min-max)",
    )
    for row in result["rows"]:
        active = f"{row['active_before']:.3g}, {row['active_after']:.3g}" if "uniform" in row else ""
        faster = "" if row["setting"] == STOCK else ranged(row["times_faster"])
        uniform = f"{row['uniform']:.3g}" if "uniform" in row else ""
        own = ranged(row["rerouting_ms"]) if "rerouting_ms" in row else ""
        table.add_row(str(row["batch"]), row["setting"], ranged(row["ms_per_token"]), faster, own, active, uniform)
    return table


def draw(result: dict[str, Any], figure: Path) -> None:
    """Milliseconds per output token against the batch, a line for each engine."""
    _, axes = plt.subplots(figsize=(7, 3.6))
    for setting in dict.fromkeys(row["setting"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["setting"] == setting]
        times = [row["ms_per_token"] for row in rows]
        middle = [time["median"] for time in times]
        spans = [[time["median"] - time["min"] for time in times], [time["max"] - time["median"] for time in times]]
        style: dict[str, Any] = {"color": "black", "linestyle": "--"} if setting == STOCK else {}
        axes.errorbar([row["batch"] for row in rows], middle, spans, marker="o", capsize=3, label=setting, **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="requests that decode together", ylabel="ms per output token", ylim=(0, None))
    machine = result["machine"]
    where = machine.get("gpu", f"{machine['cores']} CPU cores")
    axes.set_title(f"{result['preset']}, random weights, {where}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    plt.savefig(figure, dpi=150, bbox_inches="tight")
    plt.close()


def main(
    preset: Annotated[str, typer.Option(help="Shape of the model: a folder of benchmarks/shapes.")] = "cpu-small",
    batches: Annotated[str, typer.Option(help="Batches to time, in requests that decode together.")] = "1,4,16,32,64",
    keep_experts: Annotated[
        str, typer.Option("--keep", help="Values of S to time, under the paper's policy.")
    ] = "1,2,4,8",
    prices: Annotated[str, typer.Option(help="Prices of an expert to time, under policy projection.")] = "",
    oea: Annotated[str, typer.Option(help="Values of S to time under OEA, in eager mode on CPUs.")] = "",
    steps: Annotated[int, typer.Option(help="Decode steps per measurement.")] = 12,
    rounds: Annotated[int, typer.Option(help="Measurements of each setting.")] = 5,
    top_k: Annotated[str, typer.Option(help="Smaller values of the top-k to time as baselines.")] = "",
    compiled: Annotated[bool, typer.Option(help="Time vLLM's compiled mode, not eager mode.")] = False,
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be timed; needs no vLLM.")] = False,
    results: Annotated[Path | None, typer.Option(help="JSON file to add the results to.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Picture to draw.")] = None,
) -> None:
    model = SHAPES / preset
    if not (model / "config.json").exists():
        raise typer.BadParameter(f"no shape {preset}; there are {', '.join(sorted(p.name for p in SHAPES.iterdir()))}")
    if is_dry_run:
        engines = 1 + bool(keep_experts) + bool(prices) + len(numbers(top_k)) if compiled else 1
        kinds = f"S = {keep_experts or 'none'}, prices {prices or 'none'}"
        print(f"would start {engines} engines of {preset}; {kinds}, batches {batches}, {rounds} rounds")
        print(json.dumps({"dry_run": {"engines": engines, "keep": numbers(keep_experts), "batches": numbers(batches)}}))
        return
    if oea and (compiled or torch.cuda.is_available()):
        raise typer.BadParameter("OEA is torch code between two steps of an eager engine on a CPU: remove --oea")
    # They take seconds to import, which a dry run saves.
    from transformers import AutoConfig

    from benchmarks.engines import allow_this_vllm, write_random_artifact
    from sere_dist.moe import MoeShape

    is_tested = allow_this_vllm()
    models_top_k = MoeShape.from_config(AutoConfig.from_pretrained(model)).num_experts_per_token
    settings = [Setting(STOCK)]
    for keep_s in sorted({min(s, models_top_k) for s in numbers(keep_experts)}):
        settings.append(Setting("paper", keep_s, is_off=keep_s == models_top_k))
    settings += [Setting("price", float(price)) for price in prices.split(",") if price]
    settings += [Setting("OEA", s) for s in numbers(oea)] + [Setting("top-k", n) for n in numbers(top_k)]
    with tempfile.TemporaryDirectory() as folder:
        artifact = write_random_artifact(model, Path(folder))
        rows = measure_shape(model, settings, numbers(batches), steps, rounds, compiled, artifact)
    result = {
        "command": f"python -m benchmarks.decode --preset {preset} --batches {batches} --keep {keep_experts}"
        + f" --steps {steps} --rounds {rounds}"
        + f" --prices {prices}" * bool(prices)
        + f" --oea {oea}" * bool(oea)
        + f" --top-k {top_k}" * bool(top_k)
        + " --compiled" * compiled,
        "machine": machine(),
        "versions": versions("sere-dist", "vllm", "vllm-cpu", "torch", "ray"),
        "vllm_is_tested": is_tested,
        "preset": preset,
        "compiled": compiled,
        "rows": rows,
    }
    tables().print(decode_table(result))
    check_union(rows)
    draw(result, figure or ROOT / "docs" / f"decode-{preset}.png")
    mode = "compiled" if compiled else "eager"
    keep(results or RESULTS / f"decode-{preset}.json", {mode: result})
    print(json.dumps({mode: result}))


if __name__ == "__main__":
    typer.run(main)

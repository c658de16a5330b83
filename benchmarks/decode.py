"""Time per output token of real vLLM, re-routing off and on in turns, on random weights of a real shape.

    python -m benchmarks.decode                                   # cpu-small, about 20 minutes on 2 cores
    python -m benchmarks.decode --preset qwen3-30b-a3b --batches 1,4,16,32,64,128 --keep 1,2,4,8   # an H200
    python -m benchmarks.decode --dry-run                         # lists what it would time
    python -m benchmarks.decode --compiled --batches 4,16 --top-k 4     # beside a model that chooses 4 experts a token

One engine takes turns: with the routers that vLLM gave it ("stock"), and re-routing with each S. What compiled code or
CUDA graphs hold can't be taken out again, so there a second engine, without the plugin, is the stock one; two engines
differ by some per cent by where their weights lie in memory. What S = K costs is less than ratios resolve: in eager
runs on a CPU the worker times its re-routing itself. A measurement sends a batch of random prompts, lets all of them
through prefill, and times decode steps one by one. Tokens are sampled, so that requests don't fall into step with one
another.

Random weights route nearly uniformly, which is the largest union a batch can have: that flatters every method that
shrinks it. Trained models route less evenly: the example model, on text, runs 54.3 of 64 experts at batch 16 where
uniform routing predicts 56.4 (benchmarks.tradeoff). The run fails if the measured union is not the one that uniform
routing predicts. Prints a table and one JSON line last; writes
`benchmarks/results/decode-<preset>.json` and `docs/decode-<preset>.png`.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # sends `put_routers_back` to the worker
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import matplotlib
import torch
import typer
from rich.progress import track
from rich.table import Table

from benchmarks.common import RESULTS, ROOT, numbers, ranged, spread
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


@dataclass(frozen=True)
class Setting:
    """What decodes: re-routing that keeps S experts a token; where S is None, vLLM alone.

    `top_k` is how many experts a token chooses: the model's own, or fewer (a baseline).
    """

    select_top_k: int | None
    top_k: int
    is_models_top_k: bool = True

    def __str__(self) -> str:
        if self.select_top_k is None:
            return STOCK if self.is_models_top_k else f"top-{self.top_k}"
        return f"S = {self.select_top_k}" + " (off)" * (self.select_top_k == self.top_k)


@contextmanager
def engine(model: Path, compiled: bool, most_rows: int, **options: Any) -> Generator["LLM"]:
    from vllm import LLM

    llm = LLM(
        str(model),
        skip_tokenizer_init=True,
        load_format="dummy",
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


def step_seconds(llm: "LLM", batch: int, steps: int, vocabulary: int, seed: int) -> list[float]:
    """Returns the seconds of each decode step of a batch of random prompts, all in decode from the first on."""
    from vllm import RequestOutput, SamplingParams

    random = torch.Generator().manual_seed(seed)
    parameters = SamplingParams(temperature=1, max_tokens=steps + 2, ignore_eos=True, detokenize=False)
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
        generated = [answer for answer in answers if isinstance(answer, RequestOutput)]
        prefilled |= {answer.request_id for answer in generated if answer.outputs[0].token_ids}
    return seconds[1 : steps + 1]


def put_routers_back(worker, stock: bool) -> None:
    """In the worker: has the routers do what vLLM meant them to, or re-route again."""
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    for module in worker.model_runner.get_model().modules():
        router = getattr(module, "router", None)
        if not isinstance(router, BaseRouter):
            continue
        if stock and "_compute_routing" in vars(router):
            router.sere_rerouted = vars(router).pop("_compute_routing")
        elif not stock and "_compute_routing" not in vars(router):
            router._compute_routing = router.sere_rerouted


def time_rerouting(worker) -> None:
    """In a worker on a CPU, eager: keeps what each re-routing takes, for `rerouting_seconds`."""
    from sere_dist.vllm_plugin import cpu_backend

    reroute, seconds = cpu_backend.CpuBackend.reroute, []

    def timed(*arguments):
        started = time.perf_counter()
        routed = reroute(*arguments)
        seconds.append(time.perf_counter() - started)
        return routed

    cpu_backend.CpuBackend.reroute = timed  # ty: ignore[invalid-assignment]  # the same function, timed
    worker.rerouting_seconds = seconds


def rerouting_seconds(worker) -> float:
    """In the worker: returns the seconds since the last call, as a mean over its decode steps."""
    seconds = worker.rerouting_seconds
    total, steps = sum(seconds), len(seconds) / len(worker.worker.sere_layers)
    seconds.clear()
    return total / steps if steps else 0.0


def active_experts(llm: "LLM") -> tuple[float, float]:
    """Returns active experts a layer and step, before and after re-routing, since the last call."""
    worker = llm.collective_rpc("sere_counters", kwargs={"reset": True})[0]
    layers = worker["layers"].values()
    steps = sum(layer["steps"] for layer in layers)
    return tuple(sum(layer[f"active_experts_{when}"] for layer in layers) / steps for when in ("before", "after"))


def measure(
    model: Path, settings: list[Setting], batches: list[int], steps: int, rounds: int, compiled: bool, artifact: Path
) -> list[dict[str, Any]]:
    from transformers import AutoConfig

    from sere_dist.moe import MoeShape

    config = AutoConfig.from_pretrained(model)
    experts, top_k = MoeShape.from_config(config).num_experts, settings[0].top_k
    seconds: dict[tuple[int, Setting], list[float]] = {(b, s): [] for b in batches for s in settings}
    active: dict[tuple[int, Setting], list[tuple[float, float]]] = {each: [] for each in seconds}
    rerouting_ms: dict[tuple[int, Setting], list[float]] = {each: [] for each in seconds}
    is_timed = not compiled and not torch.cuda.is_available()  # elsewhere re-routing is part of a graph
    sere = {"artifact": str(artifact), "select_top_k": top_k, "min_rows": 0}
    fewer = [setting.top_k for setting in settings if not setting.is_models_top_k]
    options: dict[str, Any] = {}
    if torch.cuda.is_available():
        options["gpu_memory_utilization"] = 0.94 / (1 + compiled + len(fewer))
    start = partial(engine, model, compiled, max(batches), **options)
    with ExitStack() as engines:
        rerouting = engines.enter_context(start(additional_config={"sere": sere}))
        of_top_k = {n: engines.enter_context(start(hf_overrides={"num_experts_per_tok": n})) for n in fewer}
        of_top_k[top_k] = engines.enter_context(start()) if compiled else rerouting
        # An engine that is to re-route stops if its first decode step is not re-routed.
        step_seconds(rerouting, 1, 1, config.vocab_size, seed=1)
        if is_timed:
            rerouting.collective_rpc(time_rerouting)
        turns = [(b, s, turn) for turn in range(rounds + 1) for b in batches for s in settings]
        for batch, setting, turn in track(turns, "decode", console=progress()):
            llm = of_top_k[setting.top_k] if setting.select_top_k is None else rerouting
            if llm is rerouting and not compiled:
                llm.collective_rpc(put_routers_back, args=(setting.select_top_k is None,))
            if setting.select_top_k is not None:
                llm.collective_rpc("sere_settings", kwargs={"select_top_k": setting.select_top_k})
                llm.collective_rpc("sere_counters", kwargs={"reset": True})
            if is_timed and setting.select_top_k is not None:
                llm.collective_rpc(rerouting_seconds)
            took = step_seconds(llm, batch, steps if turn else 3, config.vocab_size, seed=turn * 1000 + batch)
            if turn:  # the first warms up
                seconds[batch, setting].append(statistics.median(took))
                if setting.select_top_k is not None:
                    active[batch, setting].append(active_experts(llm))
                    if is_timed:
                        rerouting_ms[batch, setting].append(1e3 * llm.collective_rpc(rerouting_seconds)[0])
    rows = []
    for (batch, setting), values in seconds.items():
        row: dict[str, Any] = {
            "batch": batch,
            "setting": str(setting),
            "ms_per_token": spread([1e3 * value for value in values]),
        }
        ratios = [a / b for a, b in zip(seconds[batch, settings[0]], values, strict=True)]
        row["times_faster"] = spread(ratios)
        if setting.select_top_k is not None:
            before, after = (statistics.mean(each) for each in zip(*active[batch, setting], strict=True))
            uniform = experts * (1 - (1 - top_k / experts) ** batch)
            row |= {"active_before": rounded(before), "active_after": rounded(after), "uniform": rounded(uniform)}
            if is_timed:
                row["rerouting_ms"] = spread(rerouting_ms[batch, setting])
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
    keep_experts: Annotated[str, typer.Option("--keep", help="Values of S to time.")] = "1,2,4,8",
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
        engines = 1 + compiled + len(numbers(top_k))
        print(f"would start {engines} engines of {preset}; S = {keep_experts}, batches {batches}, {rounds} rounds")
        print(json.dumps({"dry_run": {"engines": engines, "keep": numbers(keep_experts), "batches": numbers(batches)}}))
        return
    # They take seconds to import, which a dry run saves.
    from transformers import AutoConfig

    from benchmarks.engines import allow_this_vllm, write_random_artifact
    from sere_dist.moe import MoeShape

    is_tested = allow_this_vllm()
    models_top_k = MoeShape.from_config(AutoConfig.from_pretrained(model)).num_experts_per_token
    settings = [Setting(None, models_top_k)]
    settings += [Setting(s, models_top_k) for s in sorted({min(s, models_top_k) for s in numbers(keep_experts)})]
    settings += [Setting(None, n, is_models_top_k=False) for n in numbers(top_k)]
    with tempfile.TemporaryDirectory() as folder:
        artifact = write_random_artifact(model, Path(folder))
        rows = measure(model, settings, numbers(batches), steps, rounds, compiled, artifact)
    result = {
        "command": f"python -m benchmarks.decode --preset {preset} --batches {batches} --keep {keep_experts}"
        + f" --steps {steps} --rounds {rounds}"
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

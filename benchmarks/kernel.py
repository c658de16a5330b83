"""What re-routing costs inside a CUDA graph: beside nothing, beside the method in three launches, beside a router.

    python -m benchmarks.kernel                                       # checks, then times, then the sweep
    python -m benchmarks.kernel --dry-run                             # no GPU: compiles, lists what it would do
    python -m benchmarks.kernel --part time --experts 128 --rows 1,64
    compute-sanitizer --tool racecheck --error-exitcode 9 --kernel-name kns=reroute \\
        python -m benchmarks.kernel --part sanitize                   # memcheck, synccheck, initcheck

Needs torch, cuda.core, packaging, typer, rich, psutil and an NVIDIA GPU of compute capability 8.0 or more; no vLLM.
`python -m benchmarks.gpu` runs each part under a time limit of its own. The parts:

- first: versions, registers and local memory of the kernels, one step against torch
- check: random steps of all kinds against the torch functions, replays of one captured graph while the settings change,
  two streams at once
- many_blocks: random steps in two launches over many blocks
- sanitize: few random steps, for compute-sanitizer
- profile: one launch at each of a few sizes, for ncu
- time: every kind in a CUDA graph, see benchmarks/kernel_times.py
- sweep: experts per warp, a start before the last kernel ends, and where two launches overtake one

Prints tables, and one JSON line last. Writes `benchmarks/results/kernel.json` after each part, and in time and sweep
after each shape; what runs under another tool (sanitize, profile) is only printed.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.progress import track
from rich.table import Table

from benchmarks import kernel_checks, kernel_times
from benchmarks.common import RESULTS, numbers
from sere_dist.console import progress, tables
from sere_dist.kernels.reroute import ENTRIES, Build, compile_kernels, nvrtc_version
from sere_dist.provenance import keep, machine, versions

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
SHAPES = ((128, 8), (64, 8), (256, 8), (60, 4))  # experts, experts a token
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SWEPT_ROWS = (1, 16, 64, 128, 256, 512, 1024)
Part = Literal["all", "first", "check", "many_blocks", "sanitize", "profile", "time", "sweep"]
OF_ALL = ("first", "check", "many_blocks", "time", "sweep")
UNDER_A_TOOL = ("sanitize", "profile")


def shapes_of(part: str, experts: list[int], rows: list[int]) -> list[tuple[int, int, int]]:
    """Returns experts, experts a token and rows of what a part times, the most wanted first."""
    chosen = [(number, top_k) for number, top_k in SHAPES if number in experts or not experts]
    return [(*shape, count) for shape in chosen for count in rows or (SWEPT_ROWS if part == "sweep" else ROWS)]


def measure(
    time: Callable[[int, int, int, int], dict[str, Any]], shapes: list[tuple[int, int, int]], rounds: int
) -> Iterator[dict[str, Any]]:
    """Yields what is measured so far after each shape."""
    found: dict[str, Any] = {
        "rounds": rounds,
        "calls_a_graph": kernel_times.LAYERS * kernel_times.CALLS_A_LAYER,
        "select_top_k": kernel_times.SELECT_TOP_K,
        "baselines": [],
        "microseconds": [],
    }
    for experts, top_k, rows in track(shapes, "shapes", console=progress()):
        if all(known["experts"] != experts for known in found["baselines"]):
            found["baselines"] += kernel_times.baseline_resources(experts)
        found["microseconds"].append(time(experts, top_k, rows, rounds))
        yield found


def run(part: str, steps: int, rounds: int, shapes: list[tuple[int, int, int]]) -> Iterator[dict[str, Any]]:
    """Yields what a part has found so far: after each shape, or once."""
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "first": kernel_checks.check_first,
        "check": lambda: kernel_checks.check_steps(steps),
        "many_blocks": kernel_checks.check_many_blocks,
        "sanitize": kernel_checks.check_few_steps,
        "profile": kernel_checks.launch_each_size,
    }
    if part in checks:
        yield checks[part]()
    else:
        yield from measure({"time": kernel_times.time_shape, "sweep": kernel_times.sweep_shape}[part], shapes, rounds)


def time_table(measured: dict[str, Any]) -> Table:
    rows = measured["microseconds"]
    table = Table(
        *rows[0],
        title=f"Microseconds a call inside a CUDA graph of {measured['calls_a_graph']} calls: medians",
        caption=f"re-routing: S = {measured['select_top_k']}; off: S = K; united: two launches, as if ranks shared a "
        f"primary set; traffic price: {kernel_times.DOMAINS} domains and ranks; cold: the L2 cache was overwritten.",
    )
    for row in rows:
        table.add_row(*(f"{cell['median']:.3g}" if isinstance(cell, dict) else str(cell) for cell in row.values()))
    return table


def dry_run(part: str, shapes: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Compiles everything and says what would be measured."""
    sizes = {}
    for arch in ARCHITECTURES:
        for experts in {experts for experts, _, _ in shapes}:
            kernel_times.compile_baselines(arch, experts)
        sizes[arch] = len(compile_kernels(arch, Build(128, 8)).code)
        print(f"{arch}: {', '.join(ENTRIES)} compiled, {sizes[arch]:,} bytes; {', '.join(kernel_times.BASELINES)} too")
    kinds = list(kernel_times.KINDS)
    print(f"would run {', '.join(OF_ALL) if part == 'all' else part}; time: {'; '.join(kinds)}")
    chosen, rows = dict.fromkeys(shape[:2] for shape in shapes), dict.fromkeys(shape[2] for shape in shapes)
    of_shapes = ", ".join(f"{experts} experts top-{top_k}" for experts, top_k in chosen)
    print(f"for {of_shapes}, rows {', '.join(map(str, rows))}")
    return {"cubin_bytes": sizes, "shapes": len(shapes), "kinds": kinds}


def main(
    part: Annotated[Part, typer.Option(help="Part of the benchmark to run.")] = "all",
    steps: Annotated[int, typer.Option(help="Number of random steps to check.")] = 2000,
    rounds: Annotated[int, typer.Option(help="Number of timed replays of each graph.")] = 20,
    experts: Annotated[str, typer.Option(help="Numbers of experts to time, of 128, 64, 256 and 60.")] = "",
    rows: Annotated[str, typer.Option(help="Numbers of rows to time.")] = "",
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="Compile and list only, which needs no GPU.")] = False,
    results: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "kernel.json",
) -> None:
    if unknown := set(numbers(experts)) - dict(SHAPES).keys():
        raise typer.BadParameter(f"no shape has {unknown} experts: {', '.join(str(known) for known, _ in SHAPES)} do")
    if is_dry_run:
        print(json.dumps({"dry_run": dry_run(part, shapes_of(part, numbers(experts), numbers(rows)))}))
        return
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no NVIDIA GPU here: --dry-run shows what would be measured")
    about = {"machine": machine(), "versions": versions("sere-dist", "torch", "cuda-core", "cuda-bindings")}
    about["versions"]["nvrtc"] = "{}.{}".format(*nvrtc_version())
    measured = {}
    for name in OF_ALL if part == "all" else [part]:
        command = f"python -m benchmarks.kernel --part {name} --steps {steps} --rounds {rounds}"
        command += f" --experts {experts}" * bool(experts) + f" --rows {rows}" * bool(rows)
        for found in run(name, steps, rounds, shapes_of(name, numbers(experts), numbers(rows))):
            measured[name] = {"command": command, **about, **found}
            if name not in UNDER_A_TOOL:
                keep(results, {name: measured[name]})
        if "microseconds" in measured[name]:
            tables().print(time_table(measured[name]))
    print(json.dumps(measured))


if __name__ == "__main__":
    typer.run(main)

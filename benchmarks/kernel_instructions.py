"""How many instructions a warp of the re-routing kernel executes, read from the machine code: it needs no GPU.

    python -m benchmarks.kernel_instructions                       # the working tree
    python -m benchmarks.kernel_instructions --revision v0.1.0     # the same of an older commit, beside it

One block re-routes a step of few rows, and all its warps share one multiprocessor. So the time follows the instructions
that they execute. NVRTC compiles the kernel for sm_90, nvdisasm (from the package nvidia-cuda-nvdisasm) reads it, and
this script follows its branches:

- shortest: the shortest way through all barriers. A warp that has neither a token nor an expert takes it, and every
  other warp too, but for what it has to do.
- longest: the longest way, each loop once. No warp executes more, unless a loop runs again.

Branches that only serve warps whose lanes have come apart (BRA.DIV) are left out. The barrier that a price needs counts
wherever the layer's policy can have one. A source older than these constants is compiled once, for all kinds of layers.

Prints a table, and writes `benchmarks/results/kernel_instructions.json`.
"""

import subprocess
from pathlib import Path
from typing import Annotated, Any

import typer
from cuda.core import Program, ProgramOptions
from rich.table import Table

from benchmarks.common import RESULTS, ROOT
from benchmarks.cubins import instructions, registers
from benchmarks.kernel_times import BUILDS
from sere_dist.console import tables
from sere_dist.kernels.reroute import ENTRIES, SOURCE, Build, compile_options, nvrtc_version
from sere_dist.provenance import keep, versions

ARCH = "sm_90"
INSTRUCTION_BYTES = 16
ANY = BUILDS["paper's policy"]  # the constants of a source that has none do not matter
Instruction = dict[str, Any]


def successors(code: list[Instruction], at: int) -> list[int]:
    """Returns where a warp may go on after an instruction; nowhere after the last one."""
    instruction = code[at]
    name = instruction["opcode"]
    operands = instruction.get("operands", "").split(",")
    is_conditional = "predicate" in instruction or len(operands) > 1  # a uniform condition is an operand
    if name == "EXIT":
        return [at + 1] if "predicate" in instruction else []
    if name == "BRA" or name == "BRA.U":
        target = int(operands[-1], 16) // INSTRUCTION_BYTES
        return [target, at + 1] if is_conditional else [target]
    return [at + 1]


def ways(code: list[Instruction]) -> tuple[int, int]:
    """Returns the lengths of the shortest way through all barriers, and of the longest way, each loop once."""
    shortest: dict[int, dict[int, int]] = {0: {0: 0}}  # of each instruction: by the barriers before it
    longest = {0: 0}
    ends: list[tuple[int, int, int]] = []
    for at in range(len(code)):
        if at not in longest:
            continue  # only lanes that have come apart get here
        is_barrier = code[at]["opcode"].startswith("BAR")
        passed = {barriers + is_barrier: length + 1 for barriers, length in shortest[at].items()}
        if code[at]["opcode"] == "EXIT":
            barriers = max(passed)
            ends.append((barriers, passed[barriers], longest[at] + 1))
        for to in successors(code, at):
            if to <= at:
                continue  # a way back would run a loop again
            longest[to] = max(longest.get(to, 0), longest[at] + 1)
            known = shortest.setdefault(to, {})
            for barriers, length in passed.items():
                known[barriers] = min(known.get(barriers, length), length)
    most = max(barriers for barriers, _, _ in ends)
    return min(short for barriers, short, _ in ends if barriers == most), max(long for _, _, long in ends)


def count(source: str, options: ProgramOptions) -> dict[str, dict[str, int]]:
    """Returns the numbers of each kernel of `source`."""
    cubin = Program(source, "c++", options).compile("cubin").code
    taken, found = registers(cubin), {}
    code = instructions(cubin)
    for name in ENTRIES:
        shortest, longest = ways(code[name])
        found[name] = {"static": len(code[name]), "registers": taken[name], "shortest": shortest, "longest": longest}
    return found


def source_of(revision: str) -> str:
    if revision == "this":
        return SOURCE.read_text()
    path = f"{revision}:{SOURCE.relative_to(ROOT)}"
    return subprocess.run(["git", "show", path], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def main(
    revision: Annotated[str, typer.Option(help="Commit whose kernel to count beside the working tree's.")] = "",
    results: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "kernel_instructions.json",
) -> None:
    kept = {"arch": ARCH, "versions": versions("cuda-core", "nvidia-cuda-nvdisasm")}
    kept["versions"]["nvrtc"] = "{}.{}".format(*nvrtc_version())
    kept["counts"] = []
    table = Table("kernel", "layer", "source", "instructions", "registers", "shortest way", "longest way")
    sources: list[tuple[str, str, Build]] = [("this", name, build) for name, build in BUILDS.items()]
    if revision:
        has_constants = "FEATURES" in source_of(revision)
        sources += [(revision, name, BUILDS[name]) for name in BUILDS] if has_constants else [(revision, "all", ANY)]
    for shown, layer, build in sources:
        for kernel, numbers in count(source_of(shown), compile_options(ARCH, build)).items():
            kept["counts"].append({"kernel": kernel, "layer": layer, "source": shown, **numbers})
            table.add_row(kernel, layer, shown, *(f"{number:,}" for number in numbers.values()))
    tables().print(table)
    keep(results, kept)


if __name__ == "__main__":
    typer.run(main)

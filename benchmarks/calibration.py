"""What a calibration costs: similarity against a loop over pairs, one worker against two, memory against tokens.

    python -m benchmarks.calibration                       # all parts: about half an hour on 2 cores
    python -m benchmarks.calibration --part similarity     # or scaling, or memory
    python -m benchmarks.calibration --quick               # a minute or two; its numbers mean nothing

similarity: `expert_similarity` and a plain loop over pairs of experts take turns on the same random outputs, on a GPU
if there is one; every result of the loop is compared with ours. scaling: the calibration command, on a Ray cluster of
one single-core worker and of two in turns. memory: the peak of a scoring task with 1 and 4 times the tokens, each in a
process of its own. Prints tables and one JSON line last; writes `benchmarks/results/calibration.json`, where the parts
that were not run stay as they are. An otherwise idle machine is what it needs.
"""

import gc
import hashlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import track
from rich.table import Table

from benchmarks.common import ROOT, ranged, spread
from examples.tiny_moe.data import CALIBRATION, MODEL
from sere_dist.console import progress, tables
from sere_dist.method.cka import Kernel
from sere_dist.method.similarity import MethodName, expert_projection, expert_similarity
from sere_dist.provenance import keep, machine, physical_cores, rounded, versions
from sere_dist.testing.local_cluster import LocalCluster

# What else a part needs is imported there: `similarity` also runs on a GPU machine that has torch and little else.

Part = Literal["all", "similarity", "scaling", "memory"]

PACKAGES = ("sere-dist", "torch", "ray", "transformers", "numpy")
CASES: dict[str, tuple[MethodName, Kernel]] = {  # by the names in the tables
    "frobenius": ("frobenius", "linear"),
    "cosine": ("cosine", "linear"),
    "cka-linear": ("cka", "linear"),
    "cka-rbf": ("cka", "rbf"),
    "cka-polynomial": ("cka", "polynomial"),
    "projection": ("projection", "linear"),
}
TOLERANCE = 1e-4  # between the loop, in float32, and ours
OURS_A_TURN = 3  # timings of ours for each of the loop
SAMPLED_PAIRS = 60
WORKERS = (1, 2)
SAMPLE_SECONDS = 0.002  # between two looks at the memory


@dataclass(frozen=True)
class Moe:
    """The routed experts of a model with random weights."""

    layers: int
    experts: int
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int = 3
    experts: tuple[int, ...] = (32, 64, 128)
    tokens: int = 1024
    hidden: int = 512
    all_pairs_seconds: float = 10  # a loop that takes longer is timed on a sample of pairs,
    once_seconds: float = 30  # and once on all of them, up to here

    scaling_rounds: int = 2
    scaling_model: Moe = Moe(layers=8, experts=64, hidden=512, intermediate=256)
    scaling_texts: int = 192
    scaling_length: int = 128

    # Few weights, so that what a peak holds is a block's; no peak so short that all looks miss it.
    memory_rounds: int = 3
    memory_model: Moe = Moe(layers=1, experts=64, hidden=512, intermediate=64)
    memory_block: int = 1024
    memory_tokens: int = 8192
    rbf_block: int = 128
    rbf_tokens: int = 512  # work grows with the square of the tokens


QUICK = Sizes(
    rounds=1,
    experts=(8, 16),
    tokens=128,
    hidden=64,
    all_pairs_seconds=0.02,
    scaling_rounds=1,
    scaling_model=Moe(layers=2, experts=8, hidden=64, intermediate=32),
    scaling_texts=8,
    scaling_length=32,
    memory_rounds=1,
    memory_model=Moe(layers=1, experts=16, hidden=256, intermediate=32),
    memory_block=256,
    memory_tokens=1024,
    rbf_tokens=256,
)


# similarity


def pairwise(outputs_ENH: torch.Tensor, method: str, pairs: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Returns the similarity of each pair of experts [pairs], computed pair by pair in the outputs' precision."""
    of_pair = {
        "frobenius": frobenius_distance,
        "cosine": cosine,
        "cka-linear": linear_cka,
        "cka-rbf": lambda x_NH, y_NH: kernel_cka(rbf_gram, x_NH, y_NH),
        "cka-polynomial": lambda x_NH, y_NH: kernel_cka(polynomial_gram, x_NH, y_NH),
    }[method]
    values = torch.stack([of_pair(outputs_ENH[i], outputs_ENH[j]) for i, j in pairs])
    return 1 - values / values.max() if method == "frobenius" else values  # its maximum is that of all pairs


def frobenius_distance(x_NH: torch.Tensor, y_NH: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(x_NH - y_NH)


def cosine(x_NH: torch.Tensor, y_NH: torch.Tensor) -> torch.Tensor:
    return (F.cosine_similarity(x_NH, y_NH, dim=1).mean() + 1) / 2


def linear_cka(x_NH: torch.Tensor, y_NH: torch.Tensor) -> torch.Tensor:
    x_NH, y_NH = x_NH - x_NH.mean(dim=0), y_NH - y_NH.mean(dim=0)
    cross, own_x, own_y = ((a.T @ b).square().sum() for a, b in ((y_NH, x_NH), (x_NH, x_NH), (y_NH, y_NH)))
    return cross / (own_x * own_y).sqrt()


def kernel_cka(gram: Callable, x_NH: torch.Tensor, y_NH: torch.Tensor) -> torch.Tensor:
    k_NN, l_NN = (centred(gram(outputs_NH)) for outputs_NH in (x_NH, y_NH))
    return (k_NN * l_NN).sum() / (k_NN.square().sum() * l_NN.square().sum()).sqrt()


def rbf_gram(x_NH: torch.Tensor) -> torch.Tensor:
    size_N = x_NH.square().sum(dim=1)
    squared_NN = (size_N[:, None] + size_N - 2 * x_NH @ x_NH.T).clamp(min=0)
    return torch.exp(-squared_NN / (2 * squared_NN.var()))


def polynomial_gram(x_NH: torch.Tensor) -> torch.Tensor:
    return (x_NH @ x_NH.T + 1) ** 2


def centred(gram_NN: torch.Tensor) -> torch.Tensor:
    gram_NN = (gram_NN + gram_NN.T) / 2
    return gram_NN - gram_NN.mean(dim=0) - gram_NN.mean(dim=1, keepdim=True) + gram_NN.mean()


def random_outputs(experts: int, tokens: int, hidden: int, device: str) -> torch.Tensor:
    """Returns [E, N, H], near 8 directions that experts share in part, and stretch differently: not all alike."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    share_E11 = torch.linspace(0.3, 1.5, experts)[:, None, None]
    directions_EDH = (normal(8, hidden) + share_E11 * normal(experts, 8, hidden)) * normal(experts, 8, 1).exp()
    outputs_ENH = normal(tokens, 8) @ directions_EDH.div_(hidden**0.5)
    return outputs_ENH.add_(normal(experts, tokens, hidden), alpha=0.1 / hidden**0.5).to(device)


def random_routing(experts: int, tokens: int, top_k: int = 8) -> torch.Tensor:
    """Returns routing weights [N, E] of `top_k` experts a token."""
    scores_NE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    top = scores_NE.softmax(dim=1).topk(min(top_k, experts), dim=1)
    return torch.zeros(tokens, experts).scatter_(1, top.indices, top.values / top.values.sum(dim=1, keepdim=True))


def timed(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Returns what a call returns, and its seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def measure_similarity(method: str, experts: int, sizes: Sizes, device: str) -> dict[str, Any]:
    """Returns the times of the loop over pairs and of ours, and by how much their results differ.

    Raises:
        RuntimeError: by more than TOLERANCE.
    """
    outputs_ENH = random_outputs(experts, sizes.tokens, sizes.hidden, device)
    row = {"method": method, "experts": experts, "tokens": sizes.tokens, "hidden": sizes.hidden}
    name, kernel = CASES[method]

    if method == "projection":
        routing_NE = random_routing(experts, sizes.tokens).to(device)
        seconds = [timed(lambda: expert_projection(outputs_ENH, routing_NE)[0])[1] for _ in range(3 * sizes.rounds + 1)]
        return row | {"ours_s": spread(seconds[1:])}  # the first warms up

    def ours() -> torch.Tensor:
        return expert_similarity(outputs_ENH, name, kernel)

    similarity_EE = ours().cpu()  # warms up, too
    largest_difference = 0.0

    def loop(pairs: list[tuple[int, int]]) -> float:
        nonlocal largest_difference
        values, seconds = timed(lambda: pairwise(outputs_ENH, method, pairs))
        difference = float((values.cpu() - similarity_EE[tuple(zip(*pairs, strict=True))]).abs().max())
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{method}, {experts} experts: the loop's similarity is off by {difference:.2g} from ours"
            )
        largest_difference = max(largest_difference, difference)
        return seconds

    every = list(combinations_with_replacement(range(experts), 2))
    sample = random.Random(0).sample(every, min(SAMPLED_PAIRS, len(every)))
    pairs, once = every, {}
    if name == "cka":
        loop(sample)
        all_pairs = loop(sample) * len(every) / len(sample)  # expected
        if all_pairs > sizes.all_pairs_seconds and len(sample) < len(every):
            pairs = sample
            once = {"all_pairs_once_s": rounded(loop(every))} if all_pairs <= sizes.once_seconds else {}
    else:
        loop(every)

    loop_seconds, ours_seconds = [], []
    for _ in range(sizes.rounds):
        loop_seconds.append(loop(pairs) * len(every) / len(pairs))
        ours_seconds += [timed(ours)[1] for _ in range(OURS_A_TURN)]
    return row | {
        "pairs": len(every),
        "pairs_timed": len(pairs),
        "pairwise_s": spread(loop_seconds),
        **once,
        "ours_s": spread(ours_seconds),
        "ratio": rounded(statistics.median(loop_seconds) / statistics.median(ours_seconds)),
        "largest_difference": rounded(largest_difference, 2),
    }


def measure_similarities(sizes: Sizes, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = [(method, experts) for method in CASES for experts in sizes.experts]
    rows = [measure_similarity(*each, sizes, device) for each in track(settings, "similarity", console=progress())]
    return {"device": device, "threads": threads, "rounds": sizes.rounds, "rows": rows}


def similarity_table(result: dict[str, Any]) -> Table:
    rows = result["rows"]
    where = f"{result['threads']} threads" if result["device"] == "cpu" else "GPU"
    difference = max(row.get("largest_difference", 0) for row in rows)
    names = ("method", "experts", "pairs timed", "loop over pairs", "all pairs, once", "ours", "ratio")
    table = Table(
        *names,
        title=f"{rows[0]['tokens']} tokens, hidden size {rows[0]['hidden']}, {where}: median seconds (min-max)",
        caption=f"Largest difference {difference:.1g}. The loop's seconds are scaled up from the pairs timed.",
    )
    for row in rows:
        loop, pairs = (ranged(row["pairwise_s"]), str(row["pairs"])) if "pairs" in row else ("", "")
        if row.get("pairs_timed") != row.get("pairs"):
            pairs = f"{row['pairs_timed']} of {pairs}"
        once, ratio = (f"{row[key]:.3g}" if key in row else "" for key in ("all_pairs_once_s", "ratio"))
        table.add_row(row["method"], str(row["experts"]), pairs, loop, once, ranged(row["ours_s"]), ratio)
    return table


# scaling


def save_random_model(moe: Moe, folder: Path) -> None:
    """Saves a checkpoint with random weights, in bfloat16, and the example model's tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from sere_dist.calibration.texts import load_tokenizer

    disable_progress_bar()
    tokenizer = load_tokenizer(MODEL)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=moe.hidden,
        intermediate_size=moe.hidden,
        moe_intermediate_size=moe.intermediate,
        num_hidden_layers=moe.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=moe.hidden // 8,  # ty: ignore[unknown-argument]  # the class does not declare it, but takes it
        num_experts=moe.experts,
        num_experts_per_tok=min(8, moe.experts // 2),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


THREADS_OF_A_TASK = """
import ray, torch
ray.init(log_to_driver=False, logging_level="error")
print(ray.get(ray.remote(num_cpus=1)(lambda: torch.get_num_threads()).remote()))
"""


def run_calibration(workers: int, sizes: Sizes, model: Path, output: Path) -> dict[str, Any]:
    """Runs the command on a cluster of its own; returns its times and what it wrote.

    Raises:
        RuntimeError: the command failed.
    """
    command = [sys.executable, "-m", "calibration_jobs.calibrate", "--model", str(model), "--output", str(output)]
    command += ["--dataset", str(CALIBRATION), "--device", "cpu", "--cpus-per-task", "1"]
    command += ["--num-samples", str(sizes.scaling_texts), "--max-length", str(sizes.scaling_length)]
    with LocalCluster(num_cpus=workers) as cluster:
        environment = {**cluster.environment, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        started, reached, lines = time.perf_counter(), {}, []
        with subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None  # a pipe
            for line in process.stdout:
                now = time.perf_counter()
                lines.append(line)
                if line.startswith("Plan for"):
                    reached["plan"] = now
                elif re.match(r"layer \d+ scored", line):
                    reached["last layer"] = now
        ended = time.perf_counter()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(lines)}")
        threads = subprocess.run(
            [sys.executable, "-c", THREADS_OF_A_TASK], env=environment, check=True, capture_output=True, text=True
        ).stdout
    return {
        "workers": workers,
        "command_s": rounded(ended - started),
        "layers_s": rounded(reached["last layer"] - reached["plan"]),
        "threads_of_a_task": int(threads),
        "similarity_sha256": hashlib.sha256((output / "similarity.safetensors").read_bytes()).hexdigest(),
    }


def measure_scaling(sizes: Sizes) -> dict[str, Any]:
    """Returns the times of the calibration command by number of workers, measured in turns.

    Raises:
        RuntimeError: two runs wrote different similarities.
    """
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray gives a task as many threads as CPUs unless this is set
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_random_model(sizes.scaling_model, model)
        turns = list(enumerate(WORKERS * sizes.scaling_rounds))
        runs = [
            run_calibration(workers, sizes, model, Path(folder) / f"artifact-{turn}")
            for turn, workers in track(turns, "scaling", console=progress())
        ]
    if len({run["similarity_sha256"] for run in runs}) > 1:
        raise RuntimeError(f"the runs wrote different similarities: {runs}")
    rows: list[dict[str, Any]] = []
    for workers in WORKERS:
        times = {kind: [run[kind] for run in runs if run["workers"] == workers] for kind in ("command_s", "layers_s")}
        rows.append({"workers": workers} | {kind: spread(seconds) for kind, seconds in times.items()})
    one, two = rows
    return {
        "model": asdict(sizes.scaling_model),
        "method": "frobenius",
        "tokens": sizes.scaling_texts * sizes.scaling_length,
        "rows": rows,
        "command_ratio": rounded(one["command_s"]["median"] / two["command_s"]["median"]),
        "layers_ratio": rounded(one["layers_s"]["median"] / two["layers_s"]["median"]),
        "runs": runs,
    }


def scaling_table(result: dict[str, Any]) -> Table:
    model, threads = result["model"], "/".join({str(run["threads_of_a_task"]) for run in result["runs"]})
    table = Table(
        *("workers", "from plan to last layer", "ratio", "whole command, cold workers", "ratio"),
        title=f"{model['layers']} layers, {model['experts']} experts, {result['tokens']:,} tokens: "
        "median seconds (min-max)",
        caption=f"Threads a task: {threads}. The similarities written are the same, bit for bit.",
    )
    for row, name in zip(result["rows"], ("", "_ratio"), strict=True):
        ratios = (f"{result[kind + name]:.3g}" if name else "" for kind in ("layers", "command"))
        seconds = (ranged(row[kind]) for kind in ("layers_s", "command_s"))
        cells = [cell for pair in zip(seconds, ratios, strict=True) for cell in pair]
        table.add_row(str(row["workers"]), *cells)
    return table


# memory


def anonymous_bytes() -> int:
    """Returns this process's resident memory without mapped files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None  # Linux has it
    return 1024 * int(found[1])


def peak_of(model: Path, inputs: Path, tokens: int, method: str, block_tokens: int) -> dict[str, float]:
    """Returns by how much a scoring task raises the memory of this process, which must be a fresh one."""
    from transformers.utils.logging import disable_progress_bar

    from sere_dist.calibration.checkpoint import Checkpoint
    from sere_dist.calibration.layers import ExpertInputs, score_layer

    disable_progress_bar()
    torch.set_num_threads(1)  # as a task has by default; another core is free to look
    checkpoint = Checkpoint(str(model))
    mapped = (np.load(inputs / f"{name}.npy", mmap_mode="r")[:tokens] for name in ("hidden", "index", "weights"))
    layer_inputs = [ExpertInputs(*mapped)]
    score_layer(checkpoint, 0, [], "random")  # imports the model's code
    gc.collect()

    sys.setswitchinterval(SAMPLE_SECONDS / 4)  # or Python code keeps the thread below from looking
    samples, looked_at, done = [before := anonymous_bytes()], [time.perf_counter()], threading.Event()

    def look() -> None:
        while not done.wait(SAMPLE_SECONDS):
            samples.append(anonymous_bytes())
            looked_at.append(time.perf_counter())

    thread = threading.Thread(target=look)
    thread.start()
    name, kernel = CASES[method]
    try:
        result = score_layer(checkpoint, 0, layer_inputs, name, kernel, block_tokens=block_tokens)
    finally:
        done.set()
        thread.join()
    assert not result.halved
    return {
        "peak_mb": (max(samples) - before) / 1e6,
        "seconds": result.statistics.seconds,
        "longest_gap_ms": 1e3 * float(max(np.diff(looked_at))),
    }


def save_random_inputs(moe: Moe, tokens: int, folder: Path) -> None:
    """Saves what reaches the experts: random hidden states, each routed to 8 experts at random."""
    generator = np.random.default_rng(0)
    top_k = min(8, moe.experts)
    index_NK = generator.random((tokens, moe.experts)).argpartition(top_k, axis=1)[:, :top_k]
    np.save(folder / "hidden.npy", generator.standard_normal((tokens, moe.hidden), dtype=np.float32))
    np.save(folder / "index.npy", index_NK.astype(np.int32))
    np.save(folder / "weights.npy", np.full((tokens, top_k), 1 / top_k, dtype=np.float32))


def measure_memory(sizes: Sizes) -> dict[str, Any]:
    moe, rows = sizes.memory_model, []
    weights_mb = 4 * 3 * moe.experts * moe.hidden * moe.intermediate / 1e6
    settings = [
        ("frobenius", sizes.memory_tokens, sizes.memory_block),
        ("projection", sizes.memory_tokens, sizes.memory_block),
        ("cka-rbf", sizes.rbf_tokens, sizes.rbf_block),
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_random_model(moe, model)
        save_random_inputs(moe, 4 * max(tokens for _, tokens, _ in settings), Path(folder))
        for method, tokens, block in track(settings, "memory", console=progress()):
            runs: dict[int, list[dict]] = {1: [], 4: []}
            for times in list(runs) * sizes.memory_rounds:
                arguments = (model, Path(folder), times * tokens, method, block)
                # A new process each time: memory that one run freed but kept would hide the next one's.
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                    runs[times].append(fresh.submit(peak_of, *arguments).result())
            rows.append({"method": method, "block_tokens": block, "blocks": -(-tokens // block)})
            for times, measured in runs.items():  # of peaks the highest counts: a look can only come too late
                rows[-1][f"{times}x"] = {
                    "tokens": times * tokens,
                    "peak_mb": spread([run["peak_mb"] for run in measured]),
                    "all_outputs_mb": rounded(weights_mb + 4 * moe.experts * times * tokens * moe.hidden / 1e6),
                    "seconds": spread([run["seconds"] for run in measured]),
                    "longest_gap_ms": rounded(max(run["longest_gap_ms"] for run in measured)),
                }
            rows[-1]["ratio"] = rounded(rows[-1]["4x"]["peak_mb"]["max"] / rows[-1]["1x"]["peak_mb"]["max"])
    return {
        "model": asdict(moe),
        "rounds": sizes.memory_rounds,
        "weights_mb": rounded(weights_mb),
        "rows": rows,
    }


def memory_table(result: dict[str, Any]) -> Table:
    model = result["model"]
    gap = max(row[times]["longest_gap_ms"] for row in result["rows"] for times in ("1x", "4x"))
    table = Table(
        *("method", "tokens", "a block", "peak MB, highest (lowest)", "ratio", "weights and all outputs, MB"),
        title=f"{model['experts']} experts, hidden size {model['hidden']}, weights of {result['weights_mb']:.3g} MB",
        caption=f"Without mapped inputs. Looked every {1e3 * SAMPLE_SECONDS:g} ms, at most {gap:.0f} ms apart. "
        "The last column is computed.",
    )
    for row in result["rows"]:
        for times, ratio in (("1x", ""), ("4x", f"{row['ratio']:.3g}")):
            each, block = row[times], str(row["block_tokens"])
            peak = f"{each['peak_mb']['max']:.0f} ({each['peak_mb']['min']:.0f})"
            table.add_row(row["method"], f"{each['tokens']:,}", block, peak, ratio, f"{each['all_outputs_mb']:,.0f}")
    return table


def main(
    part: Annotated[Part, typer.Option(help="What to measure.")] = "all",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads per task. The default is the number of physical cores.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Use tiny sizes, to see that it runs.")] = False,
    results: Annotated[Path | None, typer.Option(help="JSON file to write, in benchmarks/results by default.")] = None,
) -> None:
    sizes, threads = QUICK if quick else Sizes(), threads or physical_cores()
    results = results or ROOT / ("build" if quick else "benchmarks/results") / "calibration.json"
    parts = {
        "similarity": (lambda: measure_similarities(sizes, threads), similarity_table),
        "scaling": (lambda: measure_scaling(sizes), scaling_table),
        "memory": (lambda: measure_memory(sizes), memory_table),
    }
    console = tables()
    measured = {}
    for name in parts if part == "all" else (part,):
        measure, table = parts[name]
        command = f"python -m benchmarks.calibration --part {name}" + " --quick" * quick
        # Beside each part, not once for all: they need not be measured on one machine.
        measured[name] = {"command": command, "machine": machine(), "versions": versions(*PACKAGES), **measure()}
        console.print(table(measured[name]))
        keep(results, {name: measured[name]})
    print(json.dumps(measured))


if __name__ == "__main__":
    typer.run(main)

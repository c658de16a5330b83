"""What re-routing one layer's decode step costs on a CPU: the compiled function beside the torch functions.

    python -m benchmarks.cpu   # 2 minutes, on an idle machine

One thread, 64 experts, top-8, as in the example model. The tables of 12 layers take turns, as in a model, but nothing
else passes through the caches between them. Also the seconds that compiled code takes to get ready: compiled anew, and
taken from the cache. Prints a table and one JSON line last; writes `benchmarks/results/cpu.json`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from rich.table import Table

from benchmarks.common import RESULTS, ROOT, ranged, spread
from sere_dist.console import progress, tables
from sere_dist.kernels.reroute_cpu import CpuLayer
from sere_dist.method.projection import reroute_projection
from sere_dist.method.records import ExpertPlaces, LayerTables, Settings, Step
from sere_dist.method.rerouting import reroute
from sere_dist.method.slots import merge_repeats
from sere_dist.provenance import keep, machine, versions

EXPERTS, TOP_K, LAYERS, RANKS = 64, 8, 12, 8
ROWS = (1, 4, 16, 64)
# By name: the settings, whether the tables have prices, and whether experts have places.
POLICIES = {
    "off (S = K)": (Settings(TOP_K), False, False),
    "paper's, S = 2": (Settings(2), False, False),
    "projection, S = 2": (Settings(2), True, False),
    "projection, expert price": (Settings(1, expert_price=0.02), True, False),
    "projection, both prices, 8 ranks": (Settings(1, expert_price=0.02, traffic_price=0.01), True, True),
}
READY = """
import time
import torch
imported = time.perf_counter()
from sere_dist.kernels.reroute_cpu import CpuLayer
from sere_dist.method.records import LayerTables, Settings, Step
layer = CpuLayer(LayerTables(torch.rand(8, 8)))
layer.set(Settings(1))
layer.reroute(Step(torch.rand(2, 4), torch.zeros(2, 4, dtype=torch.int32)))
print(time.perf_counter() - imported)
"""


def microseconds(call: Callable[[int], Any], calls: int) -> float:
    started = time.perf_counter()
    for i in range(calls):
        call(i % LAYERS)
    return 1e6 * (time.perf_counter() - started) / calls


def measure(rounds: int) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=random)

    similarity = [uniform(EXPERTS, EXPERTS) / 2 for _ in range(LAYERS)]
    priced = [LayerTables(each, uniform(EXPERTS, EXPERTS), 0.5 + uniform(EXPERTS)) for each in similarity]
    papers = [LayerTables(each) for each in similarity]
    rank_E = (torch.arange(EXPERTS) * RANKS // EXPERTS).short()
    rows = []
    for num_rows in track(ROWS, "rows", console=progress()):
        weights_TK, ids_TK = torch.randn(num_rows, EXPERTS, generator=random).softmax(-1).topk(TOP_K)
        step = Step(weights_TK / weights_TK.sum(1, keepdim=True), ids_TK.int(), torch.ones(num_rows, dtype=torch.bool))
        for policy, (settings, has_prices, has_places) in POLICIES.items():
            of_layers = priced if has_prices else papers
            places = ExpertPlaces(rank_E, RANKS, rank_E) if has_places else None
            layers = [CpuLayer(each, places, merges=True) for each in of_layers]
            for layer in layers:
                layer.set(settings)

            def by_torch(i: int) -> Any:
                tables = of_layers[i]  # noqa: B023  called at once
                if tables.size_E is not None:
                    weights, ids = reroute_projection(step, tables, settings, places)  # noqa: B023
                else:
                    weights, ids = step.weights_TK, reroute(*step[:2], tables.similarity_EE, select_top_k=settings[0])  # noqa: B023
                return merge_repeats(weights, ids)

            ours: list[float] = []
            torchs: list[float] = []
            layers[0].reroute(step)
            for _ in range(rounds):
                ours.append(microseconds(lambda i: layers[i].reroute(step), 2000))  # noqa: B023
                torchs.append(microseconds(by_torch, 60))
            rows.append({"rows": num_rows, "policy": policy, "compiled": spread(ours), "torch": spread(torchs)})
    return rows


def ready_seconds(rounds: int) -> dict[str, Any]:
    """Returns how long the import, the first call and, if it must be, the compilation take in a new process."""
    found: dict[str, list[float]] = {"compiled anew": [], "from the cache": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
            for kind in found:
                command = [sys.executable, "-c", READY]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
                found[kind].append(float(done.stdout))
    return {kind: spread(seconds) for kind, seconds in found.items()}


def main(
    rounds: Annotated[int, typer.Option(help="Number of measurements of each kind.")] = 5,
    results: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "cpu.json",
) -> None:
    torch.set_num_threads(1)
    measured = {
        "command": f"python -m benchmarks.cpu --rounds {rounds}",
        "machine": machine(),
        "versions": versions("sere-dist", "torch", "numba", "numpy"),
        "experts": EXPERTS,
        "top_k": TOP_K,
        "microseconds": measure(rounds),
        "ready_seconds": ready_seconds(rounds),
    }
    table = Table(
        "rows", "policy", "compiled", "torch functions", title="Microseconds per layer and step: median (min-max)"
    )
    for row in measured["microseconds"]:
        table.add_row(str(row["rows"]), row["policy"], ranged(row["compiled"]), ranged(row["torch"]))
    tables().print(table)
    keep(results, measured)
    print(json.dumps(measured))


if __name__ == "__main__":
    typer.run(main)

"""Whether the re-routing kernel does on this GPU what the torch functions do: the checks of `benchmarks.kernel`.

Each raises AssertionError if it does not, and returns what it checked.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from rich.progress import track

from benchmarks.common import capture, resources
from benchmarks.kernel_times import BUILDS
from sere_dist.console import progress
from sere_dist.kernels import reroute
from sere_dist.method.records import Step
from sere_dist.provenance import rounded
from sere_dist.testing.random_steps import RandomStep, assert_equal, random_steps

FEW, MANY = 25, 500
PROFILED_ROWS = (1, 64, 256, 1024)


def check_first() -> dict[str, Any]:
    """Compiles and loads the kernel for each of a few kinds of layers, then re-routes one step."""
    device, started, kernels = torch.device("cuda", torch.cuda.current_device()), time.perf_counter(), []
    for layer, build in BUILDS.items():
        for name, kernel in reroute.kernels_for(device, build).entries.items():
            kernels.append({"kernel": name, "layer": layer, **resources(kernel)})
    seconds = rounded(time.perf_counter() - started)
    RandomStep(seed=0, rows=16, top_k=8, experts=128, select_top_k=2, projection=False).check("cuda")
    return {"compute_capability": torch.cuda.get_device_capability(), "compile_seconds": seconds, "kernels": kernels}


def check_steps(count: int) -> dict[str, Any]:
    """Random steps of all kinds, the largest shapes, replays of captured graphs, and two streams at once."""
    large = [
        RandomStep(
            seed=seed,
            rows=rows,
            top_k=top_k,
            experts=experts,
            select_top_k=2,
            projection=projection,
            threshold=0.4,
            traffic_price=0.02,
            domains=8,
            ranks=8,
            valid_share=0.8,
            ties=False,
        )
        for seed, (rows, top_k, experts) in enumerate([(1, 32, 1024), (1024, 8, 1024), (1025, 8, 256), (16384, 8, 128)])
        for projection in (False, True)
    ]
    for step in track([*random_steps(count), *large], "random steps", console=progress()):
        step.check("cuda")
    replays = check_replays()
    pairs = check_two_streams()
    return {"random_steps": count, "large_steps": len(large), "replays": replays, "pairs_on_two_streams": pairs}


def in_many_blocks():
    """Has each step take two launches, over as many blocks as its few rows can fill."""
    return mock.patch.multiple(reroute, ONE_LAUNCH_LANES=0, THREADS_OF_TWO=64)


def check_many_blocks() -> dict[str, Any]:
    """What blocks that run at once hand over in the workspace, which no sanitizer looks at: up to 4,000 rows."""
    with in_many_blocks():
        for step in track(list(random_steps(MANY, seed=1)), "random steps in many blocks", console=progress()):
            replace(step, rows=50 * step.rows).check("cuda")
    return {"random_steps": MANY}


def check_few_steps() -> dict[str, Any]:
    """Few steps in one launch and in two, for a sanitizer to watch."""
    for step in random_steps(FEW, seed=2):
        step.check("cuda")
    with in_many_blocks():
        for step in random_steps(FEW, seed=3):
            step.check("cuda")
    return {"random_steps": 2 * FEW}


def launch_each_size() -> dict[str, Any]:
    """One launch at each of a few sizes, for a profiler to read."""
    for rows in PROFILED_ROWS:
        step = RandomStep(0, rows, 8, 128, 2, projection=False, valid_share=0.9, ties=False, empty_share=0)
        step.by_kernel("cuda")
    return {"rows": PROFILED_ROWS}


def check_replays() -> int:
    """One captured graph; what a replay does follows the settings, the tokens, the places of the experts and
    the other ranks' losses of its moment."""
    count = 0
    random = torch.Generator().manual_seed(0)
    # One launch and two; without other ranks and with them.
    for projection, rows, elsewhere_share in itertools.product((False, True), (64, 2048), (None, 0.1)):
        step = RandomStep(
            seed=1,
            rows=rows,
            top_k=8,
            experts=128,
            select_top_k=2,
            projection=projection,
            traffic_price=0.02,
            domains=8,
            ranks=8,
            elsewhere_share=elsewhere_share,
            valid_share=0.9,
            ties=False,
            empty_share=0,
        )
        layer = step.layer("cuda")
        weights_TK, ids_TK = step.weights_TK.cuda(), step.ids_TK.cuda()
        assert step.valid_T is not None  # there is a share of valid rows
        valid_T = step.valid_T.cuda()
        assert layer.rank_E is not None and step.rank_E is not None  # there are ranks
        assert layer.domain_E is not None and step.domain_E is not None  # there are domains
        places = [(layer.rank_E, step.rank_E), (layer.domain_E, step.domain_E)]
        all_reduce: Callable[[torch.Tensor], None] | None = None
        if step.elsewhere_E is not None:
            elsewhere_E = step.elsewhere_E.cuda()
            places.append((elsewhere_E, step.elsewhere_E))

            def add_elsewhere(losses_E: torch.Tensor, elsewhere_E: torch.Tensor = elsewhere_E) -> None:
                losses_E += elsewhere_E

            all_reduce = add_elsewhere

        on_device = Step(weights_TK, ids_TK, valid_T)
        layer.reroute(on_device, all_reduce)  # compiles and loads
        graph = capture([lambda: layer.reroute(on_device, all_reduce)])  # noqa: B023 captured at once
        layer.counters.zero_()
        total = torch.zeros_like(layer.counters).cpu()
        for turn in range(40):
            step.select_top_k, step.threshold = turn % 9, (0.0, 0.5, 0.9, 0.99)[turn % 4]
            step.enabled, step.min_rows, step.traffic_price = turn % 5 != 3, (0, rows)[turn % 7 == 6], 0.01 * (turn % 3)
            step.expert_price = (0.0, 1.0, 10.0, 100.0)[turn % 11 % 4]
            step.set(layer.settings)
            layer.set_threshold(step.threshold)
            step.valid_T = torch.rand(len(valid_T), generator=random) < 0.9
            for _, here in places:
                here.copy_(here.roll(1))
            tokens = [(weights_TK, step.weights_TK), (ids_TK, step.ids_TK), (valid_T, step.valid_T)]
            for there, here in tokens + places:
                there.copy_(here)
            graph.replay()
            expected = step.by_torch()
            total += expected[2]
            mine = (weights_TK.cpu(), ids_TK.cpu(), layer.counters.cpu())
            assert_equal(mine, (expected[0], expected[1], total), step)
            count += 1
    return count


def check_two_streams() -> int:
    """Layers re-routed on two streams at once do not meet."""
    steps = [RandomStep(i, 256, 8, 128, 2, False, valid_share=None, ties=False) for i in range(64)]
    layers = [step.layer("cuda") for step in steps]
    on_device = [Step(step.weights_TK.cuda(), step.ids_TK.cuda()) for step in steps]
    layers[0].reroute(Step(on_device[0].weights_TK.clone(), on_device[0].ids_TK.clone()))
    layers[0].counters.zero_()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for stream in streams:  # both wait until all is queued
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
    for i, (layer, own) in enumerate(zip(layers, on_device, strict=True)):
        with torch.cuda.stream(streams[i % 2]):
            layer.reroute(own)
    torch.cuda.synchronize()
    for step, layer, own in zip(steps, layers, on_device, strict=True):
        assert_equal((own.weights_TK.cpu(), own.ids_TK.cpu(), layer.counters.cpu()), step.by_torch(), step)
    return len(steps) // 2

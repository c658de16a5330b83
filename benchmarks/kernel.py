"""What re-routing costs inside a CUDA graph: beside nothing, beside the method in three launches, beside a router.

    python -m benchmarks.kernel                        # checks, then times
    python -m benchmarks.kernel --dry-run              # no GPU: compiles, lists what it would do
    compute-sanitizer --tool racecheck python -m benchmarks.kernel --part check --steps 100   # memcheck, synccheck

Needs torch, cuda.core, typer, rich, psutil and an NVIDIA GPU of compute capability 8.0 or more; no vLLM. check: random
steps of all kinds against the torch functions, replays of one captured graph while the settings change, two streams at
once. time: a graph of many calls of each kind, each call with tokens of its own and each layer with its own tables,
replayed in turns; ids are put back between replays, outside the timed part. The tables stay in the L2 cache, from which
a model's weights would push them. Prints a table and one JSON line last; writes `benchmarks/results/kernel.json` after
each part.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from cuda.core import Kernel, ObjectCode, Program, ProgramOptions
from rich.progress import track
from rich.table import Table

from benchmarks.common import ROOT, ranged, spread
from sere_dist.console import progress, tables
from sere_dist.kernels.reroute import ENTRIES, DeviceSettings, LayerKernel, compile_kernels, launch_kernel
from sere_dist.method.records import ExpertPlaces, LayerTables, Settings, Step
from sere_dist.provenance import keep, machine, versions
from sere_dist.testing.random_steps import RandomStep, assert_equal, random_steps

OTHERS = Path(__file__).with_name("three_launches.cu")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
SHAPES = ((60, 4), (64, 8), (128, 8), (256, 8))  # experts, experts a token
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
LAYERS, CALLS_A_LAYER = 48, 5
SELECT_TOP_K, DOMAINS, PRICE = 2, 8, 0.02
KINDS = ("empty", "re-routing", "off", "united", "projection", "priced", "three launches", "torch softmax, top-k")
Part = Literal["all", "check", "time"]


def check(steps: int) -> dict[str, Any]:
    """Raises AssertionError unless the kernel does on this GPU what the torch functions do."""
    large = [
        RandomStep(seed, rows, top_k, experts, 2, projection, 0.4, 0.02, 8, ranks=8, ties=False, valid_share=0.8)
        for seed, (rows, top_k, experts) in enumerate([(1, 32, 1024), (1024, 8, 1024), (1025, 8, 256), (16384, 8, 128)])
        for projection in (False, True)
    ]
    for step in track([*random_steps(steps), *large], "random steps", console=progress()):
        step.check("cuda")
    replays = check_replays()
    pairs = check_two_streams()
    return {"random_steps": steps, "large_steps": len(large), "replays": replays, "pairs_on_two_streams": pairs}


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


def capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def compile_others(arch: str) -> ObjectCode:
    return Program(OTHERS.read_text(), "c++", ProgramOptions(arch=arch, std="c++17")).compile("cubin")


class Calls:
    """The calls of a graph of each kind, for one shape, and the tokens that they take."""

    def __init__(self, rows: int, experts: int, top_k: int, others: dict[str, Kernel]):
        count = LAYERS * CALLS_A_LAYER
        random = torch.Generator("cuda").manual_seed(0)
        logits = torch.randn(count, rows, experts, device="cuda", generator=random)
        weights, ids = logits.softmax(-1).topk(top_k, sorted=True)
        self.original = (weights / weights.sum(-1, keepdim=True), ids.int(), ids)
        self.current = [tensor.clone() for tensor in self.original]
        weights, ids, ids_64 = self.current
        similarity = torch.rand(LAYERS, experts, experts, device="cuda", generator=random)
        coefficient = 2 * torch.rand(experts, experts, device="cuda", generator=random)
        size, domain = torch.rand(experts, device="cuda", generator=random), torch.arange(experts) * DOMAINS // experts
        papers = [LayerTables(similarity_EE) for similarity_EE in similarity]
        projection = [LayerTables(similarity_EE, coefficient, size) for similarity_EE in similarity]
        places = ExpertPlaces(domain, DOMAINS, domain)

        def of_layers(
            tables: list[LayerTables],
            settings: Settings,
            places: ExpertPlaces | None = None,
            all_reduce: Callable[[torch.Tensor], None] | None = None,
        ) -> list[Callable[[], None]]:
            in_force = DeviceSettings("cuda")
            in_force.set(settings)
            layers = [LayerKernel(each, in_force, places) for each in tables]
            # Neighbouring calls: different layers.
            return [lambda i=i: layers[i % LAYERS].reroute(Step(weights[i], ids[i]), all_reduce) for i in range(count)]

        device = weights.device
        primary = torch.zeros(count, experts, dtype=torch.int32, device=device)
        substitute = torch.zeros(count, experts, dtype=torch.int64, device=device)
        candidates = 1 << (experts - 1).bit_length()

        def three_launches(i: int) -> None:
            table = similarity[i % LAYERS]
            arguments = [ids_64[i], rows, top_k, experts, SELECT_TOP_K, primary[i]]
            launch_kernel(others["mark_primary"], device, 1, 256, arguments)
            arguments = [table, experts, primary[i], 0.0, substitute[i]]
            launch_kernel(others["find_substitutes"], device, experts, candidates, arguments)
            arguments = [ids_64[i], rows * top_k, substitute[i]]
            launch_kernel(others["replace"], device, -(-rows * top_k // 256), 256, arguments)

        self.of = {
            "empty": [lambda: launch_kernel(others["empty"], device, 1, 32, [])] * count,
            "re-routing": of_layers(papers, Settings(SELECT_TOP_K)),
            "off": of_layers(papers, Settings(top_k)),
            "united": of_layers(papers, Settings(SELECT_TOP_K), all_reduce=lambda _: None),
            "projection": of_layers(projection, Settings(SELECT_TOP_K)),
            "priced": of_layers(projection, Settings(SELECT_TOP_K, traffic_price=PRICE), places),
            "three launches": [lambda i=i: three_launches(i) for i in range(count)],
            "torch softmax, top-k": [lambda i=i: logits[i].softmax(-1).topk(top_k) for i in range(count)],
        }

    def put_back(self) -> None:
        for tensor, original in zip(self.current, self.original, strict=True):
            tensor.copy_(original)

    def check_baseline(self) -> None:
        """The three launches do what one launch does."""
        self.put_back()
        for kind in ("re-routing", "three launches"):
            for call in self.of[kind]:
                call()
        assert torch.equal(self.current[1].long(), self.current[2])


def measure(rounds: int) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability()
    module = compile_others(f"sm_{major}{minor}")
    others = {name: module.get_kernel(name) for name in ("empty", "mark_primary", "find_substitutes", "replace")}
    rows = []
    shapes = [(experts, top_k, rows) for experts, top_k in SHAPES for rows in ROWS]
    for experts, top_k, tokens in track(shapes, "shapes", console=progress()):
        calls = Calls(tokens, experts, top_k, others)
        calls.check_baseline()
        graphs = {kind: capture(calls.of[kind]) for kind in KINDS}
        microseconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for turn in range(rounds + 2):
            for kind, graph in graphs.items():
                calls.put_back()
                torch.cuda._sleep(2_000_000)  # a millisecond, in which the host hands the whole graph over
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                if turn >= 2:  # the first two warm up
                    microseconds[kind].append(1e3 * start.elapsed_time(end) / len(calls.of[kind]))
        rows.append(
            {"experts": experts, "top_k": top_k, "rows": tokens} | {k: spread(v) for k, v in microseconds.items()}
        )
    return {
        "rounds": rounds,
        "calls_a_graph": LAYERS * CALLS_A_LAYER,
        "select_top_k": SELECT_TOP_K,
        "microseconds": rows,
    }


def time_table(measured: dict[str, Any]) -> Table:
    table = Table(
        *("experts, top-k", "rows", *KINDS, "of empty", "of three"),
        title=f"Microseconds a call inside a CUDA graph of {measured['calls_a_graph']} calls: median (min-max)",
        caption=f"re-routing: S = {SELECT_TOP_K}; off: S = K; united: two launches, as if ranks shared a primary set; "
        f"priced: {DOMAINS} domains and ranks. Last columns: re-routing's.",
    )
    for row in measured["microseconds"]:
        ours = row["re-routing"]["median"]
        ratios = [f"{ours / row[kind]['median']:.2f}" for kind in ("empty", "three launches")]
        shape = f"{row['experts']}, {row['top_k']}"
        table.add_row(shape, str(row["rows"]), *(ranged(row[kind]) for kind in KINDS), *ratios)
    return table


def dry_run() -> dict[str, Any]:
    """Compiles everything and says what would be measured."""
    sizes = {}
    for arch in ARCHITECTURES:
        compile_others(arch)
        sizes[arch] = len(compile_kernels(arch, torch.float32, torch.int32).code)
        print(f"{arch}: {', '.join(ENTRIES)} compiled, {sizes[arch]:,} bytes; empty and three launches compiled")
    shapes = [f"{experts} experts top-{top_k}" for experts, top_k in SHAPES]
    print(f"would time {', '.join(KINDS)} for {', '.join(shapes)}, rows {', '.join(map(str, ROWS))}")
    return {"dry_run": {"cubin_bytes": sizes, "shapes": len(SHAPES) * len(ROWS), "kinds": list(KINDS)}}


def main(
    part: Annotated[Part, typer.Option(help="Part of the benchmark to run.")] = "all",
    steps: Annotated[int, typer.Option(help="Number of random steps to check.")] = 2000,
    rounds: Annotated[int, typer.Option(help="Number of timed replays of each graph.")] = 20,
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="Compile and list only, which needs no GPU.")] = False,
    results: Annotated[Path, typer.Option(help="JSON file.")] = ROOT / "benchmarks" / "results" / "kernel.json",
) -> None:
    if is_dry_run:
        print(json.dumps(dry_run()))
        return
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no NVIDIA GPU here: --dry-run shows what would be measured")
    about = {"machine": machine(), "versions": versions("sere-dist", "torch", "cuda-core", "cuda-bindings")}
    measured = {}
    if part in ("all", "check"):
        command = f"python -m benchmarks.kernel --part check --steps {steps}"
        measured["check"] = {"command": command, **about, **check(steps)}
        keep(results, measured)
    if part in ("all", "time"):
        command = f"python -m benchmarks.kernel --part time --rounds {rounds}"
        measured["time"] = {"command": command, **about, **measure(rounds)}
        tables().print(time_table(measured["time"]))
        keep(results, measured)
    print(json.dumps(measured))


if __name__ == "__main__":
    typer.run(main)

"""What a call of the re-routing kernel takes in a CUDA graph, and what it is measured against: `benchmarks.kernel`.

A graph holds many calls of one kind, each with tokens of its own. Neighbouring calls belong to different layers, each
with its own tables and settings. Graphs of all kinds are replayed in turns; tokens are put back between replays,
outside the timed part. All this stays in the L2 cache, from which a model's weights would push it. The kinds "cold"
first overwrite that cache, and then choose experts: re-routing then meets cold tables and warm tokens, as in a model.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from cuda.core import LaunchConfig, ObjectCode, Program, ProgramOptions, Stream, launch

from benchmarks.common import capture, resources, spread
from sere_dist.kernels import reroute
from sere_dist.kernels.reroute import Build, DeviceSettings, Feature, LayerKernel, load_kernels
from sere_dist.method.records import ExpertPlaces, LayerTables, Settings, Step

SOURCE = Path(__file__).with_name("baselines.cu")
BASELINES = ("empty", "gate", "mark_primary", "find_substitutes", "replace")
LAYERS, CALLS_A_LAYER = 48, 5
SELECT_TOP_K, DOMAINS, TRAFFIC_PRICE, EXPERT_PRICE = 2, 8, 0.02, 0.02
SKEW = 0.3  # scores fall by SKEW ln(place): of 128 experts, one is among the 8 of a third of the tokens
GATE, COLD_GATE, COLD = "gate", "cold: gate", "cold: gate, re-routing"
REROUTING, THREE_LAUNCHES = "re-routing", "three launches"
KINDS = ("empty", "empty, 1,024 threads", GATE, THREE_LAUNCHES, REROUTING, "off", "united", "merging", "projection")
KINDS += ("traffic price", "expert price, skewed", COLD_GATE, COLD)
EVERYTHING = Feature.PROJECTION | Feature.DOMAINS | Feature.RANKS
# Kinds of layers that the kernel is compiled for.
BUILDS = {
    "paper's policy": Build(128, 8),
    "projection": Build(128, 8, Feature.PROJECTION),
    "projection, domains, ranks": Build(128, 8, EVERYTHING),
    "the same, merged slots": Build(128, 8, EVERYTHING | Feature.MERGES),
}
# How the same step can be launched: constants of `sere_dist.kernels.reroute`.
LAUNCHES: dict[str, dict[str, Any]] = {
    f"{experts} experts per warp": {"EXPERTS_A_WARP": experts} for experts in (4, 8, 16)
}
LAUNCHES["no overlap"] = {"OVERLAPS": False}
LAUNCHES["two launches"] = {"ONE_LAUNCH_LANES": 0}
Call = Callable[[], None]
Argument = torch.Tensor | int | float


def compile_baselines(arch: str, experts: int) -> ObjectCode:
    options = ProgramOptions(arch=arch, std="c++17", define_macro=("EXPERTS", str(experts)))
    return Program(SOURCE.read_text(), "c++", options).compile("cubin")


class Launcher(Protocol):
    def launch(self, name: str, blocks: int, threads: int, arguments: Sequence[Argument]) -> None: ...


class Baselines:
    """The kernels of baselines.cu on this GPU, for one number of experts."""

    def __init__(self, experts: int):
        major, minor = torch.cuda.get_device_capability()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.entries = load_kernels(compile_baselines(f"sm_{major}{minor}", experts), BASELINES)

    def launch(self, name: str, blocks: int, threads: int, arguments: Sequence[Argument]) -> None:
        with torch.cuda.device(self.device):
            stream = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
            launch(
                stream, LaunchConfig(grid=blocks, block=threads), self.entries[name], *map(_kernel_argument, arguments)
            )


def _kernel_argument(value: Argument) -> Any:
    """cuda.core takes a Python int for a pointer, and a Python float for a double."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)


class Tokens:
    """What the router chose in each call of a graph, and the scores that it chose by.

    Attributes:
        logits: float32 [calls, T, E].
        weights, ids, ids_64: [calls, T, K], which calls change until they are put back.
        valid_T: a mask, as the plugin always passes one. All rows are valid.
    """

    def __init__(self, calls: int, rows: int, experts: int, top_k: int, device: torch.device | str, skew: float = 0.0):
        random = torch.Generator(device).manual_seed(0)
        place_E = torch.arange(1, experts + 1, device=device)
        self.logits = torch.randn(calls, rows, experts, device=device, generator=random) - skew * place_E.log()
        weights, ids = self.logits.softmax(-1).topk(top_k, sorted=True)
        self.original = (weights / weights.sum(-1, keepdim=True), ids.int(), ids)
        self.weights, self.ids, self.ids_64 = (tensor.clone() for tensor in self.original)
        self.valid_T = torch.ones(rows, dtype=torch.bool, device=device)

    def put_back(self) -> None:
        for tensor, original in zip((self.weights, self.ids, self.ids_64), self.original, strict=True):
            tensor.copy_(original)

    def step(self, call: int) -> Step:
        return Step(self.weights[call], self.ids[call], self.valid_T)


class Calls:
    """The calls of a graph of each kind, for one shape, and the tokens that they take."""

    def __init__(self, rows: int, experts: int, top_k: int, baselines: Launcher, device: torch.device | str):
        self.count = LAYERS * CALLS_A_LAYER
        self.rows, self.experts, self.top_k, self.baselines, self.device = rows, experts, top_k, baselines, device
        self.tokens = Tokens(self.count, rows, experts, top_k, device)
        self.skewed = Tokens(self.count, rows, experts, top_k, device, skew=SKEW)
        random = torch.Generator(device).manual_seed(1)
        self.similarity = torch.rand(LAYERS, experts, experts, device=device, generator=random)
        coefficient_EE = 2 * torch.rand(experts, experts, device=device, generator=random)
        size_E = torch.rand(experts, device=device, generator=random)
        papers = [LayerTables(similarity_EE) for similarity_EE in self.similarity]
        projection = [LayerTables(similarity_EE, coefficient_EE, size_E) for similarity_EE in self.similarity]
        self.primary = torch.zeros(self.count, experts, dtype=torch.int32, device=device)
        self.substitute = torch.zeros(self.count, experts, dtype=torch.int64, device=device)
        is_gpu = torch.device(device).type == "cuda"
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if is_gpu else 0
        self.flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

        keeps = Settings(SELECT_TOP_K)
        rerouting = self.rerouting(papers, keeps)

        def cold_rerouting(i: int) -> None:
            self.cold_gate(i)
            rerouting[i]()

        traffic, expert = keeps._replace(traffic_price=TRAFFIC_PRICE), keeps._replace(expert_price=EXPERT_PRICE)
        self.of: dict[str, list[Call]] = {
            "empty": [lambda: baselines.launch("empty", 1, 32, [])] * self.count,
            "empty, 1,024 threads": [lambda: baselines.launch("empty", 1, 1024, [])] * self.count,
            GATE: self.each(self.gate),
            THREE_LAUNCHES: self.each(self.three_launches),
            REROUTING: rerouting,
            "off": self.rerouting(papers, Settings(top_k)),
            "united": self.rerouting(papers, keeps, all_reduce=lambda _losses_E: None),
            "merging": self.rerouting(papers, keeps, merges=True),
            "projection": self.rerouting(projection, keeps),
            "traffic price": self.rerouting(projection, traffic, in_domains=True),
            "expert price, skewed": self.rerouting(projection, expert, self.skewed),
            COLD_GATE: self.each(self.cold_gate),
            COLD: self.each(cold_rerouting),
        }

    def each(self, call: Callable[[int], None]) -> list[Call]:
        return [lambda i=i: call(i) for i in range(self.count)]

    def rerouting(
        self,
        tables: list[LayerTables],
        settings: Settings,
        tokens: Tokens | None = None,
        all_reduce: Callable[[torch.Tensor], None] | None = None,
        merges: bool = False,
        in_domains: bool = False,
    ) -> list[Call]:
        tokens = tokens or self.tokens
        domain_E = torch.arange(self.experts) * DOMAINS // self.experts
        places = ExpertPlaces(domain_E, DOMAINS, domain_E) if in_domains else None
        layers = []
        for of_layer in tables:
            in_force = DeviceSettings(self.device)
            in_force.set(settings)
            layers.append(LayerKernel(of_layer, in_force, places, merges=merges))
        return self.each(lambda i: layers[i % LAYERS].reroute(tokens.step(i), all_reduce))

    def gate(self, i: int) -> None:
        """Four warps a block, as in vLLM."""
        arguments = [self.tokens.logits[i], self.rows, self.top_k, self.tokens.weights[i], self.tokens.ids[i]]
        self.baselines.launch("gate", -(-self.rows // 4), 128, arguments)

    def cold_gate(self, i: int) -> None:
        self.flush.zero_()
        self.gate(i)

    def three_launches(self, i: int) -> None:
        experts, ids, slots = self.experts, self.tokens.ids_64[i], self.rows * self.top_k
        table, primary, substitute = self.similarity[i % LAYERS], self.primary[i], self.substitute[i]
        arguments = [ids, self.rows, self.top_k, experts, SELECT_TOP_K, primary]
        self.baselines.launch("mark_primary", 1, 256, arguments)
        candidates = 1 << (experts - 1).bit_length()
        self.baselines.launch("find_substitutes", experts, candidates, [table, experts, primary, 0.0, substitute])
        self.baselines.launch("replace", -(-slots // 256), 256, [ids, slots, substitute])

    def put_back(self) -> None:
        self.tokens.put_back()
        self.skewed.put_back()

    def run(self, kind: str) -> None:
        """Runs a kind outside a graph, on tokens as they were chosen."""
        self.put_back()
        for call in self.of[kind]:
            call()

    def check(self) -> None:
        """Runs every kind, so that a graph finds all its kernels loaded, and compares what has a counterpart."""
        for kind in self.of:
            self.run(kind)
        tokens, (weights, ids, _) = self.tokens, self.tokens.original
        self.run(GATE)
        torch.testing.assert_close(tokens.weights, weights)
        # Scores rather than ids: nearly equal probabilities may round to another order.
        torch.testing.assert_close(*(tokens.logits.gather(-1, each.long()) for each in (tokens.ids, ids)))
        self.run(REROUTING)
        rerouted = tokens.ids.long()
        self.run(THREE_LAUNCHES)
        assert torch.equal(tokens.ids_64, rerouted), "three launches re-route otherwise than one"


def replay_microseconds(
    graphs: dict[str, torch.cuda.CUDAGraph], put_back: Callable[[], None], calls: int, rounds: int
) -> dict[str, list[float]]:
    """Returns the microseconds a call of each graph in each round; the graphs take turns."""
    found: dict[str, list[float]] = {kind: [] for kind in graphs}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(rounds + 2):
        for kind, graph in graphs.items():
            put_back()
            torch.cuda._sleep(4_000_000)  # two milliseconds, in which the host hands the whole graph over
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:  # the first two warm up
                found[kind].append(1e3 * start.elapsed_time(end) / calls)
    return found


def time_shape(experts: int, top_k: int, rows: int, rounds: int) -> dict[str, Any]:
    """Times every kind."""
    calls = Calls(rows, experts, top_k, Baselines(experts), "cuda")
    calls.check()
    graphs = {kind: capture(of_kind) for kind, of_kind in calls.of.items()}
    microseconds = replay_microseconds(graphs, calls.put_back, calls.count, rounds)
    cold = [both - gate for both, gate in zip(microseconds[COLD], microseconds[COLD_GATE], strict=True)]
    row = {"experts": experts, "top_k": top_k, "rows": rows}
    return row | {kind: spread(values) for kind, values in {**microseconds, "cold: re-routing": cold}.items()}


def sweep_shape(experts: int, top_k: int, rows: int, rounds: int) -> dict[str, Any]:
    """Times re-routing in each of LAUNCHES, which must all come to the same."""
    calls = Calls(rows, experts, top_k, Baselines(experts), "cuda")
    calls.run(REROUTING)
    expected = calls.tokens.ids.clone()
    graphs = {}
    for name, constants in LAUNCHES.items():
        with mock.patch.multiple(reroute, **constants):
            calls.run(REROUTING)
            assert torch.equal(calls.tokens.ids, expected), f"{name}: other experts"
            graphs[name] = capture(calls.of[REROUTING])
    microseconds = replay_microseconds(graphs, calls.put_back, calls.count, rounds)
    row = {"experts": experts, "top_k": top_k, "rows": rows}
    return row | {name: spread(values) for name, values in microseconds.items()}


def baseline_resources(experts: int) -> list[dict[str, Any]]:
    entries = Baselines(experts).entries
    return [{"kernel": name, "experts": experts, **resources(kernel)} for name, kernel in entries.items()]

"""The kernel of reroute.cu against the torch functions, run on the CPU (cuda_on_host.h), and compiled for real GPUs."""

import ctypes
import itertools
import re
import subprocess
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from cuda.core import Program, ProgramOptions
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, given, settings

from sere_dist.kernels import reroute as kernel
from sere_dist.rerouting import COUNTERS, reroute, reroute_projection, step_counts

HERE = Path(__file__).parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
IDS = (torch.int32, torch.int64)


class HostKernels:
    """What `kernel.Kernels` is on a GPU: the same launches with the same arguments, run by the CPU."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.launches: list[str] = []
        self.seed = 0

    def launch(self, name, blocks, threads, arguments):
        self.launches.append(name)
        function = self.library[f"{name}_on_host"]
        function.restype = ctypes.c_char_p
        passed = [
            ctypes.c_int(v) if isinstance(v, int) else ctypes.c_void_p(v.data_ptr() if v is not None else None)
            for v in arguments
        ]
        if error := function(ctypes.c_uint(blocks), ctypes.c_uint(threads), ctypes.c_uint(self.seed), *passed):
            raise RuntimeError(error.decode())


def compile_on_host(folder: Path, source: str, weight_dtype=torch.float32, id_dtype=torch.int32) -> HostKernels:
    """Compiles `source` in place of reroute.cu."""
    (folder / "reroute.cu").write_text(source)
    library = folder / "reroute.so"
    macros = [f"-D{name}" for name in (*kernel.MACROS[weight_dtype], *kernel.MACROS[id_dtype])]
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas", *macros]
    command += ["-I", str(folder), "-I", str(HERE), str(HERE / "reroute_on_host.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return HostKernels(library)


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory):
    source = kernel.SOURCE.read_text()
    return {
        types: compile_on_host(tmp_path_factory.mktemp("reroute"), source, *types)
        for types in itertools.product(WEIGHTS, IDS)
    }


@pytest.fixture
def on_host(host_kernels, monkeypatch):
    monkeypatch.setattr(kernel, "kernels_for", lambda _device, weights, ids: host_kernels[weights, ids])
    return host_kernels


@dataclass
class Case:
    """One step of one layer, drawn from a seed."""

    seed: int
    rows: int
    top_k: int
    experts: int
    select_top_k: int
    projection: bool
    threshold: float = 0.0
    traffic_price: float = 0.0
    domains: int | None = None
    has_home: bool = False
    enabled: bool = True
    min_rows: int = 0
    max_rows: int = kernel.NO_LIMIT
    valid_share: float | None = 0.7
    ties: bool = True  # weights and similarities of few values
    empty_share: float = 0.1
    weight_dtype: torch.dtype = torch.float32
    id_dtype: torch.dtype = torch.int32
    counters: torch.Tensor = field(default=None, repr=False)

    def __post_init__(self):
        random = torch.Generator().manual_seed(self.seed)

        def uniform(*shape, steps=4):
            values = torch.rand(shape, generator=random)
            return (values * steps).round() / steps if self.ties else values

        rows, top_k, experts = self.rows, self.top_k, self.experts
        self.weights_TK = uniform(rows, top_k).to(self.weight_dtype)
        ids_TK = torch.randint(experts, (rows, top_k), generator=random)
        self.ids_TK = ids_TK.masked_fill(torch.rand(rows, top_k, generator=random) < self.empty_share, -1)
        self.ids_TK = self.ids_TK.to(self.id_dtype)
        self.similarity_EE = uniform(experts, experts, steps=8)
        self.coefficient_EE, self.size_E = 2 * uniform(experts, experts), 2 * uniform(experts)
        # Masks are longer than the step, as the runner's are.
        self.valid_T = None
        if self.valid_share is not None:
            self.valid_T = torch.rand(rows + 5, generator=random) < self.valid_share
        self.domain_E = None if self.domains is None else torch.randint(self.domains, (experts,), generator=random)
        self.home_T = None
        if self.has_home and self.domains:
            self.home_T = torch.randint(-1, self.domains, (rows + 5,), generator=random, dtype=torch.int32)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Weights, ids and counts by the torch functions."""
        valid_T = None if self.valid_T is None else self.valid_T[: self.rows]
        home_T = None if self.home_T is None else self.home_T[: self.rows]
        votes = self.rows if valid_T is None else int(valid_T.sum())
        acts = self.enabled and self.min_rows <= votes <= self.max_rows
        select_top_k = self.select_top_k if acts else 0
        common = {"select_top_k": select_top_k, "threshold": self.threshold, "valid_T": valid_T}
        weights_TK = self.weights_TK
        if self.projection:
            weights_TK, ids_TK = reroute_projection(
                self.weights_TK,
                self.ids_TK,
                self.similarity_EE,
                self.coefficient_EE,
                self.size_E,
                **common,
                traffic_price=self.traffic_price,
                domain_E=self.domain_E,
                home_T=home_T,
            )
        else:
            ids_TK = reroute(self.weights_TK, self.ids_TK, self.similarity_EE, **common)
        counts = step_counts(
            self.weights_TK,
            self.ids_TK,
            ids_TK,
            select_top_k=select_top_k,
            num_experts=self.experts,
            valid_T=valid_T,
            domain_E=self.domain_E,
            home_T=home_T,
        )
        return weights_TK, ids_TK, counts.tolist()

    def by_kernel(self) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """The same by the kernel."""
        policy = kernel.Policy(
            "cpu",
            select_top_k=self.select_top_k,
            enabled=self.enabled,
            min_rows=self.min_rows,
            max_rows=self.max_rows,
            traffic_price=self.traffic_price,
        )
        tables = {"coefficient_EE": self.coefficient_EE, "size_E": self.size_E} if self.projection else {}
        layer = kernel.Layer(self.similarity_EE, policy, threshold=self.threshold, domain_E=self.domain_E, **tables)
        weights_TK, ids_TK = self.weights_TK.clone(), self.ids_TK.clone()
        layer.reroute(weights_TK, ids_TK, self.valid_T, self.home_T)
        assert not layer.workspace.any()  # left as it was found
        return weights_TK, ids_TK, layer.counters.tolist()

    def check(self) -> None:
        for what, mine, torchs in zip(("weights", "ids", "counts"), self.by_kernel(), self.expected(), strict=True):
            if what == "counts":
                assert dict(zip(COUNTERS, mine, strict=True)) == dict(zip(COUNTERS, torchs, strict=True))
            else:
                different = (mine != torchs).nonzero().tolist()
                assert not different, f"{what}: {len(different)} differ, first at {different[0]} in {self}"


cases = st.builds(
    Case,
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 40),
    top_k=st.sampled_from([1, 2, 3, 4, 6, 8, 10, 32]),
    experts=st.sampled_from([1, 2, 8, 31, 33, 60, 64, 128, 300]),
    select_top_k=st.integers(-1, 9),
    projection=st.booleans(),
    threshold=st.sampled_from([0.0, 0.3, 0.75, 0.95, 1.0]),
    traffic_price=st.sampled_from([0.0, 0.01, 0.25, 3.0]),
    domains=st.sampled_from([None, 1, 2, 8, 70]),
    has_home=st.booleans(),
    enabled=st.sampled_from([True, True, True, False]),
    min_rows=st.sampled_from([0, 0, 5, 20]),
    max_rows=st.sampled_from([kernel.NO_LIMIT, kernel.NO_LIMIT, 5, 20]),
    valid_share=st.sampled_from([None, 0.0, 0.3, 0.9]),
    ties=st.booleans(),
    empty_share=st.sampled_from([0.0, 0.1, 0.9]),
    weight_dtype=st.sampled_from(WEIGHTS),
    id_dtype=st.sampled_from(IDS),
)
# Fixtures that hypothesis sets up once are right here: they hold compiled code.
many = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))


@many
@given(case=cases, seed=st.integers(0, 2**31))
def test_one_launch_equals_torch(on_host, case, seed):
    kernels = on_host[case.weight_dtype, case.id_dtype]
    kernels.seed, kernels.launches = seed, []
    case.check()
    assert kernels.launches == (["reroute"] if case.rows else [])


@many
@given(case=cases, seed=st.integers(0, 2**31))
def test_two_launches_equal_torch(on_host, case, seed):
    kernels = on_host[case.weight_dtype, case.id_dtype]
    kernels.seed, kernels.launches = seed, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "ONE_LAUNCH_ROWS", 0)
        patch.setattr(kernel, "THREADS_OF_TWO", 64)
        patch.setattr(kernel, "BLOCKS_OF_TWO", 3)
        case.check()
    assert kernels.launches == (["reroute_vote", "reroute_settle"] if case.rows else [])


@pytest.mark.parametrize(
    ("rows", "launches"),
    [(1, 1), (1024, 1), (1025, 2), (16384, 2)],
)
@pytest.mark.parametrize("projection", [False, True])
def test_largest_shapes(on_host, rows, launches, projection):
    kernels = on_host[torch.bfloat16, torch.int32]
    kernels.launches = []
    Case(
        seed=rows,
        rows=rows,
        top_k=32 if rows == 1 else 8,
        experts=1024 if rows < 2000 else 60,
        select_top_k=2,
        projection=projection,
        threshold=0.4,
        traffic_price=0.02,
        domains=8,
        ties=False,
        valid_share=0.05 if rows > 2000 else 0.9,
        weight_dtype=torch.bfloat16,
    ).check()
    assert len(kernels.launches) == launches


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16])
def test_weights_round_as_torch_rounds(on_host, weight_dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(weight_dtype)
    weights = patterns[(patterns >= 0) & (patterns <= 10_000)]
    case = Case(
        seed=0,
        rows=len(weights) // 3,
        top_k=4,
        experts=8,
        select_top_k=1,
        projection=True,
        ties=False,
        empty_share=0,
        valid_share=None,
        weight_dtype=weight_dtype,
    )
    # The heaviest slot has one expert everywhere, so that all others settle and get a new weight.
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(1))
    case.weights_TK[:, 0], case.ids_TK[:, 0] = 20_000, 1
    case.weights_TK[:, 1:] = weights[order][: case.rows * 3].view(-1, 3)
    case.coefficient_EE *= 10.0 ** torch.randint(-7, 3, case.coefficient_EE.shape)
    case.check()
    assert (case.expected()[0] != case.weights_TK).float().mean() > 0.5


def test_policy_and_threshold_change_in_place(on_host):
    case = Case(seed=5, rows=16, top_k=4, experts=60, select_top_k=1, projection=False, ties=False, valid_share=None)
    policy = kernel.Policy("cpu", select_top_k=case.select_top_k)
    layer = kernel.Layer(case.similarity_EE, policy)
    addresses = [policy.block.data_ptr(), layer.cutoff_E.data_ptr(), layer.counters.data_ptr()]
    total = torch.zeros(len(COUNTERS), dtype=torch.int64)
    for select_top_k, threshold, enabled in [(1, 0.0, True), (2, 0.0, True), (2, 0.95, True), (2, 0.95, False)]:
        policy.set(select_top_k=select_top_k, enabled=enabled)
        layer.set_threshold(threshold)
        ids_TK = case.ids_TK.clone()
        layer.reroute(case.weights_TK, ids_TK)
        case.select_top_k, case.threshold, case.enabled = select_top_k, threshold, enabled
        _, expected_TK, counts = case.expected()
        assert torch.equal(ids_TK, expected_TK)
        total += torch.tensor(counts)
        assert torch.equal(layer.counters, total)
    assert addresses == [policy.block.data_ptr(), layer.cutoff_E.data_ptr(), layer.counters.data_ptr()]


BARRIERS = list(re.finditer(r"__syncthreads(\(\)|_or)", kernel.SOURCE.read_text()))


@pytest.mark.parametrize("which", range(len(BARRIERS)))
def test_a_dropped_barrier_is_caught(tmp_path, monkeypatch, which):
    barrier = BARRIERS[which]
    nothing = "(void)0" if barrier[1] == "()" else "bool"
    without = barrier.string[: barrier.start()] + nothing + barrier.string[barrier.end() :]
    kernels = compile_on_host(tmp_path, without)
    monkeypatch.setattr(kernel, "kernels_for", lambda *_: kernels)
    monkeypatch.setattr(kernel, "THREADS_OF_TWO", 64)
    caught = []
    for seed in range(20):
        kernels.seed = seed
        case = Case(seed=seed, rows=40, top_k=8, experts=60, select_top_k=1, projection=False, domains=4)
        for one_launch_rows in (1024, 0):
            monkeypatch.setattr(kernel, "ONE_LAUNCH_ROWS", one_launch_rows)
            try:
                case.check()
            except (AssertionError, RuntimeError) as error:
                caught.append(error)
    assert caught


def local_memory(cubin: bytes, tmp_path: Path) -> dict[str, int]:
    """Bytes of local memory a thread of each kernel has: register spills, and arrays that need an address."""
    (tmp_path / "cubin").write_bytes(cubin)
    with open(tmp_path / "cubin", "rb") as file:
        elf = ELFFile(file)
        symbols = elf.get_section_by_name(".symtab")
        info = elf.get_section_by_name(".nv.info").data()
        frames, at = {}, 0
        while at < len(info):
            form, attribute = info[at], info[at + 1]
            size = int.from_bytes(info[at + 2 : at + 4], "little") if form == 4 else 0
            if attribute == 0x11:  # EIATTR_FRAME_SIZE: symbol, bytes
                symbol, frame = (int.from_bytes(info[at + i : at + i + 4], "little") for i in (4, 8))
                frames[symbols.get_symbol(symbol).name] = frame
            at += 4 + size
    return frames


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("weight_dtype", "id_dtype"), list(itertools.product(WEIGHTS, IDS)))
def test_compiles_without_spills(tmp_path, arch, weight_dtype, id_dtype):
    cubin = kernel.compile_kernels(arch, weight_dtype, id_dtype, tmp_path / "cache").code
    frames = local_memory(cubin, tmp_path)
    assert frames.keys() >= set(kernel.ENTRIES) and not any(frames.values())


def test_spills_would_be_seen(tmp_path):
    source = kernel.SOURCE.read_text().replace("__launch_bounds__(MAX_THREADS)", "")
    options = ProgramOptions(arch="sm_90", std="c++17", max_register_count=24)
    assert local_memory(Program(source, "c++", options).compile("cubin").code, tmp_path)["reroute"] > 0


def test_cache_keeps_each_set_of_options(tmp_path):
    def entries():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "entries").rglob("*") if path.is_file()}

    kernel.compile_kernels("sm_90", torch.float32, torch.int32, tmp_path)
    first = entries()
    kernel.compile_kernels("sm_90", torch.float32, torch.int32, tmp_path)
    assert entries() == first and len(first) == 1
    kernel.compile_kernels("sm_90", torch.bfloat16, torch.int32, tmp_path)
    kernel.compile_kernels("sm_80", torch.float32, torch.int32, tmp_path)
    assert len(entries()) == 3


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="XDG_CACHE_HOME"):
        module = kernel.compile_kernels("sm_90", torch.float32, torch.int32, tmp_path / "file")
    assert module.code
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel.compile_kernels("sm_90", torch.float32, torch.int32, tmp_path / "cache")


def test_what_does_not_fit_is_refused():
    policy = kernel.Policy("cpu", select_top_k=1)
    with pytest.raises(ValueError, match="at most 1024 experts, not 1025"):
        kernel.Layer(torch.eye(1025), policy)
    with pytest.raises(ValueError, match="both coefficient and size"):
        kernel.Layer(torch.eye(4), policy, coefficient_EE=torch.eye(4))

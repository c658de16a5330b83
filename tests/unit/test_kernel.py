"""The kernel of reroute.cu against the torch functions, run on the CPU (cuda_on_host.h), and compiled for real GPUs."""

import dataclasses
import itertools
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from cuda.core import Program, ProgramOptions
from hypothesis import HealthCheck, given, settings

from benchmarks.cubins import local_memory
from benchmarks.kernel_times import EVERYTHING
from sere_dist.kernels import reroute as kernel
from sere_dist.method.counters import COUNTERS
from sere_dist.method.fixed_point import ALWAYS_PRIMARY
from sere_dist.method.records import ExpertPlaces, LayerTables, Step
from sere_dist.testing.random_steps import CHOICES, RandomStep, assert_equal, random_steps
from tests.support.host_kernels import compile_on_host

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


@pytest.fixture
def on_host(host_kernels, monkeypatch):
    monkeypatch.setattr(kernel, "kernels_for", host_kernels.kernels_for)
    return host_kernels


steps = st.builds(
    RandomStep, seed=st.integers(0, 2**31), **{name: st.sampled_from(values) for name, values in CHOICES.items()}
)
# Fixtures that hypothesis sets up once are right here: they hold compiled code.
many = settings(suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("count", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_many_steps_equal_torch(on_host, count):
    for step in random_steps(count):
        step.check("cpu")


@many
@given(step=steps, seed=st.integers(0, 2**31))
def test_one_launch_equals_torch(on_host, step, seed):
    kernels = on_host[step.id_dtype]
    kernels.seed, kernels.launches = seed, []
    step.check("cpu")
    fits = step.rows << (step.top_k - 1).bit_length() <= kernel.ONE_LAUNCH_LANES
    launches = ["reroute"] if fits and step.elsewhere_share is None else ["reroute_vote", "reroute_settle"]
    assert kernels.launches == (launches if step.rows else [])


@many
@given(step=steps, seed=st.integers(0, 2**31))
def test_two_launches_equal_torch(on_host, step, seed):
    kernels = on_host[step.id_dtype]
    kernels.seed, kernels.launches = seed, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "ONE_LAUNCH_LANES", 0)
        patch.setattr(kernel, "THREADS_OF_TWO", 64)
        step.check("cpu")
    assert kernels.launches == (["reroute_vote", "reroute_settle"] if step.rows else [])


@pytest.mark.parametrize(
    ("rows", "launches"),
    [(1, 1), (128, 1), (129, 2), (1025, 2), pytest.param(16384, 2, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("projection", [False, True])
def test_largest_shapes(on_host, rows, launches, projection):
    kernels = on_host[torch.int32]
    kernels.launches = []
    RandomStep(
        seed=rows,
        rows=rows,
        top_k=32 if rows == 1 else 8,
        experts=1024 if rows < 2000 else 60,
        select_top_k=2,
        projection=projection,
        threshold=0.4,
        expert_price=0.5 if rows < 2000 else 20.0,
        traffic_price=0.02,
        domains=8,
        ranks=1024 if rows == 128 else 8,
        elsewhere_share=0.1 if rows == 1025 else None,
        ties=False,
        valid_share=0.05 if rows > 2000 else 0.9,
    ).check("cpu")
    assert len(kernels.launches) == launches


@pytest.mark.parametrize("projection", [False, True])
def test_policy_and_threshold_change_in_place(on_host, projection):
    step = RandomStep(
        seed=5, rows=16, top_k=4, experts=60, select_top_k=1, projection=projection, ties=False, valid_share=None
    )
    layer = step.layer("cpu")
    memory = (layer.settings.block, layer.cutoff_E, layer.counters)
    addresses = [tensor.data_ptr() for tensor in memory]
    total, active = 0, []
    for step.select_top_k, step.threshold, step.enabled, step.expert_price in [
        (1, 0.0, True, 0.0),
        (2, 0.0, True, 0.0),
        (2, 0.9, True, 0.0),
        (2, 0.9, False, 0.0),
        (1, 0.0, True, 0.03),
    ]:
        step.set(layer.settings)
        layer.set_threshold(step.threshold)
        weights_TK, ids_TK = step.weights_TK.clone(), step.ids_TK.clone()
        layer.reroute(Step(weights_TK, ids_TK))
        expected_weights_TK, expected_ids_TK, counts = step.by_torch()
        total = total + counts
        assert_equal((weights_TK, ids_TK, layer.counters), (expected_weights_TK, expected_ids_TK, total), step)
        active.append(counts[COUNTERS.index("active_experts_after")].item())
    assert addresses == [tensor.data_ptr() for tensor in memory]
    assert (active[4] > active[0]) == projection, "the paper's policy has no price"


def test_tables_in_any_order_of_memory(on_host):
    step = RandomStep(seed=9, rows=16, top_k=4, experts=64, select_top_k=1, projection=False, ties=False)
    step.similarity_EE = step.similarity_EE.T.contiguous().T
    step.check("cpu")


def test_experts_move_between_ranks(on_host):
    step = RandomStep(
        seed=6, rows=16, top_k=4, experts=60, select_top_k=1, projection=False, domains=4, ranks=4, valid_share=None
    )
    memory = tuple(torch.zeros(60, dtype=torch.int16) for _ in range(2))  # the caller's own
    settings = kernel.DeviceSettings("cpu")
    step.set(settings)
    layer = kernel.LayerKernel(step.tables, settings, ExpertPlaces(memory[0], 4, memory[1]))
    moved = [(step.rank_E, step.domain_E), (step.rank_E.flip(0) // 2, torch.zeros_like(step.domain_E))]
    total, tails = 0, []
    for step.rank_E, step.domain_E in moved:
        for there, here in zip(memory, (step.rank_E, step.domain_E), strict=True):
            there.copy_(here)
        weights_TK, ids_TK = step.weights_TK.clone(), step.ids_TK.clone()
        layer.reroute(Step(weights_TK, ids_TK))
        expected_weights_TK, expected_ids_TK, counts = step.by_torch()
        total = total + counts
        tails.append(counts[len(COUNTERS) :].tolist())
        assert_equal((weights_TK, ids_TK, layer.counters), (expected_weights_TK, expected_ids_TK, total), step)
    assert all(tails[0][2:]) and tails[1][2:] == [0, 0]


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 0},
        {"valid_share": 0.0},
        {"enabled": False},
        {"min_rows": 17},
        {"max_rows": 0},
        {"select_top_k": 0},
        {"select_top_k": 4},
    ],
)
def test_a_rank_that_does_not_act_takes_part_in_the_all_reduce(on_host, changes):
    common = {"rows": 16, "experts": 60, "top_k": 4, "select_top_k": 1, "valid_share": None, "empty_share": 0}
    step = RandomStep(seed=7, projection=False, **common | changes)
    layer, weights_TK, ids_TK, calls = step.layer("cpu"), step.weights_TK.clone(), step.ids_TK.clone(), []

    def all_reduce(losses_E: torch.Tensor) -> None:
        calls.append(losses_E.clone())
        losses_E.fill_(ALWAYS_PRIMARY)

    layer.reroute(Step(weights_TK, ids_TK, step.valid_T), all_reduce)
    assert len(calls) == 1 and calls[0].dtype == torch.int64
    assert torch.equal(calls[0], step.own_losses())
    assert calls[0].any() == (changes.keys() & {"enabled", "min_rows", "max_rows"} != set())
    assert not layer.workspace.any()
    assert_equal((weights_TK, ids_TK, layer.counters), (step.weights_TK, step.ids_TK, step.by_torch()[2]), step)


@pytest.mark.parametrize("expert_price", [0.0, 0.5])
def test_ranks_that_share_primary_experts_act_as_one(on_host, expert_price):
    """Two ranks with half of the tokens each do to these what one rank does to all."""
    common = {"rows": 32, "top_k": 4, "experts": 60, "select_top_k": 1, "projection": True, "domains": 4}
    step = RandomStep(seed=8, expert_price=expert_price, ties=False, **common)
    weights_TK, ids_TK, _ = step.by_torch()
    own = []  # losses of both halves; a first pass collects them
    for all_reduce in (lambda losses: own.append(losses.clone()), lambda losses: losses.copy_(own[0] + own[1])):
        layer = step.layer("cpu")
        halves = [(step.weights_TK[half].clone(), step.ids_TK[half].clone()) for half in (slice(20), slice(20, None))]
        for half, start in zip(halves, (0, 20), strict=True):
            layer.reroute(Step(*half, step.valid_T[start:]), all_reduce)
    assert not torch.equal(own[0], own[1])
    assert torch.equal(torch.cat([weights for weights, _ in halves]), weights_TK)
    assert torch.equal(torch.cat([ids for _, ids in halves]), ids_TK)


BUILDS = [
    kernel.Build(128, 8),
    kernel.Build(128, 8, kernel.Feature.PROJECTION),
    kernel.Build(256, 8, EVERYTHING, torch.int64),
    kernel.Build(60, 4, EVERYTHING | kernel.Feature.MERGES | kernel.Feature.CHANCES),
    kernel.Build(128, 8, kernel.Feature.PROJECTION | kernel.Feature.CHANCES),
    kernel.Build(1024, 32, kernel.Feature.MERGES, torch.int64),
]


@pytest.mark.parametrize(
    "build", [pytest.param(build, marks=[pytest.mark.slow] * (build != BUILDS[3])) for build in BUILDS], ids=str
)
def test_constants_change_nothing(tmp_path, monkeypatch, build):
    """What NVRTC compiles has constants where the other tests' build has arguments."""
    kernels = compile_on_host(tmp_path, kernel.SOURCE.read_text(), build=build)
    monkeypatch.setattr(kernel, "kernels_for", lambda _device, wanted: {build: kernels}[wanted])
    has = build.features.__contains__
    for step in random_steps(50):
        step = dataclasses.replace(
            step,
            experts=build.experts,
            top_k=build.top_k,
            id_dtype=build.id_dtype,
            projection=has(kernel.Feature.PROJECTION),
            domains=8 if has(kernel.Feature.DOMAINS) else None,
            ranks=8 if has(kernel.Feature.RANKS) else 0,
            merges=has(kernel.Feature.MERGES),
            has_chance=has(kernel.Feature.CHANCES),
        )
        step.check("cpu")


BARRIERS = list(re.finditer(r"__syncthreads(\(\)|_or)", kernel.SOURCE.read_text()))


# Each costs a compilation.
@pytest.mark.parametrize(
    "which",
    [
        pytest.param(0, marks=pytest.mark.long),
        *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, len(BARRIERS))),
    ],
)
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
        common = {"rows": 40, "top_k": 8, "experts": 60, "select_top_k": 1, "domains": 4, "ranks": 4}
        papers = RandomStep(seed=seed, projection=False, **common)
        prices = {"expert_price": 0.25, "traffic_price": 0.1}
        priced = RandomStep(seed=seed, projection=True, **prices, **common)
        few_alike = dataclasses.replace(priced, rows=8, most_alike=0.5, ties=False)
        balanced = dataclasses.replace(few_alike, expert_price=0.01, balance_price=0.15)
        nothing_safe = dataclasses.replace(balanced, select_top_k=0)
        one_runs = dataclasses.replace(nothing_safe, expert_price=1e6)
        steps = (papers, priced, few_alike, balanced, nothing_safe, one_runs)
        for step, one_launch_rows in itertools.product(steps, (1024, 0)):
            monkeypatch.setattr(kernel, "ONE_LAUNCH_LANES", one_launch_rows)
            try:
                step.check("cpu")
            except (AssertionError, RuntimeError) as error:
                caught.append(error)
    assert caught


@pytest.mark.parametrize(
    "arch", [arch if arch == "sm_90" else pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHITECTURES]
)
@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_compiles_without_spills(tmp_path, arch, build):
    cubin = kernel.compile_kernels(arch, build, tmp_path / "cache").code
    frames = local_memory(cubin)
    assert frames.keys() >= set(kernel.ENTRIES) and not any(frames.values())


LAUNCH = """
from types import SimpleNamespace
from sere_dist.kernels.reroute import StepArguments, launch_kernel
arguments = StepArguments(weights_TK=0x1234, workspace=0xABCD, T=3, K=8, E=128, num_ranks=2, features=5)
for overlaps in (False, True):
    launch_kernel(SimpleNamespace(handle=0x77), 0x55, 4, 512, arguments, overlaps)
print(bytes(arguments).hex())
"""


def test_a_launch_reaches_the_driver_whole(tmp_path):
    """Through cuda.bindings, to a stand-in for the driver."""
    source = Path(__file__).parents[1] / "support" / "driver_on_host.c"
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "libcuda.so.1")], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", LAUNCH], env=environment, capture_output=True, text=True, check=True)
    *launches, struct = run.stdout.splitlines()
    passed = "4 1 1 512 1 1, stream 0x55, function 0x77, extra (nil),"
    overlaps = int(kernel.driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
    assert launches == [f"{passed} {struct}", f"{passed} attribute {overlaps} = 1, {struct}"]


def test_a_compile_error_says_what_to_do(tmp_path):
    refused = (
        "can't be compiled for sm_13 .*invalid value for --gpu-architecture.*`sere-dist doctor` says what to install"
    )
    with pytest.raises(RuntimeError, match=f"(?s){refused}"):
        kernel.compile_kernels("sm_13", BUILDS[0], tmp_path)


@pytest.mark.parametrize("fails_at", ["the cubin", "its attributes"])
def test_a_driver_that_is_too_old_says_what_to_install(monkeypatch, fails_at):
    def fail(*_):
        raise Exception("CUDA_ERROR_INVALID_IMAGE")

    lazy = SimpleNamespace(attributes=type("Attributes", (), {"num_regs": property(fail)})())
    module = SimpleNamespace(get_kernel=fail if fails_at == "the cubin" else lambda _name: lazy)
    monkeypatch.setattr(kernel, "nvrtc_version", lambda: (13, 5))
    monkeypatch.setattr(kernel.driver, "cuDriverGetVersion", lambda: (0, 12090))
    says = r"INVALID_IMAGE.*runs CUDA 12.9 at most, and NVRTC 13.5 .* 'cuda-python==12\.\*' nvidia-cuda-nvrtc-cu12"
    with pytest.raises(RuntimeError, match=says):
        kernel.load_kernels(module, kernel.ENTRIES)
    monkeypatch.setattr(kernel.driver, "cuDriverGetVersion", lambda: (0, 13000))
    with pytest.raises(Exception, match=r"^CUDA_ERROR_INVALID_IMAGE$"):  # something else is wrong: it speaks for itself
        kernel.load_kernels(module, kernel.ENTRIES)


def test_a_cuda_core_that_is_too_old_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core.utils", ModuleType("utils"))  # it lacks what newer ones have
    with pytest.raises(ImportError, match=r"needs cuda-core 1\.0 or newer .*FileStreamProgramCache.* pip install -U"):
        runpy.run_path(kernel.__file__)


def test_spills_would_be_seen():
    source = kernel.SOURCE.read_text().replace("__launch_bounds__(MAX_THREADS, 1)", "")
    options = ProgramOptions(arch="sm_90", std="c++17", max_register_count=24)
    assert local_memory(Program(source, "c++", options).compile("cubin").code)["reroute"] > 0


def test_cache_keeps_each_set_of_options(tmp_path):
    def entries():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "entries").rglob("*") if path.is_file()}

    kernel.compile_kernels("sm_90", BUILDS[0], tmp_path)
    first = entries()
    kernel.compile_kernels("sm_90", BUILDS[0], tmp_path)
    assert entries() == first and len(first) == 1
    kernel.compile_kernels("sm_90", BUILDS[1], tmp_path)
    kernel.compile_kernels("sm_80", BUILDS[0], tmp_path)
    assert len(entries()) == 3


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="XDG_CACHE_HOME"):
        module = kernel.compile_kernels("sm_90", BUILDS[0], tmp_path / "file")
    assert module.code
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel.compile_kernels("sm_90", BUILDS[0], tmp_path / "cache")


def test_what_does_not_fit_is_refused():
    four = LayerTables(torch.eye(4))

    def layer(tables=four, **places):
        return kernel.LayerKernel(tables, kernel.DeviceSettings("cpu"), ExpertPlaces(**places))

    with pytest.raises(ValueError, match="at most 1024 experts, not 1025"):
        layer(LayerTables(torch.eye(1025)))
    with pytest.raises(ValueError, match="at most 1024 ranks, not 1025"):
        layer(rank_E=torch.zeros(4), num_ranks=1025)
    for wrong in ({"rank_E": torch.zeros(4)}, {"num_ranks": 4}):
        with pytest.raises(ValueError, match="rank_E and num_ranks come together"):
            layer(**wrong)
    with pytest.raises(ValueError, match=r"rank is \(3,\), 4 experts"):
        layer(rank_E=torch.zeros(3), num_ranks=2)
    with pytest.raises(ValueError, match="both coefficient and size"):
        layer(LayerTables(torch.eye(4), torch.eye(4)))
    with pytest.raises(ValueError, match=r"domain is \(3,\), 4 experts"):
        layer(domain_E=torch.zeros(3))
    weights, ids = torch.rand(6, 2), torch.zeros(6, 2, dtype=torch.int32)
    for step, message in [
        (Step(weights.double(), ids), "topk_weights is torch.float64"),
        (Step(weights, ids.short()), "topk_ids is torch.int16"),
        (Step(weights, ids.T.contiguous().T), "contiguous torch.int32"),
        (Step(weights[:5], ids), "must be alike"),
        (Step(weights, ids, torch.ones(5, dtype=torch.bool)), "valid has 5 rows, the step 6"),
        (Step(weights, ids, torch.ones(6)), "valid is torch.float32"),
        (Step(weights, ids, None, torch.zeros(6)), "home is torch.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer().reroute(step)

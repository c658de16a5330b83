"""What `benchmarks.kernel` does on a GPU, as far as a CPU goes: the kernels it calls are builds for this CPU."""

import json
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kernel, kernel_checks, kernel_times
from benchmarks.common import ROOT
from benchmarks.cubins import local_memory
from sere_dist.kernels import reroute
from sere_dist.testing.random_steps import RandomStep
from tests.support.commands import invoke
from tests.support.host_kernels import compile_baselines_on_host


@pytest.fixture
def on_host(host_kernels, monkeypatch):
    monkeypatch.setattr(reroute, "kernels_for", host_kernels.kernels_for)
    return host_kernels[torch.int32]


@pytest.fixture
def calls(on_host, monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_times, "LAYERS", 2)
    monkeypatch.setattr(kernel_times, "CALLS_A_LAYER", 2)
    return kernel_times.Calls(5, 60, 4, compile_baselines_on_host(tmp_path, experts=60), "cpu")


def test_every_kind_runs_and_its_baselines_do_the_same(calls):
    assert tuple(calls.of) == kernel_times.KINDS
    assert all(len(of_kind) == 4 for of_kind in calls.of.values())
    calls.check()
    calls.similarity.zero_()  # three launches then find other substitutes than the layers, which have copies
    with pytest.raises(AssertionError, match="three launches re-route otherwise"):
        calls.check()


def test_kinds_differ_in_what_they_do(calls):
    found = {}
    for kind in calls.of:
        calls.run(kind)
        tokens = calls.skewed if kind.endswith("skewed") else calls.tokens
        weights, ids, _ = tokens.original
        is_reweighted = bool((tokens.weights - weights).abs().max() > 1e-6)  # the gate rounds otherwise than torch
        found[kind] = not torch.equal(tokens.ids, ids), bool((tokens.ids < 0).any()), is_reweighted
    leaves, reroutes = (False, False, False), (True, False, False)
    expected = dict.fromkeys(kernel_times.KINDS, (True, False, True))  # those of policy projection
    expected |= dict.fromkeys(("empty", "empty, 1,024 threads", "gate", "off", "cold: gate", "three launches"), leaves)
    expected |= dict.fromkeys(("re-routing", "united", "cold: gate, re-routing"), reroutes)
    assert found == expected | {"merging": (True, True, True)}


def test_launches_differ_and_come_to_the_same(calls, on_host):
    calls.run("re-routing")
    ids, launches = calls.tokens.ids.clone(), {}
    for name, constants in kernel_times.LAUNCHES.items():
        on_host.launches = []
        with pytest.MonkeyPatch.context() as patch:
            for constant, value in constants.items():
                patch.setattr(reroute, constant, value)
            calls.run("re-routing")
        launches[name] = on_host.launches[:2]
        assert torch.equal(calls.tokens.ids, ids)
    assert launches.popitem() == ("two launches", ["reroute_vote", "reroute_settle"])
    assert all(names == ["reroute", "reroute"] for names in launches.values()) and len(launches) == 4


def test_checks_take_the_launches_that_they_are_for(monkeypatch):
    monkeypatch.setattr(kernel_checks, "FEW", 6)
    monkeypatch.setattr(kernel_checks, "MANY", 6)
    seen = []

    def check(_step, device):
        assert device == "cuda"
        seen.append((reroute.ONE_LAUNCH_LANES, reroute.THREADS_OF_TWO))

    monkeypatch.setattr(RandomStep, "check", check)
    assert kernel_checks.check_few_steps() == {"random_steps": 12}
    assert seen == [(1024, 512)] * 6 + [(0, 64)] * 6
    seen.clear()
    assert kernel_checks.check_many_blocks() == {"random_steps": 6}
    assert seen == [(0, 64)] * 6


@pytest.mark.parametrize("arch", kernel.ARCHITECTURES)
def test_baselines_compile(arch):
    for experts, _ in kernel.SHAPES:
        frames = local_memory(kernel_times.compile_baselines(arch, experts).code)
        assert frames.keys() >= set(kernel_times.BASELINES) and not any(frames.values())


@pytest.mark.slow
def test_the_benchmark_says_what_it_would_measure():
    command = [sys.executable, "-m", "benchmarks.kernel"]
    run = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True, cwd=ROOT)
    would = json.loads(run.stdout.splitlines()[-1])["dry_run"]
    assert would["shapes"] == 48 and would["cubin_bytes"].keys() == set(kernel.ARCHITECTURES)
    if not torch.cuda.is_available():
        without = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert without.returncode and "--dry-run" in without.stderr


class Replayed:
    """Stands for a CUDA graph: replays by calling again."""

    def __init__(self, calls):
        self.calls = calls

    def replay(self):
        for call in self.calls:
            call()


@pytest.fixture
def as_on_a_gpu(on_host, monkeypatch, tmp_path):
    """The benchmark's own code, from its options to its file; a graph and the time that it takes are made up."""
    library = compile_baselines_on_host(tmp_path, experts=60)
    library.entries = {"gate": SimpleNamespace(attributes=SimpleNamespace(num_regs=32, local_size_bytes=0))}
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda _end: 0.008)
    on_cpu = partial(kernel_times.Calls, device="cpu")
    monkeypatch.setattr(kernel_times, "Calls", lambda *shape: on_cpu(*shape[:-1]))
    monkeypatch.setattr(kernel_times, "Baselines", lambda _experts: library)
    monkeypatch.setattr(kernel_times, "capture", Replayed)
    monkeypatch.setattr(kernel_times, "LAYERS", 2)
    monkeypatch.setattr(kernel_times, "CALLS_A_LAYER", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _cycles: None)
    return tmp_path / "kernel.json"


@pytest.mark.parametrize("part", ["time", "sweep"])
def test_what_is_timed_is_kept_shape_by_shape(as_on_a_gpu, monkeypatch, part):
    kept = []
    monkeypatch.setattr(kernel, "keep", lambda _path, found: kept.append(len(found[part]["microseconds"])))
    options = ["--part", part, "--experts", "60", "--rows", "1,2", "--rounds", "1", "--results", str(as_on_a_gpu)]
    printed = invoke(kernel.main, *options).stdout.splitlines()
    found = json.loads(printed[-1])[part]
    columns = {*kernel_times.KINDS, "cold: re-routing"} if part == "time" else set(kernel_times.LAUNCHES)
    assert kept == [1, 2] and [row["rows"] for row in found["microseconds"]] == [1, 2]
    for row in found["microseconds"]:
        assert row.keys() == {"experts", "top_k", "rows"} | columns
        assert row["re-routing" if part == "time" else "two launches"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert found["baselines"] == [{"kernel": "gate", "experts": 60, "registers": 32, "local_bytes": 0}]
    assert found["versions"]["nvrtc"] and found["machine"]["gpu"] == "a GPU"
    assert any("Microseconds a call inside a CUDA graph of 4 calls" in line for line in printed)

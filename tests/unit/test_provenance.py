"""The machine's description, also where what it is read from is missing, and the file of results."""

import json
import os
import sys

import pynvml
import pytest
import torch

from sere_dist import provenance


@pytest.fixture
def with_a_gpu(monkeypatch, tmp_path):
    """A machine with a GPU, but without NVIDIA's library and tools: the PATH leads to an empty folder."""

    def fail():
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def answer(folder, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def test_a_gpu_machine_that_tells_no_driver(with_a_gpu, monkeypatch):
    found = provenance.machine()
    assert found.keys() == {"cpu", "cores", "memory_gib", "gpu", "driver"}
    assert (found["gpu"], found["driver"]) == ("NVIDIA H200", "unknown")
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert provenance.machine() == found
    answer(with_a_gpu, "echo no device; exit 6")
    assert provenance.machine() == found


def test_the_driver_is_asked_of_its_library_first(with_a_gpu, monkeypatch):
    answer(with_a_gpu, "echo 580.159.04")
    assert provenance.machine()["driver"] == "580.159.04"
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.95.05")
    assert provenance.machine()["driver"] == "580.95.05"


def test_cores_where_siblings_are_told_and_where_not(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0, 1, 2, 3})
    monkeypatch.setattr(provenance, "TOPOLOGY", str(tmp_path / "cpu{}"))
    assert provenance.physical_cores() == 4
    for cpu, names in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / f"cpu{cpu}").write_text(names + "\n")
    assert provenance.physical_cores() == 2


def test_results_of_other_names_stay_when_a_writer_dies(tmp_path, monkeypatch):
    results = tmp_path / "new" / "results.json"
    provenance.keep(results, {"first": 1})
    provenance.keep(results, {"second": 2})
    assert json.loads(results.read_text()) == {"first": 1, "second": 2}

    def killed(path, text):
        path.write_bytes(text[:10].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(type(results), "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        provenance.keep(results, {"third": 3})
    assert json.loads(results.read_text()) == {"first": 1, "second": 2}

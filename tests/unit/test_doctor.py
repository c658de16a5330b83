"""`sere-dist doctor` on machines with GPUs as NVIDIA's library would describe them; each check alone."""

import json
import time
from itertools import combinations
from types import SimpleNamespace

import pynvml
import pytest
from typer.testing import CliRunner

from examples.tiny_moe.data import MODEL
from sere_dist.artifact.folder import TENSORS_FILE
from sere_dist.cli import doctor, gpus
from sere_dist.cli.commands import app
from sere_dist.cli.doctor import Finding
from sere_dist.cli.fresh_process import ChildError, call_in_fresh_process
from sere_dist.cli.gpus import Gpu, Gpus
from sere_dist.testing.local_cluster import free_ports
from tests.support.artifacts import small_artifact

H200, GIB = ("NVIDIA H200", (9, 0), 150_754_820_096), 2**30


def nvml(*gpus, nvlinks=(), ancestor=pynvml.NVML_TOPOLOGY_NODE, cuda=13020, error=None):
    """NVIDIA's library on another machine. `nvlinks`: the pairs of indices that NVLink joins, or "all"."""

    def fail():
        raise error

    pairs = list(combinations(range(len(gpus)), 2)) if nvlinks == "all" else nvlinks
    answers = {
        "nvmlInit": fail if error else lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(gpus),
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda index: gpus[index][0],
        "nvmlDeviceGetCudaComputeCapability": lambda index: list(gpus[index][1]),
        "nvmlDeviceGetMemoryInfo": lambda index: SimpleNamespace(total=gpus[index][2]),
        "nvmlSystemGetDriverVersion": lambda: "580.95.05",
        "nvmlSystemGetCudaDriverVersion_v2": lambda: cuda,
        "nvmlDeviceGetP2PStatus": lambda one, other, _cap: (
            pynvml.NVML_P2P_STATUS_OK if (one, other) in pairs else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED
        ),
        "nvmlDeviceGetTopologyCommonAncestor": lambda _one, _other: ancestor,
    }
    return SimpleNamespace(**{**vars(pynvml), **answers})


@pytest.fixture
def gpus_of(monkeypatch):
    def read(*arguments, **others):
        monkeypatch.setattr(gpus, "load_nvml", lambda: nvml(*arguments, **others))
        return gpus.read_gpus()

    return read


@pytest.fixture
def one_h200(gpus_of, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return gpus_of(H200)


@pytest.mark.long
def test_clusters_that_do_not_answer():
    port = free_ports(1)[0]
    start = time.monotonic()
    silent = doctor.check_ray(f"127.0.0.1:{port}")
    assert time.monotonic() - start < doctor.RAY_SECONDS, "Ray was left to its own patience"
    assert silent == Finding("ray", "fail", f"no cluster answers at 127.0.0.1:{port}", doctor.RAY_ADVICE)
    wrong = doctor.attempt("ray", lambda: doctor.check_ray("nonsense"), doctor.RAY_ADVICE)
    assert wrong == Finding("ray", "fail", "ValueError: Invalid address format: nonsense", doctor.RAY_ADVICE)
    assert doctor.check_ray("http://127.0.0.1:8265").status == "warning"
    assert doctor.check_ray(None).status == "ok" and "not asked" in doctor.check_ray(None).found


def test_artifacts(tmp_path, artifact_path):
    path = tmp_path / "artifact"
    artifact = small_artifact()
    artifact.save(path)
    assert doctor.check_artifact(None, None).status == "ok"
    assert doctor.check_artifact(tmp_path, None).status == "fail"
    found = doctor.check_artifact(path, None)
    assert found.status == "ok"
    assert found.found.startswith("nobody/small-moe, method frobenius, 2 layers of 4 experts, SHA-256 ")
    (path / TENSORS_FILE).write_bytes(b"cut short")
    damaged = doctor.check_artifact(path, None)
    assert damaged.status == "fail" and "is not the file that was written" in damaged.found and damaged.advice
    unreadable = doctor.check_artifact(artifact_path, str(tmp_path / "nowhere"))
    assert unreadable.status == "fail" and "--model" in unreadable.advice
    renamed = tmp_path / "copy"
    renamed.symlink_to(MODEL)
    other_name = doctor.check_artifact(artifact_path, str(renamed))
    assert other_name.status == "warning" and "make sure that their experts are the same" in other_name.advice


def test_model_without_artifact_is_a_mistake():
    result = CliRunner().invoke(app, ["doctor", "--model", "a"])
    assert result.exit_code == 2 and "--artifact" in result.output


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("fail", 1)])
def test_exit_status(monkeypatch, status, code):
    findings = [Finding("one", "ok", "[bold]as it is[/bold]"), Finding("two", status, "x" * 200, "do it")]
    monkeypatch.setattr(doctor, "examine", lambda *_: iter(findings))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == code
    assert result.output.splitlines() == [
        "ok       one       [bold]as it is[/bold]",
        f"{status:9}two       {'x' * 200} -> do it",
    ]


def test_an_exception_is_what_was_found():
    def check():
        raise KeyError("of\nall things")

    assert doctor.attempt("a check", check, "advice") == Finding(
        "a check", "fail", "KeyError: 'of\\nall things'", "advice"
    )


def test_python_version():
    assert doctor.check_python("3.11.9").status == "ok"
    assert doctor.check_python("3.10.1").status == doctor.check_python("3.13.0").status == "fail"


def test_one_gpu(one_h200):
    assert one_h200.devices == (Gpu(*H200),)
    found = doctor.check_gpus(one_h200)
    what = "1 x NVIDIA H200 (140 GiB, compute capability 9.0), driver 580.95.05, CUDA up to 13.2"
    assert found == Finding("gpus", "ok", what)
    assert doctor.check_links(one_h200) == Finding("links", "ok", "1 GPU: nothing to link")


def test_links(gpus_of):
    def found(*arguments, **others):
        finding = doctor.check_links(gpus_of(*arguments, **others))
        assert bool(finding.advice) == (finding.status != "ok")
        return finding.status, finding.found

    assert found(*[H200] * 8, nvlinks="all") == ("ok", "8 GPUs, all pairs NVLink")
    assert found(H200, H200) == ("warning", "2 GPUs, all pairs PCIe")
    assert found(H200, H200, ancestor=pynvml.NVML_TOPOLOGY_SYSTEM) == ("warning", "2 GPUs, all pairs across sockets")
    some = found(H200, H200, H200, nvlinks=[(0, 1)], ancestor=pynvml.NVML_TOPOLOGY_SYSTEM)
    assert some == ("warning", "3 GPUs, 1 pair NVLink, 2 pairs across sockets")


def test_gpus_of_several_kinds(gpus_of, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    found = doctor.check_gpus(gpus_of(H200, H200, ("Tesla T4", (7, 5), 16 * GIB)))
    assert found.status == "fail" and "needs compute capability 8.0" in found.advice
    assert found.found.startswith("2 x NVIDIA H200 (140 GiB, compute capability 9.0), 1 x Tesla T4 (16 GiB, ")
    assert found.found.endswith("CUDA_VISIBLE_DEVICES=0,1")


def test_no_gpu(gpus_of):
    missing = gpus_of(error=pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    found = doctor.check_gpus(missing)
    assert (found.status, found.found) == ("warning", "CPU only: NVML Shared Library Not Found")
    assert doctor.check_links(missing).status == doctor.check_torch(missing).status == "ok"
    assert doctor.check_gpus(gpus_of()).found == "CPU only: driver 580.95.05 has no GPU"
    broken = doctor.check_gpus(gpus_of(error=pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)))
    assert broken.status == "fail" and "restart" in broken.advice and "LibRmVersionMismatch" in broken.found


def test_torch_against_the_driver(one_h200, gpus_of, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    assert doctor.check_torch(one_h200).status == "warning"
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert doctor.check_torch(one_h200).status == doctor.check_torch(Gpus()).status == "ok"
    older = doctor.check_torch(gpus_of(H200, cuda=12080))
    assert older.status == "fail" and "CUDA 12.8 at most" in older.advice


def test_kernel(gpus_of):
    several = doctor.check_kernel(gpus_of(H200, H200, ("NVIDIA A100", (8, 0), 80 * GIB)))
    assert several.status == "ok" and "for sm_80, sm_90 in " in several.found
    driver = doctor.check_kernel(gpus_of(H200, cuda=12080))
    assert driver.status == "fail" and "CUDA 12.8 at most" in driver.advice
    unknown = gpus_of(("Tesla C1060", (1, 3), 4 * GIB))
    refused = doctor.attempt("kernel", lambda: doctor.check_kernel(unknown), doctor.NVRTC_ADVICE)
    assert refused.status == "fail" and "invalid value for --gpu-architecture" in refused.found
    assert "nvidia-cuda-nvrtc" in refused.advice


def test_vllm(one_h200, monkeypatch):
    facts = {"loads_plugin": True, "version": "0.32.0", "device": "cuda", "tested": ["0.32.0"], "missing": []}
    monkeypatch.delenv("SERE_ALLOW_UNTESTED_VLLM", raising=False)
    assert doctor.check_vllm(facts, one_h200) == Finding("vllm", "ok", "0.32.0 for cuda")
    assert doctor.check_vllm(facts | {"version": "0.32.0+cu129"}, one_h200).status == "ok", "the engine takes it, too"
    assert doctor.check_vllm(facts | {"device": "cpu"}, one_h200).status == "warning"
    lacking = doctor.check_vllm(facts | {"missing": ["a.b (ImportError: no b)"]}, one_h200)
    assert lacking.status == "fail" and "lacks a.b (ImportError: no b)" in lacking.found
    other = facts | {"version": "0.33.1"}
    refused = doctor.check_vllm(other, one_h200)
    assert refused.status == "fail" and "SERE_ALLOW_UNTESTED_VLLM=1" in refused.advice
    monkeypatch.setenv("SERE_ALLOW_UNTESTED_VLLM", "1")
    assert doctor.check_vllm(other, one_h200).status == "warning"


def test_a_process_that_fails_or_hangs():
    with pytest.raises(ChildError, match="JSONDecodeError: Expecting value"):
        call_in_fresh_process(json.loads, "nonsense", seconds=30)
    with pytest.raises(ChildError, match=r"look_at_vllm was killed \(its limit: 0.05 s"):
        call_in_fresh_process(doctor.look_at_vllm, seconds=0.05)

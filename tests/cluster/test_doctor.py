"""`sere-dist doctor` on this machine as it is, beside a running cluster."""

import json
import sys
from pathlib import Path

import pytest

from examples.tiny_moe.data import MODEL
from sere_dist.cli.doctor import Finding
from tests.support.artifacts import small_artifact

COMMAND = [str(Path(sys.executable).with_name("sere-dist")), "doctor"]
CHECKS = ["python", "torch", "gpus", "links", "kernel", "vllm", "plugin", "workers", "ray", "artifact"]


def run(cluster, *options, **environment):
    command = ["env", *(f"{name}={value}" for name, value in environment.items()), *COMMAND, *options]
    done = cluster.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_a_machine_that_is_ready(cluster, artifact_path):
    status, printed = run(cluster, "--artifact", str(artifact_path), "--model", str(MODEL))
    lines = {line.split()[1]: line for line in printed.splitlines()}
    assert status == 0 and list(lines) == CHECKS, printed
    assert all(line.split()[0] == "ok" for check, line in lines.items() if check not in ("gpus", "links", "torch")), (
        printed
    )
    assert " compiled it for sm_" in lines["kernel"]
    assert "a fresh process loads the plugin" in lines["workers"]
    assert f"1 node, {cluster.num_cpus} CPUs, " in lines["ray"] and f" at {cluster.address}" in lines["ray"]
    assert "method frobenius, " in lines["artifact"] and f"fits {MODEL}" in lines["artifact"]


@pytest.mark.slow
def test_a_machine_that_is_not(cluster, tmp_path):
    small_artifact().save(tmp_path / "artifact")
    options = ["--json", "--artifact", str(tmp_path / "artifact"), "--model", str(MODEL)]
    status, printed = run(cluster, *options, RAY_AUTH_TOKEN="0" * 32, VLLM_PLUGINS="lora_hf_hub_resolver")
    findings = {finding["check"]: Finding(**finding) for finding in json.loads(printed)}
    assert status == 1 and list(findings) == CHECKS
    failed = [check for check, finding in findings.items() if finding.status == "fail"]
    assert failed == ["plugin", "workers", "ray", "artifact"]
    assert all(findings[check].advice for check in failed)
    assert "leaves sere_dist out" in findings["plugin"].found
    assert "does not load the plugin" in findings["workers"].found
    assert "wants another token (RAY_AUTH_MODE is token, RAY_AUTH_TOKEN is set)" in findings["ray"].found
    assert "RAY_AUTH_MODE" in findings["ray"].advice and "RAY_AUTH_TOKEN" in findings["ray"].advice
    assert "num_experts: artifact 4, model 64" in findings["artifact"].found

"""Ray's autoscaler with the node types of cluster.yaml, on this machine: nodes of pretended GPUs come when something
asks for them, and go when nothing does."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import yaml

from examples.application import ROOT, served
from examples.tiny_moe.data import CALIBRATION, MODEL, MODEL_ID
from sere_dist.admin import request_settings
from sere_dist.artifact.folder import Artifact
from sere_dist.environment import ADMIN_TOKEN
from sere_dist.testing.local_cluster import LocalCluster, free_ports
from tests.soak.load import ENVIRONMENT
from tests.support.polling import eventually

# Of each node: more would start more processes than this machine bears.
SMALL = {"CPU": 2, "GPU": 1}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def autoscaled():
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    assert types.pop("head")["resources"] == {"CPU": 0}
    for node in types.values():
        resources = node["resources"]
        node |= {"node_config": {}, "resources": {kind: SMALL.get(kind, each) for kind, each in resources.items()}}
    types["cpu"]["max_workers"] = 2  # vLLM on CPUs takes no GPU, not even a pretended one
    with LocalCluster(num_cpus=0, worker_types=types, idle_seconds=4) as cluster:
        yield cluster
    assert cluster.processes() == []


WATCH = """
import time
import ray
ray.init(log_to_driver=False, logging_level="error")
before = None
while True:
    kinds = [set(node["Resources"]) for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    gpus = [kind for resources in kinds for kind in resources if kind.startswith("accelerator_type:")]
    now = sorted(gpus) + ["cpu"] * (len(kinds) - len(gpus))
    if now != before:
        before = now
        print(",".join(now).replace("accelerator_type:", ""), flush=True)
    time.sleep(0.2)
"""


@contextmanager
def nodes_over_time(cluster: LocalCluster) -> Iterator[list[str]]:
    """Yields a list that is complete after the block: the worker nodes that were up, each time they changed."""
    seen: list[str] = []
    pipe = {"stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", WATCH]
    with subprocess.Popen(command, env=cluster.environment, **pipe) as watcher, ThreadPoolExecutor(1) as pool:

        def read() -> None:
            for line in watcher.stdout:
                seen.append(line.strip())

        pool.submit(read)
        try:
            eventually(lambda: seen == [""])
            yield seen
            eventually(lambda: seen[-1] == "")
        finally:
            watcher.kill()


def test_a_calibration_brings_nodes_up_and_lets_them_go(autoscaled, tmp_path):
    # Without a working directory: nodes that share a machine delete each other's.
    command = [
        *("ray", "job", "submit", "--log-style=record", "--log-color=false", "--", sys.executable, "-m"),
        *("calibration_jobs.calibrate", "--model", str(MODEL), "--dataset", str(CALIBRATION)),
        *("--num-samples", "64", "--output", str(tmp_path / "out"), "--cpus-per-task", "2"),
        *("--device", "cpu", "--gpus-per-task", "1", "--accelerator-type", "H100"),
    ]
    with nodes_over_time(autoscaled) as seen:
        done = autoscaled.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert seen[:2] == ["", "H100"] and seen[-1] == "" and "H100,H100" in seen
    assert Artifact.load(tmp_path / "out").layers.keys() == set(range(6))


def test_replicas_come_under_load_and_go_when_idle(autoscaled, artifact_path, monkeypatch):
    """On nodes that come for them, and go when the application does."""
    monkeypatch.setenv(ADMIN_TOKEN, autoscaled.environment[ADMIN_TOKEN])
    autoscaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2}
    autoscaling |= {"upscale_delay_s": 1, "downscale_delay_s": 5, "look_back_period_s": 2, "metrics_interval_s": 1}
    arguments = {"num_replicas": None, "autoscaling": autoscaling, "environment": ENVIRONMENT}
    with (
        nodes_over_time(autoscaled) as seen,
        served(autoscaled, free_ports(1)[0], artifact=artifact_path, **arguments) as url,
        openai.OpenAI(base_url=url, api_key="none") as client,
    ):
        (first,) = request_settings(url, {"select_top_k": 3})["replicas"]

        def ask(_number: int) -> bool:
            options = {"max_tokens": 100, "extra_body": {"ignore_eos": True}}
            answer = client.completions.create(model=MODEL_ID, prompt="In the beginning", **options)
            return answer.usage.completion_tokens == 100

        def loaded() -> bool:
            with ThreadPoolExecutor(8) as pool:
                assert all(pool.map(ask, range(16)))
            state = request_settings(url)
            return len(state["replicas"]) == 2 and state["pending"] == []  # it is pending until it has started

        eventually(loaded)
        state = request_settings(url)
        assert first in state["replicas"] and state["settings"]["select_top_k"] == 3
        eventually(lambda: len(request_settings(url)["replicas"]) == 1)
        assert ask(0)
    assert "cpu,cpu" in seen and seen[-1] == ""

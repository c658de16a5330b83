"""Calibration jobs that lose a worker, their driver, a node, or memory, on a cluster of several nodes."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ray._private.node import Node
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster

from examples.tiny_moe.data import CALIBRATION, MODEL
from sere_dist.artifact.folder import TENSORS_FILE, Artifact
from tests.support.hosts import Hosts
from tests.support.polling import PATIENCE, eventually

pytestmark = pytest.mark.slow


class Job:
    """The job's command, running, perhaps on the head of several hosts; its lines as they come."""

    def __init__(
        self,
        address: str,
        output: Path,
        *options: str,
        on: Hosts | None = None,
        module: str = "calibration_jobs.calibrate",
        folder: Path | None = None,
        **variables: str,
    ):
        command = [sys.executable, "-m", module, "--model", str(MODEL), "--output", str(output)]
        command += ["--dataset", str(CALIBRATION), "--num-samples", "64", *options]
        environment = {**os.environ, "RAY_ADDRESS": address, **variables}
        if on is not None:
            command, environment = on.command(0, command), on.environment
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def until(self, text: str) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return
        raise AssertionError(f"the job ended without {text!r}:\n{''.join(self.lines)}")

    def end(self) -> str:
        """Waits for the job; returns all that it printed."""
        self.lines += self.process.stdout
        assert self.process.wait(PATIENCE) == 0, "".join(self.lines)
        return "".join(self.lines)


@pytest.fixture(scope="module")
def nodes():
    """A head that runs no task, and nodes of one CPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster, workers
    cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(job_artifact) -> bytes:
    """What the same job writes where nothing goes wrong."""
    return (job_artifact / TENSORS_FILE).read_bytes()


def scoring_worker(workers: list[Node]) -> psutil.Process:
    """Waits for a worker of these nodes that is in the middle of a layer: Ray names its process after the task."""
    raylets = [psutil.Process(node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid) for node in workers]
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for process in (child for raylet in raylets for child in raylet.children()):
            with suppress(psutil.NoSuchProcess):
                if (process.cmdline() or [""])[0].startswith("ray::score_task"):
                    return process
        time.sleep(0.02)
    raise AssertionError("no task began to score")


def test_a_killed_worker(nodes, undisturbed, tmp_path):
    job = Job(nodes[0].address, tmp_path / "out")
    job.until("scored (1/")
    scoring_worker(nodes[1]).kill()
    assert "lost its worker (WorkerCrashedError); again\n" in job.end()
    assert (tmp_path / "out" / TENSORS_FILE).read_bytes() == undisturbed


def test_files_that_are_stale_for_a_while(nodes, undisturbed, tmp_path):
    job = Job(nodes[0].address, tmp_path / "out", module="tests.support.stale_files", STALE_FILES=str(tmp_path))
    assert job.end().count(f"Stale file handle: '{MODEL.resolve()}'; again\n") == 6
    assert (tmp_path / "out" / TENSORS_FILE).read_bytes() == undisturbed


def test_a_model_named_from_the_drivers_folder(nodes, undisturbed, tmp_path):
    """The nodes' processes run elsewhere: there the same name would be a model of the Hub."""
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "model").symlink_to(MODEL.resolve())
    Job(nodes[0].address, tmp_path / "out", "--model", "someone/model", folder=tmp_path).end()
    assert (tmp_path / "out" / TENSORS_FILE).read_bytes() == undisturbed


def test_a_job_that_no_node_can_run_says_so(nodes, tmp_path):
    job = Job(nodes[0].address, tmp_path / "out", "--cpus-per-task", "2")  # nodes have one each
    job.until("no node of the cluster has what a task asks for: {'num_cpus': 2}. Waiting for one")
    job.process.kill()
    job.process.wait()


def test_a_killed_driver(nodes, undisturbed, tmp_path):
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    job = Job(nodes[0].address, output)
    job.until("scored (2/")
    job.process.send_signal(signal.SIGKILL)
    job.process.wait()
    finished = sorted(path.name for path in partial.glob("layer-*.safetensors"))
    assert len(finished) >= 2 and not output.exists()

    other = Job(nodes[0].address, output, "--method", "cosine")
    assert other.process.wait(PATIENCE) == 1
    refusal = other.process.stdout.read()
    assert "holds layers of another calibration (other: method)" in refusal and "--restart" in refusal
    assert sorted(path.name for path in partial.glob("layer-*.safetensors")) == finished

    printed = Job(nodes[0].address, output).end()
    assert f"{len(finished)} of 6 layers are finished already" in printed
    scored = {int(line.split()[1]) for line in printed.splitlines() if " scored (" in line}
    assert scored == set(range(6)) - {int(name[6:10]) for name in finished}
    assert (output / TENSORS_FILE).read_bytes() == undisturbed
    assert not partial.exists()
    assert Artifact.load(output).layers.keys() == set(range(6))


def test_the_layers_of_a_stopped_job_can_be_thrown_away(nodes, tmp_path):
    job = Job(nodes[0].address, tmp_path / "out")
    job.until("scored (1/")
    job.process.kill()
    job.process.wait()
    printed = Job(nodes[0].address, tmp_path / "out", "--method", "random", "--restart").end()
    assert "finished already" not in printed and "scored (6/6)" in printed


def test_out_of_memory(cluster, tmp_path):
    """Each worker may have so little that its block of tokens does not fit, and a part of it does."""
    command = [
        *("ray", "job", "submit", "--log-style=record", "--log-color=false", "--working-dir", "."),
        *(
            "--runtime-env-json",
            '{"worker_process_setup_hook": "tests.support.memory_limit.limit", "excludes": [".git"]}',
        ),
        *("--", "python", "-m", "calibration_jobs.calibrate", "--model", str(MODEL), "--num-samples", "16"),
        *("--dataset", str(CALIBRATION), "--output", str(tmp_path / "out")),
        *("--block-tokens", "2048"),
    ]
    done = cluster.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    blocks = re.findall(r"layer \d: memory ran out; went on with (\d+) tokens at a time", done.stdout)
    assert len(blocks) == 6 and all(int(tokens) in (1024, 512, 256) for tokens in blocks), done.stdout
    Artifact.load(tmp_path / "out")


COUNTS = """
import sys
from calibration_jobs.calibrate import CalibrationConfig
from calibration_jobs.workers import Workers
workers = Workers.of_cluster(CalibrationConfig(model="m", output="o", cpus_per_task=1))
for _line in sys.stdin:
    print(workers.count, flush=True)
"""


def test_nodes_count_while_they_are_there(nodes):
    """Those that an autoscaler starts for the job's first tasks get a share of the others."""
    cluster, workers = nodes
    environment, pipe = {**os.environ, "RAY_ADDRESS": cluster.address}, subprocess.PIPE
    command = [sys.executable, "-c", COUNTS]
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as driver:

        def count() -> int:
            driver.stdin.write("\n")
            driver.stdin.flush()
            return int(driver.stdout.readline())

        assert count() == len(workers)
        more = cluster.add_node(num_cpus=3)
        assert count() == len(workers) + 3
        cluster.remove_node(more)
        eventually(lambda: count() == len(workers))
        driver.stdin.close()


def test_a_lost_node(nodes, undisturbed, tmp_path):
    """The last test: the cluster has one node less after it."""
    cluster, workers = nodes
    job = Job(cluster.address, tmp_path / "out")
    job.until("scored (1/")
    scoring_worker(workers)
    cluster.remove_node(workers.pop(), allow_graceful=False)
    job.end()
    assert (tmp_path / "out" / TENSORS_FILE).read_bytes() == undisturbed

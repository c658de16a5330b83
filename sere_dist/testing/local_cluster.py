"""A Ray cluster of this machine's own, for the demo and the tests: it disturbs no other, and leaves nothing behind.

What a program that was killed could not stop, the next one finds and stops.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import psutil

from sere_dist.environment import ADMIN_TOKEN, API_KEY

START_SECONDS = 300
STOP_SECONDS = 5  # then it is killed: nothing in it is worth more patience
PREFIX = "sere-"  # of a cluster's folder; short: Ray puts sockets there
OWNER = "owner.json"  # in the folder: who started the cluster, and how its processes are told from others


class LocalCluster:
    """Starts a head node on free ports, with a token of its own, and stops every process that it led to.

    Use as a context manager. `environment` is what a command needs to reach the cluster: `ray job submit`, `serve run`
    and `ray.init()` find address and token there, and `sere-dist settings` its own. Prometheus metrics are at
    `metrics_port`.

    `num_cpus` are the head's. With `worker_types`, the worker node types of a `cluster.yaml`, Ray's autoscaler starts
    such nodes, as further raylets on this machine, when something asks for them, and stops them after `idle_seconds`.
    """

    def __init__(
        self, num_cpus: int = 8, worker_types: dict[str, dict[str, Any]] | None = None, idle_seconds: float = 5
    ):
        self.num_cpus, self.worker_types, self.idle_seconds = num_cpus, worker_types, idle_seconds

    def __enter__(self) -> Self:
        end_abandoned()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.token = secrets.token_hex(16)
        gcs, dashboard, client, agent_http, agent_grpc, self.metrics_port = free_ports(6)
        self.address = f"127.0.0.1:{gcs}"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            # Logical CPUs outnumber the machine's. Ray starts as many workers as there are with the first driver, and
            # keeps as many idle ones, with all that they have imported: with vLLM, 670 MB each.
            "RAY_prestart_worker_first_driver": "0",
            "RAY_num_workers_soft_limit": "2",
            # Opens the settings of applications on this cluster: to whoever set it, too.
            ADMIN_TOKEN: os.environ.get(ADMIN_TOKEN, self.token),
        }
        if (os.cpu_count() or 1) < self.num_cpus:
            # Ray would give each task as many threads as it has of these CPUs, which are not there: six times slower.
            self.environment.setdefault("OMP_NUM_THREADS", "1")
        # Meant for another cluster, or for engines that say nothing of it themselves.
        for other in (API_KEY, f"{API_KEY}_FILE", f"{ADMIN_TOKEN}_FILE", "VLLM_CPU_KVCACHE_SPACE"):
            self.environment.pop(other, None)
        command = [
            *("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--num-cpus={self.num_cpus}"),
            *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
            *(f"--dashboard-agent-listen-port={agent_http}", f"--dashboard-agent-grpc-port={agent_grpc}"),
            *(f"--metrics-export-port={self.metrics_port}", f"--temp-dir={self.folder}", "--disable-usage-stats"),
        ]
        if self.worker_types is not None:
            config = self.folder / "autoscaling.json"
            config.write_text(json.dumps(self._autoscaling(self.worker_types)))
            command.append(f"--autoscaling-config={config}")
            # The provider refuses to work without the first; the second: look for work and idleness every second.
            self.environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        self.log = self.folder / "head.log"
        with self.log.open("w") as log:
            self.head = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        owner = {"pid": os.getpid(), "started": psutil.Process().create_time()}
        (self.folder / OWNER).write_text(json.dumps(owner | {"token": self.token, "session": self.head.pid}))
        try:
            self._wait(dashboard)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _autoscaling(self, worker_types: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Returns what `ray up` would hand to the autoscaler, with Ray's provider of several nodes on one machine."""
        head = {"resources": {"CPU": self.num_cpus}, "node_config": {}, "max_workers": 0}
        return {
            "cluster_name": "local",
            "provider": {
                "type": "fake_multinode",
                "gcs_address": self.address,
                "use_node_id_as_ip": True,  # the nodes share one
                "disable_node_updaters": True,  # and need no SSH
                "disable_launch_config_check": True,
            },
            "head_node_type": "ray.head.default",  # the provider's name for it
            "available_node_types": {**worker_types, "ray.head.default": head},
            "max_workers": sum(node["max_workers"] for node in worker_types.values()),
            "idle_timeout_minutes": self.idle_seconds / 60,
            "upscaling_speed": 1,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "initialization_commands": [],
            "setup_commands": [],
            "head_setup_commands": [],
            "worker_setup_commands": [],
            "head_start_ray_commands": [],
            "worker_start_ray_commands": [],
        }

    def _wait(self, port: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.head.poll() is None and time.monotonic() < deadline:
            if not port_is_free(port):
                return
            time.sleep(0.2)
        raise RuntimeError(f"Ray did not start within {START_SECONDS} s:\n{self.log.read_text()}")

    def __exit__(self, *_exception) -> None:
        self.head.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        _kill(self.token, self.head.pid)
        self.head.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add_node(self, num_cpus: int) -> subprocess.Popen:
        """Starts a further node of the cluster, which ends with this process. Ray knows it a while later."""
        ports = free_ports(3)
        command = [
            *("ray", "start", f"--address={self.address}", "--block", "--node-ip-address=127.0.0.1"),
            *(f"--num-cpus={num_cpus}", f"--dashboard-agent-listen-port={ports[0]}", "--disable-usage-stats"),
            *(f"--dashboard-agent-grpc-port={ports[1]}", f"--metrics-export-port={ports[2]}"),
        ]
        with (self.folder / f"node-{ports[0]}.log").open("w") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def processes(self) -> list[psutil.Process]:
        """Returns every living process that was started in this cluster."""
        return _processes(self.token, self.head.pid)

    def run(self, command: list[str], **kwargs) -> subprocess.CompletedProcess:
        """Runs a command against the cluster, as `subprocess.run` does."""
        return subprocess.run(command, env=self.environment, **kwargs)


def end_abandoned() -> int:
    """Stops what is left of clusters whose programs were killed, and removes their folders. Returns how many."""
    ended = 0
    for file in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{OWNER}"):
        try:
            owner = json.loads(file.read_text())
            if psutil.pid_exists(owner["pid"]) and psutil.Process(owner["pid"]).create_time() == owner["started"]:
                continue  # it is up
        except (OSError, ValueError, KeyError, psutil.NoSuchProcess):  # somebody else's, or just being written
            continue
        sessions = set()
        for process in _processes(owner["token"]):
            with contextlib.suppress(ProcessLookupError):
                sessions.add(os.getsid(process.pid))
        # By now the number of the head's session may be another's.
        _kill(owner["token"], owner["session"] if owner["session"] in sessions else None)
        shutil.rmtree(file.parent, ignore_errors=True)
        ended += 1
    return ended


def _processes(token: str, session: int | None = None) -> list[psutil.Process]:
    """Returns a cluster's living processes.

    They are in the head's session, or have inherited its token: some start sessions of their own, others (those that
    set a title, as Ray's do) write it over their environment.
    """
    found = []
    for pid in set(psutil.pids()) - {os.getpid()}:
        try:
            inherited = token.encode() in Path(f"/proc/{pid}/environ").read_bytes()
            process = psutil.Process(pid)
            if (inherited or os.getsid(pid) == session) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.NoSuchProcess):  # gone meanwhile, or somebody else's
            continue
    return found


def _kill(token: str, session: int | None) -> None:
    for _attempt in range(5):  # a raylet that is still up may start an agent again
        left = _processes(token, session)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=STOP_SECONDS)


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports

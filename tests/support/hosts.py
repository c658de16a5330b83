"""Several machines of a network of their own, on this one: network namespaces with a raylet each."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

import psutil

from sere_dist.testing.namespaces import ip, processes_of

NETWORK = "10.93.17"
GCS_PORT = 6379  # nobody else is on that network
START_SECONDS = 300
# A node that does not answer for so long is lost, and a connection that is silent for so long is dead. Ray's defaults
# make that half a minute, and five.
PATIENCE = {
    **{f"RAY_health_check_{name}_ms": "1000" for name in ("period", "timeout", "initial_delay")},
    "RAY_health_check_failure_threshold": "3",
    **{f"RAY_grpc_client_keepalive_{name}_ms": "5000" for name in ("time", "timeout")},
}


class Hosts:
    """Hosts `0` to `count` - 1, each with an address of its own, joined by a switch. Host 0 is Ray's head without CPUs.

    Use as a context manager. `run` and `popen` run a command on a host; `environment` is what reaches the cluster. With
    `has_redis`, one host more runs `redis-server`, where the head keeps its state: one that is started again is the
    same.
    """

    def __init__(self, count: int, num_cpus: int = 1, has_redis: bool = False):
        self.count, self.num_cpus, self.has_redis = count, num_cpus, has_redis

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="sere-"))
        self.network = f"sere-{secrets.token_hex(3)}"
        self.token = secrets.token_hex(16)
        self.address = f"{self.ip(0)}:{GCS_PORT}"
        self.environment = {
            **os.environ,
            **PATIENCE,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.log = self.folder / "ray.log"
        try:
            self._join()
            if self.has_redis:
                self._start_redis()
            for host in range(self.count):
                self.start(host)
                self._wait(host + 1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def ip(self, host: int) -> str:
        return f"{NETWORK}.{host + 1}"

    def namespace(self, host: int | str) -> str:
        return f"{self.network}-{host}"

    def _join(self) -> None:
        switch = self.namespace("switch")
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        for host in range(self.count + self.has_redis):
            name, port = self.namespace(host), f"port{host}"
            ip("netns", "add", name)
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
            ip("-n", switch, "link", "set", port, "master", "switch", "up")
            ip("-n", name, "address", "add", f"{self.ip(host)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")

    def _start_redis(self) -> None:
        address = self.ip(self.count)
        command = ["redis-server", "--bind", address, "--protected-mode", "no", "--dir", str(self.folder), "--save", ""]
        self.popen(self.count, command, stdout=subprocess.DEVNULL)
        # Of the head: its state is there, and the others wait for it so long.
        self.environment |= {"RAY_REDIS_ADDRESS": f"{address}:6379", "RAY_gcs_rpc_server_reconnect_timeout_s": "600"}

    def start(self, host: int) -> None:
        """Starts Ray on a host."""
        head = ["--head", f"--port={GCS_PORT}", "--num-cpus=0", f"--temp-dir={self.folder}", "--dashboard-host=0.0.0.0"]
        worker = [f"--address={self.address}", f"--num-cpus={self.num_cpus}"]
        command = ["ray", "start", "--block", f"--node-ip-address={self.ip(host)}", *(worker if host else head)]
        if host == 0:  # it says that a head is up; the disk of another machine would not have it
            (self.folder / "ray_current_cluster").unlink(missing_ok=True)
        with self.log.open("a") as log:
            # vLLM's engines would look for their own address on the way to the internet, and there is none.
            self.popen(host, command, env={**self.environment, "VLLM_HOST_IP": self.ip(host)}, stdout=log, stderr=log)

    def kill(self, host: int) -> None:
        """Ends every process of a host at once."""
        for process in self.processes_of(host):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _wait(self, count: int) -> None:
        alive = "import ray; ray.init(logging_level='error'); print(sum(node['Alive'] for node in ray.nodes()))"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            done = self.run(0, [sys.executable, "-c", alive], capture_output=True, text=True)
            if done.stdout.strip() == str(count):
                return
        raise RuntimeError(f"host {count - 1} did not join within {START_SECONDS} s:\n{self.log.read_text()}")

    def command(self, host: int, command: list[str]) -> list[str]:
        """Returns the command that runs `command` on a host."""
        return ["ip", "netns", "exec", self.namespace(host), *command]

    def popen(self, host: int, command: list[str], **kwargs) -> subprocess.Popen:
        return subprocess.Popen(self.command(host, command), **{"env": self.environment, **kwargs})

    def run(self, host: int, command: list[str], **kwargs) -> subprocess.CompletedProcess:
        return subprocess.run(self.command(host, command), **{"env": self.environment, **kwargs})

    def cut_off(self, host: int) -> None:
        """Pulls the host's cable: what it sends and what it is sent is lost, and no connection is closed."""
        ip("-n", self.namespace("switch"), "link", "set", f"port{host}", "down")

    def processes_of(self, host: int) -> list[psutil.Process]:
        return processes_of(self.namespace(host))

    def processes(self) -> list[psutil.Process]:
        return [process for host in range(self.count + self.has_redis) for process in self.processes_of(host)]

    def __exit__(self, *_exception) -> None:
        for _attempt in range(5):  # what dies may be started again by what is still there
            left = self.processes()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        for host in (*range(self.count + self.has_redis), "switch"):
            with contextlib.suppress(OSError):
                ip("netns", "delete", self.namespace(host))
        shutil.rmtree(self.folder, ignore_errors=True)

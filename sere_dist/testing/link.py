"""Two hosts on this machine, and a link between them of any rate and delay.

The hosts are network namespaces. Each has a TUN device, and a process, the relay, carries the packets from one to the
other: it lets each wait as it would on the link. That is what `tc netem` does in kernels that have it; many have not,
and no other queue of theirs delays.

    python -m sere_dist.testing.link FIRST SECOND ORDERS   # the relay, started by `Link` with open files
"""

import contextlib
import fcntl
import math
import os
import secrets
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from sere_dist.testing import namespaces
from sere_dist.testing.namespaces import ip

NETWORK = "10.94.18"
MTU = 9000  # bytes of a packet, as between machines of a cluster; fewer packets are less work for the relay
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
HOSTS = (0, 1)


@dataclass
class Way:
    """One direction of the link: what waits on it, and when each packet arrives.

    Attributes:
        rate: bits per second; infinite: none waits for another.
        delay: seconds from when a packet has left to when it arrives.
    """

    rate: float = math.inf
    delay: float = 0.0
    free_at: float = 0.0  # when all packets so far have left
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)

    def enter(self, packet: bytes, now: float) -> None:
        """Queues a packet behind the others; `now` is in seconds of a clock that only rises."""
        self.free_at = max(self.free_at, now) + 8 * len(packet) / self.rate
        self.waiting.append((self.free_at + self.delay, packet))

    def next_at(self) -> float:
        """Returns when the next packet arrives; infinity where none is on its way."""
        return self.waiting[0][0] if self.waiting else math.inf


def relay(devices: tuple[int, int], orders: socket.socket) -> None:
    """Carries packets between two TUN devices, open files, until standard input ends.

    Orders are datagrams of two numbers, the rate and the delay from now on.
    """
    # Before all others: a packet that waits for a core would make the link slower than it says.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    ways = {devices[0]: (Way(), devices[1]), devices[1]: (Way(), devices[0])}
    while True:
        wait = min(way.next_at() for way, _ in ways.values()) - time.monotonic()
        timeout = None if math.isinf(wait) else max(wait, 0)
        ready, _, _ = select.select([*devices, orders, sys.stdin], [], [], timeout)
        if sys.stdin in ready:
            return
        if orders in ready:
            rate, delay = map(float, orders.recv(100).split())
            for way, _ in ways.values():
                way.rate, way.delay = rate, delay
        for device, (way, other) in ways.items():
            if device in ready:
                way.enter(os.read(device, MTU), time.monotonic())
            while way.next_at() <= time.monotonic():
                os.write(other, way.waiting.popleft()[1])


class Link:
    """Hosts 0 and 1, joined by a link that is as fast as the relay until `order` says otherwise.

    Use as a context manager: what runs on the hosts at the end is killed, and nothing of them remains.

    Raises:
        OSError: this process may not make network namespaces or TUN devices.
    """

    def __enter__(self) -> Self:
        if not namespaces.can_be_made():
            raise OSError("a link needs network namespaces: run as root, with iproute2 (`ip`) installed")
        self.network = f"sere-{secrets.token_hex(3)}"
        self.folder = Path(tempfile.mkdtemp(prefix="sere-"))
        self.orders = self.folder / "orders"
        self.relay: subprocess.Popen | None = None
        try:
            self._join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _join(self) -> None:
        with contextlib.ExitStack() as files:
            devices = []
            for host in HOSTS:
                name = self.namespace(host)
                device = files.enter_context(open("/dev/net/tun", "r+b", buffering=0))
                fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
                devices.append(device.fileno())
                ip("netns", "add", name)
                ip("link", "set", name, "netns", name, "name", "eth0", "mtu", str(MTU))
                ip("-n", name, "address", "add", self.address(host), "peer", self.address(1 - host), "dev", "eth0")
                for each in ("lo", "eth0"):
                    ip("-n", name, "link", "set", each, "up")
            orders = files.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            orders.bind(str(self.orders))
            passed = [*devices, orders.fileno()]
            command = [sys.executable, "-m", __name__, *map(str, passed)]
            # It ends with its standard input, so it does not outlive this process, however that ends.
            self.relay = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=passed)

    def namespace(self, host: int) -> str:
        return f"{self.network}-{host}"

    def address(self, host: int) -> str:
        return f"{NETWORK}.{host + 1}"

    def command(self, host: int, command: list[str]) -> list[str]:
        """Returns the command that runs `command` on a host."""
        return ["ip", "netns", "exec", self.namespace(host), *command]

    def __exit__(self, *_exception) -> None:
        left = [process for host in HOSTS for process in namespaces.processes_of(self.namespace(host))]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)
        if self.relay is not None:
            self.relay.communicate()  # which closes its standard input
        for host in HOSTS:
            with contextlib.suppress(OSError):
                ip("netns", "delete", self.namespace(host))
        self.orders.unlink(missing_ok=True)
        self.folder.rmdir()


def order(orders: Path | str, rate: float, delay: float) -> None:
    """Sets a link's rate (bits per second) and delay (seconds), in both directions, from any process and host.

    Args:
        orders: the link's `orders`.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(f"{rate} {delay}".encode(), str(orders))


if __name__ == "__main__":
    first, second, sock = map(int, sys.argv[1:])
    relay((first, second), socket.socket(fileno=sock))

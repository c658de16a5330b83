"""A link between two hosts: it takes as long as it should, and nothing of it remains."""

import subprocess
import sys

import psutil
import pytest

from sere_dist.testing.link import Link
from sere_dist.testing.namespaces import can_be_made, ip

pytestmark = pytest.mark.skipif(not can_be_made(), reason="network namespaces need root and iproute2")

SIZE = 100_000  # bytes
SERVE = """
import socket, sys
with socket.create_server((sys.argv[1], 5000)) as server:
    print("ready", flush=True)
    with server.accept()[0] as sent:
        while first := sent.recv(1):
            left = int(sys.argv[2]) - len(first)
            while left:
                left -= len(sent.recv(left))
            sent.sendall(b"!")
"""
# Sends as much over links of several speeds, and prints the seconds until the answer.
SEND = """
import socket, sys, time
from sere_dist.testing.link import order
address, size, orders, *speeds = sys.argv[1:]
with socket.create_connection((address, 5000)) as server:
    for speed in speeds:
        order(orders, *map(float, speed.split(",")))
        started = time.monotonic()
        server.sendall(bytes(int(size)))
        server.recv(1)
        print(time.monotonic() - started)
"""


def test_what_crosses_takes_as_long_as_the_rate_and_the_delay_say():
    with Link() as link:
        serve = link.command(0, [sys.executable, "-c", SERVE, link.address(0), str(SIZE)])
        server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        speeds = ("inf,0", "4e6,0", "inf,0.3", "4e6,0.3")
        send = link.command(1, [sys.executable, "-c", SEND, link.address(0), str(SIZE), str(link.orders), *speeds])
        printed = subprocess.run(send, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout
        fast, narrow, slow, both = map(float, printed.split())
        assert server.wait(10) == 0
        # The order itself may come a moment after the first packet.
        assert 0.15 < narrow < 0.2 + 0.5
        assert 0.6 < slow < 0.6 + 1.2  # there and back; TCP may wait for one more acknowledgement
        assert both > slow and both > narrow > fast
        # What still runs at the end is killed.
        forever = ["sh", "-c", "echo ready; exec sleep 600"]
        left = subprocess.Popen(link.command(1, forever), stdout=subprocess.PIPE, text=True)
        assert left.stdout is not None and left.stdout.readline() == "ready\n"
        folder, names = link.folder, [link.namespace(host) for host in (0, 1)]
    assert not psutil.pid_exists(left.pid)
    assert not folder.exists() and not any(name in ip("netns", "list") for name in names)

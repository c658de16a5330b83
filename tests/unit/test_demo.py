"""What the demo refuses before it starts anything."""

import socket

from examples import demo
from tests.support.commands import invoke


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = invoke(demo.main, "--port", str(port))
    assert done.exit_code == 1 and f"error: port {port} is in use" in done.output

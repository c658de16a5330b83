"""Serves the example model, and runs a command with the page's address and the admin token behind it.

    python -m tests.browser.served .venv-browser/bin/python tests/browser/try_page.py

Exits with the command's status.
"""

import subprocess
import sys

from examples.application import ROOT, TINY_MOE, calibrate, served
from examples.demo import WIDE, WIDTH
from examples.tiny_moe.widen import widen
from sere_dist.environment import ADMIN_TOKEN
from sere_dist.testing.local_cluster import LocalCluster, free_ports


def main(command: list[str]) -> int:
    with LocalCluster() as cluster:
        calibrate(cluster)
        with served(cluster, free_ports(1)[0], model=str(widen(TINY_MOE.model, WIDE, WIDTH))) as url:
            address = url.removesuffix("/v1") + "/"
            return subprocess.run([*command, address, cluster.environment[ADMIN_TOKEN]], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

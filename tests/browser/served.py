"""Serves the demo's model, and runs a command with the page's address and the admin token behind it.

    python -m tests.browser.served .venv-browser/bin/python tests/browser/try_page.py

Exits with the command's status.
"""

import subprocess
import sys

from examples.application import ROOT, SMOLLM2_MOE, calibrate, served
from examples.smollm2_moe.assemble import assemble_committed
from sere_dist.environment import ADMIN_TOKEN
from sere_dist.testing.local_cluster import LocalCluster, free_ports


def main(command: list[str]) -> int:
    assemble_committed(SMOLLM2_MOE.model)
    with LocalCluster() as cluster:
        calibrate(cluster, SMOLLM2_MOE)
        with served(cluster, free_ports(1)[0], SMOLLM2_MOE) as url:
            address = url.removesuffix("/v1") + "/"
            return subprocess.run([*command, address, cluster.environment[ADMIN_TOKEN]], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

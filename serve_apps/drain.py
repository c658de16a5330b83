"""Takes a node out of Ray Serve, and returns when no replica is left on it: what a pod runs before it ends.

    python -m serve_apps.drain --seconds 600

Ray Serve starts the node's replicas elsewhere, and lets the old ones finish the answers that they have begun.
"""

import logging
import subprocess
import time
from typing import Annotated

import ray
import typer
from ray.util.state import list_actors

from serve_apps.sere import LONGEST_ANSWER_SECONDS

LOOK_SECONDS = 2.0
REPLICA = "ServeReplica:"  # how the class names of Serve's replicas begin


def replicas_on(node_id: str) -> list[str]:
    """Returns the names of the living replicas on a node."""
    living = list_actors(filters=[("state", "=", "ALIVE"), ("node_id", "=", node_id)], limit=10_000)
    return sorted(actor.class_name for actor in living if actor.class_name.startswith(REPLICA))


def main(
    seconds: Annotated[int, typer.Option(help="Seconds until the node ends, whatever is left on it.", min=1)] = (
        LONGEST_ANSWER_SECONDS
    ),
    node_id: Annotated[
        str | None, typer.Option(help="Id of the node, from `ray list nodes`. By default the one that this runs on.")
    ] = None,
) -> None:
    """Take a node out of Ray Serve, and wait until no replica is left on it. The exit status is 1 if one is."""
    ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    context = ray.get_runtime_context()
    node_id = node_id or context.get_node_id()
    command = ["ray", "drain-node", "--address", context.gcs_address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "python -m serve_apps.drain"]
    deadline = time.monotonic() + seconds
    if subprocess.run([*command, "--deadline-remaining-seconds", str(seconds)]).returncode:
        raise SystemExit(f"error: Ray did not take the node {node_id} out")
    while (left := replicas_on(node_id)) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    if left:
        raise SystemExit(f"error: still on the node after {seconds} s: {', '.join(left)}")
    print(f"no replica is left on the node {node_id}")


if __name__ == "__main__":
    typer.run(main)

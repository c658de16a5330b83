"""Kills the processes of a deployment's replicas, on the cluster of this environment."""

import sys

import ray
from ray.util.state import list_actors

if __name__ == "__main__":
    ray.init(log_to_driver=False, logging_level="error", namespace="serve")
    alive = list_actors(filters=[("state", "=", "ALIVE")])
    names = [actor.name for actor in alive if f"#{sys.argv[1]}#" in (actor.name or "")]
    assert names, f"no replica of {sys.argv[1]} among {[actor.name for actor in alive]}"
    for name in names:
        ray.kill(ray.get_actor(name))

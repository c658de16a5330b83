"""Builds applications on the cluster of this environment: prints, for each, the options of its deployments."""

import json
import sys

import ray
from ray.serve._private.build_app import build_app as deployments_of

from serve_apps.sere import build_app


def options(application) -> dict[str, dict]:
    """Returns what Serve would deploy: deployment -> its options."""
    built = deployments_of(application, name="sere")
    described = {}
    for deployment in built.deployments:
        replicas = deployment.num_replicas if deployment._deployment_config.autoscaling_config is None else None
        bundles = deployment._replica_config.placement_group_bundles
        described[deployment.name] = {"num_replicas": replicas, "placement_group_bundles": bundles}
    return described


if __name__ == "__main__":
    ray.init(log_to_driver=False, logging_level="error")
    print(json.dumps({name: options(build_app(args)) for name, args in json.loads(sys.argv[1]).items()}))

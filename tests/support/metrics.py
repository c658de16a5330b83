"""What Prometheus would read of a cluster."""

import time
from collections.abc import Callable

import httpx
from prometheus_client.parser import text_string_to_metric_families

from sere_dist.testing.local_cluster import LocalCluster

OWN = ("rank", "when")  # labels that tell samples of one replica apart


def metrics(cluster: LocalCluster, **labels: str) -> dict[str, float]:
    """Returns the `ray_sere_` samples with these labels: name, then `when` and any rank but the first -> value."""
    text = httpx.get(f"http://127.0.0.1:{cluster.metrics_port}/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_sere_") and labels.items() <= sample.labels.items():
                own = [sample.labels[label] for label in reversed(OWN) if sample.labels.get(label, "0") != "0"]
                found[" ".join([sample.name, *own])] = sample.value
    return found


def eventually(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Returns once `holds` does; an error meanwhile counts as not yet."""
    deadline, error = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            if holds():
                return
            error = None
        except Exception as caught:
            error = caught
        time.sleep(1)
    raise AssertionError(f"not within {seconds} s") from error

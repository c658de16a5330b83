"""What Prometheus would read of a cluster."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from sere_dist.testing.local_cluster import LocalCluster

OWN = ("rank", "when")  # labels that tell samples of one replica apart


def metrics(cluster: LocalCluster, prefix: str = "ray_sere_", **labels: str) -> dict[str, float]:
    """Returns the samples with this prefix and these labels: name, then `when` and any rank but the first -> value."""
    text = httpx.get(f"http://127.0.0.1:{cluster.metrics_port}/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(prefix) and labels.items() <= sample.labels.items():
                own = [sample.labels[label] for label in reversed(OWN) if sample.labels.get(label, "0") != "0"]
                found[" ".join([sample.name, *own])] = sample.value
    return found

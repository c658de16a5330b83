"""What re-routing does, as Prometheus metrics beside Ray's and vLLM's own."""

from typing import Any

from ray.serve.metrics import Counter, Gauge

from sere_dist.config import RECOMMENDED
from sere_dist.method.counters import COUNTERS

DESCRIPTIONS = {
    "steps": "Steps of a layer, summed over layers, in which a row could be re-routed.",
    "rows": "Rows of those steps that could be.",
    "rerouted_slots": "Slots that went to another expert.",
    "critical_slots": "Slots that stayed because no active expert was similar enough.",
    "dropped_slots": "Slots that no expert computes any more.",
    "active_experts": "Experts that a step of a layer runs; over sere_steps: their mean.",
    "largest_rank": "Of those, the ones on the rank that has most.",
    "domains": "Ranks (or nodes) that a token's experts are on.",
    "remote_domains": "Those of them that are not the token's own.",
    "remote_slots": "Slots whose expert is not in the token's own domain.",
}
SETTINGS = {
    "enabled": "Whether re-routing is on.",
    "select_top_k": "S: experts that every token keeps.",
    "threshold": "rho: an expert with no active substitute this similar stays.",
    "expert_price": "The error that one expert less to run is worth.",
    "traffic_price": "The error that one domain less to visit is worth.",
    "min_rows": "Steps in which fewer rows could be re-routed are left alone.",
}


class ReroutingMetrics:
    """A replica's: counters as in `rerouting.COUNTERS`, gauges of the settings, and one that names the artifact.

    Pairs of counters, before and after re-routing, are one metric with the label `when`. Counters have the labels
    `model` and `rank`, all metrics those that Ray Serve adds: application, deployment, replica.
    """

    def __init__(self, model: str, artifact: dict[str, str]):
        """`artifact` has labels of `sere_info`: `artifact` and `method`."""
        self.model, self.artifact = model, artifact
        self.seen: dict[tuple[int, str], int] = {}  # (rank, counter) -> its total when last read
        self.counters = {}
        for name, description in DESCRIPTIONS.items():
            is_pair = f"{name}_before" in COUNTERS
            labels = ("model", "rank", "when") if is_pair else ("model", "rank")
            counter = Counter(f"sere_{name}", description, labels)
            self.counters |= {f"{name}_{when}": (counter, {"when": when}) for when in ("before", "after") if is_pair}
            self.counters |= {} if is_pair else {name: (counter, {})}
        self.settings = {name: Gauge(f"sere_{name}", description, ("model",)) for name, description in SETTINGS.items()}
        self.info = Gauge(
            "sere_info", "1; the artifact and policy are its labels.", ("model", "artifact", "method", "policy")
        )

    def update(self, workers: list[dict[str, Any]], settings: dict[str, Any]) -> None:
        """Takes what `sere_counters` returned for every worker, and what `sere_settings` did for one."""
        for worker in workers:
            for name, (counter, labels) in self.counters.items():
                total = sum(layer[name] for layer in worker["layers"].values())
                place = worker["rank"], name
                before = self.seen.get(place, 0)
                added = total - before if total >= before else total  # they were set to 0 meanwhile
                self.seen[place] = total
                if added:
                    counter.inc(added, {"model": self.model, "rank": str(worker["rank"]), **labels})
        is_recommended = settings["policy"] == "recommended"  # some settings differ from layer to layer
        for name, gauge in self.settings.items():
            if is_recommended and name in RECOMMENDED:
                continue
            gauge.set(float(settings[name]), {"model": self.model})
        self.info.set(1, {"model": self.model, "policy": settings["policy"], **self.artifact})

"""What re-routing does, as Prometheus metrics beside Ray's and vLLM's own; and what a replica's clients wait for."""

import math
from collections import Counter as Totals
from collections import defaultdict
from typing import Any

from ray.serve.metrics import Counter, Gauge
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats

from sere_dist.artifact.recommendation import KlEstimate
from sere_dist.config import RECOMMENDED, ReroutingConfig
from sere_dist.method.counters import COUNTERS

DESCRIPTIONS = {
    "steps": "Steps in which a row could be re-routed, summed over layers.",
    "rows": "Rows of those steps that could be re-routed.",
    "rerouted_slots": "Slots that were sent to another expert.",
    "critical_slots": "Slots that kept their expert because no active expert was similar enough.",
    "dropped_slots": "Slots that were dropped, so that no expert computes them.",
    "merged_slots": "Slots that were added to an earlier slot of the same token and expert.",
    "active_experts": "Experts that run for these rows, summed over layers and steps. Divided by steps_total, it is "
    "the mean.",
    "largest_rank": "Experts that the rank with most of them runs for these rows, summed over the steps.",
    "domains": "Domains (ranks or nodes) that hold a token's experts, summed over the tokens.",
    "remote_domains": "Domains of a token's experts other than its own, summed over the tokens.",
    "remote_slots": "Slots whose expert is in another domain than the token.",
    "estimated_error": "Squared error that re-routing is estimated to make, in the unit of the prices, summed over "
    "rows and layers. It is 0 under the paper's policy, which has no estimate.",
}
SHADOW_DESCRIPTIONS = {
    "shadow_kl": "KL divergence that re-routing made in the steps of shadow checks, nats, summed over their re-routed "
    "rows. Divided by shadow_rows_total, it is nats per token.",
    "shadow_rows": "Re-routed rows of the steps of shadow checks.",
}
KL_DESCRIPTIONS = {
    "estimated_kl": "KL divergence that re-routing is estimated to cost, nats per token, since the last report: as the "
    "tuning of the artifact found it, with one standard deviation as `low` and `high`.",
    "tuned_kl": "KL divergence that the recommended settings had on the held-out texts of the tuning, nats per token. "
    "It is there under policy `recommended`.",
}
REQUEST_DESCRIPTIONS = {
    "requests": "Requests for an answer that the ingress let in, by what opted them out of re-routing: `key`, "
    "`header`, `body`, or `nothing`.",
}
SETTINGS = (
    "enabled",
    "select_top_k",
    "threshold",
    "expert_price",
    "traffic_price",
    "balance_price",
    "min_rows",
    "share",
    "shadow_share",
)


class ReroutingMetrics:
    """A replica's: counters as in `counters.COUNTERS`, gauges of the settings, and one that names the artifact.

    Pairs of counters, before and after re-routing, are one metric with the label `when`. Counters have the labels
    `model`, `rank` and `drafts`, all metrics those that Ray Serve adds: application, deployment, replica.
    """

    def __init__(
        self,
        model: str,
        artifact: dict[str, str],
        kl_estimate: KlEstimate | None = None,
        tuned_kl: float | None = None,
    ):
        """`artifact` has labels of `sere_info`: `artifact` and `method`. Of the gauges of KL divergence, those stay
        unset of which nothing is given."""
        self.model, self.artifact, self.kl_estimate, self.tuned_kl = model, artifact, kl_estimate, tuned_kl
        self.seen: dict[tuple[int, str, str], float] = {}  # (rank, counter, drafts) -> its total when last read
        self.counters = {}
        for name, description in DESCRIPTIONS.items():
            is_pair = f"{name}_before" in COUNTERS
            labels = ("model", "rank", "drafts", *(("when",) if is_pair else ()))
            # Ray Serve's annotation of labels is a tuple of one.
            counter = Counter(f"sere_{name}", description, labels)  # ty: ignore[invalid-argument-type]
            self.counters |= {f"{name}_{when}": (counter, {"when": when}) for when in ("before", "after") if is_pair}
            self.counters |= {} if is_pair else {name: (counter, {})}
        fields = ReroutingConfig.model_fields
        self.settings = {name: Gauge(f"sere_{name}", fields[name].description or "", ("model",)) for name in SETTINGS}
        self.shadow = {
            name: Counter(f"sere_{name}", description, ("model", "rank"))  # ty: ignore[invalid-argument-type]
            for name, description in SHADOW_DESCRIPTIONS.items()
        }
        of_bounds, about = ("model", "bound"), KL_DESCRIPTIONS
        self.estimated = Gauge("sere_estimated_kl", about["estimated_kl"], of_bounds)  # ty: ignore[invalid-argument-type]
        self.tuned = Gauge("sere_tuned_kl", about["tuned_kl"], ("model",))
        self.info = Gauge(
            "sere_info",
            "Always 1. Its labels name the artifact and the policy.",
            ("model", "artifact", "method", "policy"),  # ty: ignore[invalid-argument-type]  # as above
        )

    def update(self, workers: list[dict[str, Any]], settings: dict[str, Any]) -> None:
        """Takes what `sere_counters` returned for every worker, and what `sere_settings` did for one."""
        recent: defaultdict[str, float] = defaultdict(float)
        for worker in workers:
            for name, (counter, labels) in self.counters.items():
                total = sum(layer[name] for layer in worker["layers"].values())
                verifying = sum(layer.get("verifying", {}).get(name, 0) for layer in worker["layers"].values())
                for drafts, counted in (("none", total - verifying), ("verified", verifying)):
                    added = self._added((worker["rank"], name, drafts), counted)
                    recent[name] += added
                    if added:
                        own = {"model": self.model, "rank": str(worker["rank"]), "drafts": drafts, **labels}
                        counter.inc(added, own)
            for name, counted in of_shadow(worker).items():
                if added := self._added((worker["rank"], name, ""), counted):
                    self.shadow[name].inc(added, {"model": self.model, "rank": str(worker["rank"])})
        if self.kl_estimate is not None and recent["rows"]:
            kl, spread = self.kl_estimate.of(recent["estimated_error"], recent["rows"]), self.kl_estimate.spread
            for bound, value in (("low", kl / spread), ("estimate", kl), ("high", kl * spread)):
                self.estimated.set(value, {"model": self.model, "bound": bound})
        is_recommended = settings["policy"] == "recommended"  # some settings differ from layer to layer
        if is_recommended and self.tuned_kl is not None:
            self.tuned.set(self.tuned_kl, {"model": self.model})
        for name, gauge in self.settings.items():
            if settings[name] is None or (is_recommended and name in RECOMMENDED):
                continue
            gauge.set(float(settings[name]), {"model": self.model})
        self.info.set(1, {"model": self.model, "policy": settings["policy"], **self.artifact})

    def _added(self, place: tuple[int, str, str], counted: float) -> float:
        """Returns what is new in a counter since it was last read."""
        before = self.seen.get(place, 0)
        self.seen[place] = counted
        return counted - before if counted >= before else counted  # it was set to 0 meanwhile


class RequestMetrics:
    """An ingress's counter of requests. Ray Serve adds the labels application, deployment and replica."""

    def __init__(self, model: str):
        self.model = model
        labels = ("model", "opted_out_by")
        self.counter = Counter("sere_requests", REQUEST_DESCRIPTIONS["requests"], labels)  # ty: ignore[invalid-argument-type]

    def count(self, opted_out_by: str | None) -> None:
        self.counter.inc(1, {"model": self.model, "opted_out_by": opted_out_by or "nothing"})


def of_shadow(worker: dict[str, Any]) -> dict[str, float]:
    """Returns what a worker's shadow checks have counted, by the names of `SHADOW_DESCRIPTIONS`; none without them."""
    return {f"shadow_{name}": total for name, total in worker.get("shadow", {}).items()}


def totals_of(workers: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the counters of `counters.COUNTERS` and of shadow checks, summed over workers and layers, of what
    `sere_counters` returned."""
    totals: Totals[str] = Totals()
    for worker in workers:
        totals.update(of_shadow(worker))
        for layer in worker["layers"].values():
            totals.update({name: layer[name] for name in COUNTERS})
    return dict(totals)


class Latencies(AggregateStatLoggerBase):
    """Seconds that the requests of an engine waited for their first token and for each further one, in total; how many
    of these tokens there were, and of the further ones, how many took longer than `slow_ms`; and the requests that
    waited to run, summed over the engine's steps. vLLM calls `record` for every step."""

    def __init__(self, slow_ms: float | None = None):
        self.slow_s = math.inf if slow_ms is None else slow_ms / 1000
        names = ("first_tokens", "first_token_s", "next_tokens", "next_token_s", "slow_tokens")
        self.totals = dict.fromkeys((*names, "engine_steps", "waiting_requests"), 0.0)

    def record(self, scheduler_stats: Any, iteration_stats: IterationStats | None, *_args: Any, **_kwargs: Any) -> None:
        if scheduler_stats is not None:
            self.totals["engine_steps"] += 1
            self.totals["waiting_requests"] += scheduler_stats.num_waiting_reqs
        if iteration_stats is None:
            return
        self.totals["slow_tokens"] += sum(took > self.slow_s for took in iteration_stats.inter_token_latencies_iter)
        for kind, seconds in (
            ("first", iteration_stats.time_to_first_tokens_iter),
            ("next", iteration_stats.inter_token_latencies_iter),
        ):
            self.totals[f"{kind}_tokens"] += len(seconds)
            self.totals[f"{kind}_token_s"] += sum(seconds)

    def log_engine_initialized(self) -> None:
        """Says nothing."""

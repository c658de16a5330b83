"""The Grafana dashboard: it shows what our replicas and vLLM really export, and loads beside Ray's own."""

import inspect
import itertools
import json
import re

import pytest
from ray.dashboard.modules.metrics import grafana_dashboard_factory
from vllm.v1.metrics import loggers
from vllm.v1.spec_decode import metrics as speculation

from examples.application import ROOT
from sere_dist.artifact.recommendation import KlEstimate
from sere_dist.config import ReroutingConfig
from sere_dist.method.counters import COUNTERS
from serve_apps import metrics

DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "sere_dashboard.json").read_text())
PANELS = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]
VARIABLES = DASHBOARD["templating"]["list"]
QUERIES = [variable["definition"] for variable in VARIABLES if variable["type"] == "query"]
GENERATE = [make for name, make in vars(grafana_dashboard_factory).items() if name.startswith("generate_")]


def named(prefix: str) -> set[str]:
    return set(re.findall(rf"\b{prefix}\w+", " ".join(EXPRESSIONS)))


@pytest.fixture
def exported(monkeypatch) -> dict[str, tuple[str, ...]]:
    """What the metrics of replicas and of an ingress declare, by their names in Prometheus: their labels."""
    declared = {}

    def declare(suffix: str):
        return lambda name, _description, labels: declared.setdefault(f"ray_{name}{suffix}", labels)

    monkeypatch.setattr(metrics, "Counter", declare("_total"))
    monkeypatch.setattr(metrics, "Gauge", declare(""))
    metrics.ReroutingMetrics("tiny-moe", {"artifact": "0fceb5430c7d", "method": "frobenius"})
    metrics.RequestMetrics("tiny-moe")
    return declared


@pytest.fixture
def seen(monkeypatch) -> dict[str, float]:
    """What gauges were set to last, by their names, and by the bound if they have several."""
    values = {}

    class Gauge:
        def __init__(self, name, *_):
            self.name = name

        def set(self, value, labels):
            bound = labels.get("bound")
            values[self.name if bound is None else f"{self.name} {bound}"] = value

    monkeypatch.setattr(metrics, "Gauge", Gauge)
    return values


def test_what_differs_from_layer_to_layer_is_not_shown_as_one_number(seen):
    ours = metrics.ReroutingMetrics("tiny-moe", {"artifact": "0fceb5430c7d", "method": "frobenius"})
    ours.update([], ReroutingConfig(artifact="a", policy="recommended", min_rows=3).model_dump(mode="json"))
    assert seen == {"sere_enabled": 1, "sere_min_rows": 3, "sere_share": 1, "sere_info": 1}
    ours.update([], ReroutingConfig(artifact="a", select_top_k=3, shadow_share=0.1).model_dump(mode="json"))
    assert seen.keys() == {f"sere_{name}" for name in (*metrics.SETTINGS, "info")} and seen["sere_select_top_k"] == 3


def test_estimated_errors_become_a_kl_divergence(seen):
    """Two workers of a model with 3 layers, of which a report sees what is new since the one before."""
    about = {"artifact": "0fceb5430c7d", "method": "projection"}
    ours = metrics.ReroutingMetrics("tiny-moe", about, KlEstimate(nats=0.5, spread=2.0, layers=3))
    settings = ReroutingConfig(artifact="a", policy="projection", select_top_k=1).model_dump(mode="json")

    def report(rows: int, error: float) -> list[float | None]:
        layer = dict.fromkeys(COUNTERS, 0) | {"rows": rows, "estimated_error": error}
        ours.update([{"rank": rank, "layers": {0: layer, 1: layer, 2: layer}} for rank in range(2)], settings)
        return [seen.get(f"sere_estimated_kl {bound}") for bound in ("low", "estimate", "high")]

    assert report(0, 0.0) == [None, None, None]
    assert report(10, 1.0) == pytest.approx([0.075, 0.15, 0.3])  # 0.1 per row and layer, three layers, half a nat
    assert report(10, 1.0) == pytest.approx([0.075, 0.15, 0.3])  # nothing was decoded since
    assert report(20, 4.0) == pytest.approx([0.225, 0.45, 0.9])


def test_shadow_checks_are_reported(seen, monkeypatch):
    """By rank, where one of two has the logits; and what the tuning measured, for the settings that it recommends."""
    added = []

    class Counter:
        def __init__(self, name, *_):
            self.name = name

        def inc(self, value, labels):
            added.append((self.name, labels["rank"], value))

    monkeypatch.setattr(metrics, "Counter", Counter)
    ours = metrics.ReroutingMetrics("tiny-moe", {"artifact": "0fceb5430c7d", "method": "frobenius"}, tuned_kl=0.03)

    def report(policy: dict, *counted: tuple[float, int]) -> list[tuple]:
        added.clear()
        workers = [
            {"rank": rank, "layers": {}, "shadow": {"kl": kl, "rows": rows}} for rank, (kl, rows) in enumerate(counted)
        ]
        ours.update(workers, ReroutingConfig(artifact="a", shadow_share=0.1, **policy).model_dump(mode="json"))
        return list(added)

    by_hand, recommended = {"select_top_k": 3}, {"policy": "recommended"}
    assert report(by_hand, (0.5, 8), (0.0, 0)) == [("sere_shadow_kl", "0", 0.5), ("sere_shadow_rows", "0", 8)]
    assert seen["sere_shadow_share"] == 0.1 and "sere_tuned_kl" not in seen
    assert report(recommended, (0.75, 12), (0.0, 0)) == [("sere_shadow_kl", "0", 0.25), ("sere_shadow_rows", "0", 4)]
    assert seen["sere_tuned_kl"] == 0.03
    assert metrics.totals_of([{"layers": {}, "shadow": {"kl": 0.75, "rows": 12}}, {"layers": {}}]) == {
        "shadow_kl": 0.75,
        "shadow_rows": 12,
    }


def test_every_metric_of_ours_is_shown_and_no_other(exported):
    named_by = (metrics.DESCRIPTIONS, metrics.SHADOW_DESCRIPTIONS, metrics.KL_DESCRIPTIONS, metrics.SETTINGS, ["info"])
    assert len(exported) == sum(map(len, (*named_by, metrics.REQUEST_DESCRIPTIONS)))
    assert named("ray_sere_") == exported.keys()


def test_expressions_group_by_labels_that_the_metrics_have(exported):
    for expression in EXPRESSIONS:
        for by, metric in re.findall(r"by \(([^)]*)\) \((?:rate\()?(ray_sere_\w+)", expression):
            assert set(by.split(", ")) <= {"replica", *exported[metric]}, expression


def test_every_metric_of_vllm_is_one_that_it_defines():
    sources = inspect.getsource(loggers) + inspect.getsource(speculation)
    defined = {f"ray_vllm_{name}" for name in re.findall(r'"vllm:(\w+)"', sources)}
    shown = {re.sub("_(bucket|total)$", "", name) for name in named("ray_vllm_")}
    assert len(shown) > 5 and shown <= defined


def test_variables_are_defined():
    used = set(re.findall(r"\$(\w+)", " ".join(EXPRESSIONS + QUERIES))) - {"__rate_interval"}
    assert used == {variable["name"] for variable in VARIABLES} - {"datasource"}
    asking = [each for each in PANELS + VARIABLES if each["type"] not in ("row", "datasource")]
    assert all(each["datasource"] == "${datasource}" for each in asking)


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in itertools.combinations((panel["gridPos"] for panel in PANELS), 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)


def test_it_loads_beside_rays_own():
    """Ray's dashboards lie in the same folder: same structure, another title and uid."""
    rays = [json.loads(generate()[0]) for generate in GENERATE]
    assert len(rays) > 5
    assert not {DASHBOARD["title"], DASHBOARD["uid"]} & {each[name] for each in rays for name in ("title", "uid")}
    serve_llm = next(each for each in rays if each["title"] == "Serve LLM Dashboard")
    assert DASHBOARD.keys() <= serve_llm.keys()
    assert DASHBOARD["schemaVersion"] == serve_llm["schemaVersion"]
    assert VARIABLES[0] == serve_llm["templating"]["list"][0]  # the data source

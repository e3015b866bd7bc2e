"""The Grafana dashboard: what its queries ask for is what endpoints and runs export, and its panels stand as Grafana wants them."""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import AsyncIterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.desired import AdapterReport, ReplicaReport
from serve.metrics import Metrics
from serve.parts import Part, Started
from service.training.exported import AWAY, AWAY_LABELS, COUNTERS, GAUGES, LABELS

FILE = Path(__file__).resolve().parents[2] / "k8s" / "components" / "monitoring" / "grafana-dashboard.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]


# As Ray shows a run's figures: tests/integration/test_metrics_port.py sees these very names on a node.
TRAINING = {
    **{f"ray_{name}": set(LABELS) for name in GAUGES},
    **{f"ray_{name}_total": set(LABELS) for name in COUNTERS},
    f"ray_{AWAY}": set(AWAY_LABELS),
}


class Stream:
    """Two tokens, then the end."""

    async def __aiter__(self) -> AsyncIterator[Part]:
        for part in (Part(0, "a", 1), Part(0, "b", 1, "stop")):
            yield part

    def cancel(self) -> None: ...


async def _read(metrics: Metrics) -> None:
    async for _ in metrics.observed(Stream(), Started("m@1", "d", 1), ("m@1", "m", "one"), since=0.0):
        pass


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Every series that an endpoint exports once each thing has happened, and those of a run, with their labels."""
    metrics = Metrics()
    asyncio.run(_read(metrics))
    metrics.keyless("m")
    metrics.refused(404)
    adapters = {"d": AdapterReport(model="m@1", state="resident")}
    report = ReplicaReport(replica="r", heartbeat_at=0.0, epoch=1, base_digest="b", adapters=adapters)
    labels: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(metrics.text([report]).decode()):
        for sample in family.samples:
            labels[sample.name] |= set(sample.labels)
    return {**labels, **TRAINING}


def asked(query: str) -> tuple[list[str], set[str]]:
    """The series and the labels that a query names: in selectors and in `by (...)`."""
    labels = {name for group in re.findall(r"\bby \(([^)]*)\)", query) for name in re.split(r",\s*", group)}
    for selector in re.findall(r"\{([^}]*)\}", query):
        labels |= set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', selector))
    return re.findall(r"\b(?:ray_)?loray_\w+", query), labels


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_series_and_labels_that_are_exported(query: str, exported: dict[str, set[str]]) -> None:
    names, labels = asked(query)
    assert names, "it asks for something"
    for name in names:
        assert name in exported, name
        assert labels <= exported[name], (name, labels - exported[name])
    for name in re.findall(r"(loray_\w+)(?:\{[^}]*\})?\[", query):
        assert name.endswith(("_total", "_bucket")), f"rate() is for what only grows, {name} does not"
    assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
    legends = [t["legendFormat"] for p in PANELS for t in p.get("targets", []) if t["expr"] == query]
    kept = labels if "by (" in query else labels | exported[names[0]]
    assert set(re.findall(r"\{\{(\w+)\}\}", " ".join(legends))) <= kept, "the legend's labels are left by the query"


def test_every_exported_series_is_shown(exported: dict[str, set[str]]) -> None:
    shown = {name for query in QUERIES for name in asked(query)[0]}
    derived = ("_created", "_sum", "_count")
    assert {name for name in exported if not name.endswith(derived)} <= shown


def test_the_variables_ask_for_what_is_exported(exported: dict[str, set[str]]) -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variables["model"]["query"]["query"]).groups()  # type: ignore[union-attr]
    assert label in exported[name]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS))) - {"__rate_interval"}
    assert used == set(variables)


def test_grafana_can_import_it() -> None:
    """The fields of the classic model: https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/"""
    assert "id" not in DASHBOARD, "an id would be another installation's"
    for field, kind in {"uid": str, "title": str, "schemaVersion": int, "time": dict, "templating": dict}.items():
        assert isinstance(DASHBOARD[field], kind), field
    assert len(DASHBOARD["uid"]) <= 40
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["title"] and panel["type"] in ("row", "stat", "timeseries")
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["h"] > 0
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert [target["refId"] for target in panel["targets"]] == ["A", "B", "C"][: len(panel["targets"])]
            for one in (panel, *panel["targets"]):
                assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for a, b in combinations((panel["gridPos"] for panel in PANELS), 2):
        apart = (a["x"] + a["w"] <= b["x"], b["x"] + b["w"] <= a["x"], a["y"] + a["h"] <= b["y"], b["y"] + b["h"] <= a["y"])  # fmt: skip
        assert any(apart), (a, b)
    assert all(one["gridPos"]["y"] <= other["gridPos"]["y"] for one, other in pairwise(PANELS))

"""Alerts: PromQL that parses, asks for what endpoints and runs export, and says what to do first."""

from __future__ import annotations

import re
from typing import Any

import promql_parser
import pytest
import yaml

from tests.k8s.conftest import K8S
from tests.unit.test_dashboard import asked, exported

__all__ = ["exported"]  # a fixture

FILE = K8S / "components" / "monitoring" / "alerts.yaml"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(FILE.read_text())["spec"]["groups"] for rule in group["rules"]
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_is_exported_and_says_what_to_do(
    rule: dict[str, Any], exported: dict[str, set[str]]
) -> None:
    promql_parser.parse(rule["expr"])
    names, labels = asked(rule["expr"])
    assert names, "it asks for something"
    for name in names:
        assert labels <= exported[name], (name, labels - exported[name])
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"] and rule["annotations"]["runbook"]
    assert f"{rule['alert']}" in (K8S / "README.md").read_text(), "the README's table has it"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_no_alert_asks_how_fast_a_count_of_a_run_grows(rule: dict[str, Any]) -> None:
    """Ray shows a counter from its first event on, and the next attempt's driver begins another: neither is an increase."""
    grows = re.findall(r"\b(?:i?rate|i?delta|increase|resets|changes)\(\s*(\w+)", rule["expr"])
    assert [name for name in grows if name.startswith("ray_")] == []
    assert not re.search(r"\bray_\w+_total\b", rule["expr"])


def test_a_query_that_does_not_parse_would_be_seen() -> None:
    with pytest.raises(ValueError, match="unclosed"):
        promql_parser.parse("sum(rate(loray_requests_total[5m])")

"""Dashboards, alerts, autoscalers and docs use metrics and labels that the services emit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace import errors
from tests.deploy import tools
from tests.deploy.queries import (
    DASHBOARDS,
    RULES,
    TARGET_LABELS,
    Query,
    alerts,
    all_queries,
    groupings,
    labels_of,
    selectors,
    values_by_label,
)
from tests.deploy.rendering import combined, of_kind
from tests.deploy.tools import ROOT

QUERIES = all_queries()
REASONS = {
    kind.reason
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.HeadraceError)
}
SERVICES = {"headrace-gateway", "headrace-router", "headrace-batcher", "headrace-worker"}


def problems(query: str) -> list[str]:
    """Return what is wrong with the names in a query."""
    found, known = [], {"error_type": REASONS, "service_name": SERVICES} | values_by_label()
    selected: set[str] = set()
    for selector in selectors(query):
        for name in selector.names:
            labels = labels_of(name)
            if labels is None:
                found.append(f"no metric {name}")
                continue
            selected |= labels
            found += [f"{name} has no label {label}" for label, _ in selector.matchers if label not in labels]
        for label, values in selector.matchers:
            if label in known and not values[0].startswith("$"):
                found += [f"{label} is never {value}" for value in values if value not in known[label]]
    return found + [f"nothing has the label {label}" for label in groupings(query) - selected]


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_every_name_in_a_query_is_emitted(query: Query) -> None:
    assert selectors(query.text)
    assert problems(query.text) == []


def test_a_wrong_name_in_a_query_is_found() -> None:
    """The test above can fail."""
    assert problems('rate(headrace_request_total{headrace_tier="a"}[5m])') == [
        "no metric headrace_request_total"
    ]
    assert problems("sum by (le) (headrace_batch_size)") == [
        "no metric headrace_batch_size",
        "nothing has the label le",
    ]
    assert problems('headrace_cost_total{headrace_state="ready"}') == [
        "headrace_cost_total has no label headrace_state"
    ]
    assert problems('headrace_workers{headrace_state="redy"}') == ["headrace_state is never redy"]
    assert problems('sum({__name__=~"headrace_queue_depth|headrace_queue_size"})') == [
        "no metric headrace_queue_size"
    ]
    assert problems('headrace_requests_total{error_type="NO_WORKER"}') == ["error_type is never NO_WORKER"]
    assert problems("up / on (namespace) headrace_calls_in_flight") == []


def test_all_places_of_queries_are_read() -> None:
    places = {str(query).partition(":")[0] for query in QUERIES}

    assert {path.stem for path in DASHBOARDS} == {"service", "tiers"} <= places
    assert {"tier", "to-zero"} <= places
    assert len(QUERIES) > 70


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_laid_out_and_explained(path: Path) -> None:
    board: dict[str, Any] = json.loads(path.read_text())
    taken: dict[tuple[int, int], str] = {}
    variables = {f"${{{each['name']}}}" for each in board["templating"]["list"]}
    for variable in board["templating"]["list"][1:]:
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
        assert asked is not None
        assert problems(f"sum by ({asked[2]}) ({asked[1]})") == []
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for cell in (
            (x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
        ):
            assert cell not in taken, (panel["title"], taken.get(cell))
            taken[cell] = panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"]["uid"] in variables
        for target in panel["targets"]:
            by, legend = groupings(target["expr"]), set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert by - {"le"} <= legend | {"headrace_tier"}, "lines of a panel can be told apart"
            assert legend <= by | TARGET_LABELS | {"headrace_tier"}

    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert len({panel["title"] for panel in board["panels"]}) == len(board["panels"])


def test_every_alert_says_what_it_means_and_what_to_do() -> None:
    page = (ROOT / "docs" / "alerts.md").read_text()
    headings = re.findall(r"^### (\w+)$", page, re.MULTILINE)

    assert headings == [alert["alert"] for alert in alerts()]
    for alert in alerts():
        name, notes = alert["alert"], alert["annotations"]
        assert set(notes) == {"summary", "description", "runbook_url"}, name
        assert notes["runbook_url"] == f"docs/alerts.md#{name.lower()}"
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        shown = set(re.findall(r"\$labels\.(\w+)", " ".join(notes.values())))
        known = set().union(*(labels_of(name) or () for s in selectors(alert["expr"]) for name in s.names))
        assert shown <= known, name


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """The cases are in tests.yaml beside the rules; each alert has one in which it fires, and one without."""
    promtool = tools.need("promtool")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(yaml.safe_load(RULES.read_text())["spec"]))
    cases = RULES.with_name("tests.yaml")
    shutil.copy(cases, tmp_path)
    for command in ("check rules --lint=all --lint-fatal rules.yaml", "test rules tests.yaml"):
        done = subprocess.run(
            [promtool, *command.split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    expected: dict[str, set[bool]] = {}
    for case in yaml.safe_load(cases.read_text())["tests"]:
        for check in case["alert_rule_test"]:
            expected.setdefault(check["alertname"], set()).add(bool(check.get("exp_alerts")))
    assert expected == {alert["alert"]: {True, False} for alert in alerts()}


def test_the_component_deploys_dashboards_and_alerts(tmp_path: Path) -> None:
    found = combined(tmp_path, ["telemetry"])

    boards = [
        each
        for each in of_kind(found, "ConfigMap").values()
        if each["metadata"].get("labels", {}).get("grafana_dashboard")
    ]
    assert {name for board in boards for name in board["data"]} == {path.name for path in DASHBOARDS}
    assert list(of_kind(found, "PrometheusRule")) == ["headrace"]
    (monitored,) = of_kind(found, "PodMonitor").values()
    (relabelled,) = monitored["spec"]["podMetricsEndpoints"][0]["relabelings"]
    jobs = {
        value for q in QUERIES for s in selectors(q.text) for label, value in s.matchers if label == "job"
    }
    assert jobs == {(relabelled["replacement"],)}

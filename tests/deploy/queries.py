"""Collect the PromQL queries of dashboards, alerts, autoscalers and docs, and read the names in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from headrace.metrics.catalogue import METRICS
from tests.deploy.settings_files import K8S
from tests.deploy.tools import ROOT

TELEMETRY = K8S / "components" / "telemetry"
DASHBOARDS = sorted((TELEMETRY / "dashboards").glob("*.json"))
RULES = TELEMETRY / "rules" / "rules.yaml"
AUTOSCALING = K8S / "components" / "autoscaling"
# Added by Prometheus when it scrapes, and by our endpoint to each series.
TARGET_LABELS = {"namespace", "pod", "instance", "job", "service_name"}

_SELECTOR = re.compile(r"(?<![\w$])(?P<name>[a-z_:]+)?\{(?P<matchers>[^}]*)\}")
_MATCHER = re.compile(r'\s*(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"\s*(?:,|$)')
_GROUPING = re.compile(r"\b(?:by|on|group_left|group_right|without|ignoring)\s*\(([^)]*)\)")
_BARE = re.compile(r"(?<![\w$])((?:headrace|gen_ai|rpc|process)_\w+)(?!\w|\s*[{(])")


@dataclass(frozen=True)
class Query:
    """A PromQL expression and where it stands."""

    place: str
    text: str

    def __str__(self) -> str:
        return self.place


@dataclass(frozen=True)
class Selector:
    """The series that a part of a query selects: names of metrics, and the values of each matched label."""

    names: tuple[str, ...]
    matchers: tuple[tuple[str, tuple[str, ...]], ...]


def all_queries() -> list[Query]:
    """Return the queries of dashboards, alerts, autoscalers and docs/metrics.md."""
    return [*dashboard_queries(), *alert_queries(), *autoscaler_queries(), *documented_queries()]


def dashboard_queries() -> Iterator[Query]:
    """Return the queries of the panels."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield Query(f"{path.stem}: {panel['title']} {target['refId']}", target["expr"])


def alerts() -> list[dict[str, Any]]:
    """Return the alerting rules."""
    rules = yaml.safe_load(RULES.read_text())["spec"]["groups"]
    return [rule for group in rules for rule in group["rules"]]


def alert_queries() -> Iterator[Query]:
    """Return the expressions of the alerts."""
    for alert in alerts():
        yield Query(alert["alert"], alert["expr"])


def autoscaler_queries() -> Iterator[Query]:
    """Return the queries of KEDA's triggers."""
    for path in (AUTOSCALING / "tier" / "workers.yaml", AUTOSCALING / "to-zero" / "transformers.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            triggers = document.get("spec", {}).get("triggers", [])
            if "patch" in document:
                triggers = [each["value"] for each in yaml.safe_load(document["patch"])]
                triggers = [each for each in triggers if isinstance(each, dict)]
            for trigger in triggers:
                yield Query(f"{path.parent.name}: {trigger['name']}", trigger["metadata"]["query"])


def documented_queries() -> Iterator[Query]:
    """Return the queries in docs/metrics.md."""
    section = (ROOT / "docs" / "metrics.md").read_text().partition("\n## Queries\n")[2]
    for question, text in re.findall(r"^\| ([^|]+) \| `([^`]+)` \|$", section, re.MULTILINE):
        yield Query(question, text)


def selectors(text: str) -> list[Selector]:
    """Return the selectors of a query."""
    found = []
    for match in _SELECTOR.finditer(text):
        matchers = {name: tuple(value.split("|")) for name, _, value in _MATCHER.findall(match["matchers"])}
        names = (match["name"],) if match["name"] else matchers.pop("__name__")
        found.append(Selector(names, tuple(matchers.items())))
    rest = _GROUPING.sub("", _SELECTOR.sub("", re.sub(r"\[[^]]*\]", "", text)))
    return found + [Selector((name,), ()) for name in _BARE.findall(rest)]


def groupings(text: str) -> set[str]:
    """Return the labels by which a query groups or joins."""
    return {name.strip() for names in _GROUPING.findall(text) for name in names.split(",") if name.strip()}


def labels_of(name: str) -> set[str] | None:
    """Return the labels of a metric by its name in Prometheus; None if there is no such metric."""
    if name == "up":
        return TARGET_LABELS - {"service_name"}
    return _LABELS.get(name)


def _labels_by_name() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for metric in METRICS:
        name = metric.prometheus_name
        labels = TARGET_LABELS | {each.replace(".", "_") for each in metric.attribute_names}
        if metric.kind == "histogram":
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            found[name] = labels
    return found


_LABELS = _labels_by_name()


def values_by_label() -> dict[str, set[str]]:
    """Return the values of the labels that have a closed set of them, from docs/metrics.md."""
    section = (ROOT / "docs" / "metrics.md").read_text().partition("\n## Labels\n")[2]
    found = {}
    for label, text in re.findall(r"^\| `(headrace_\w+)` \| (.+) \|$", section, re.MULTILINE):
        values = {value for value in re.findall(r"`([^`]+)`", text) if re.fullmatch(r"[a-z_]+", value)}
        if values:
            found[label] = values
    return found

"""The list of metrics: each is emitted by the services it names, and follows the conventions."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from headrace.metrics import catalogue, changes, rare, upstream
from headrace.metrics.catalogue import METRICS
from headrace.metrics.words import LABELS

PACKAGE = Path(catalogue.__file__).parent.parent
NAMES = {id(value): name for module in (catalogue, changes, upstream) for name, value in vars(module).items()}
# What every service runs, and what those share that answer requests.
EVERYWHERE = [PACKAGE / "runtime"]
SHARED = {
    "router": [PACKAGE / "metrics", PACKAGE / "multiplex", PACKAGE / "client" / "span.py"],
    "batcher": [PACKAGE / "metrics", PACKAGE / "multiplex"],
    "worker": [],
    "upstream": [PACKAGE / "metrics", PACKAGE / "multiplex"],
    "client": [PACKAGE / "client" / "span.py"],
}


# They name metrics of all services.
NO_EMITTERS = {Path(str(module.__file__)) for module in (catalogue, changes, upstream, rare)}


def used_in(places: list[Path]) -> set[str]:
    """The constants of the catalogue that are used below *places*."""
    found = set()
    for place in places:
        for path in place.rglob("*.py") if place.is_dir() else [place]:
            if path not in NO_EMITTERS:
                nodes = list(ast.walk(ast.parse(path.read_text())))
                found |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
                found |= {node.id for node in nodes if isinstance(node, ast.Name)}
    return found


@pytest.mark.parametrize("service", ["router", "batcher", "worker", "upstream", "client"])
def test_each_service_emits_exactly_the_metrics_that_name_it(service: str) -> None:
    served = [PACKAGE / service, *EVERYWHERE] if service != "client" else []
    found = used_in([*served, *SHARED[service]])
    emitted = found & {NAMES[id(metric)] for metric in METRICS}

    if "record_refusal" in found:  # of `metrics.requests`
        emitted.add("REFUSED")

    assert emitted == {NAMES[id(metric)] for metric in METRICS if service in metric.services}


def test_names_are_unique_and_well_formed() -> None:
    assert (
        len({metric.name for metric in METRICS}) == len({m.prometheus_name for m in METRICS}) == len(METRICS)
    )
    for metric in METRICS:
        assert re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)+", metric.name)
        assert metric.description[0].islower() or metric.description.startswith("CPU")
        assert not metric.description.endswith(".")
        assert metric.unit
        assert set(metric.labels) <= set(LABELS)
        assert (metric.kind == "histogram") == bool(metric.bounds)
        assert list(metric.bounds) == sorted(metric.bounds)


def test_the_required_attributes_of_the_conventions_are_there() -> None:
    for metric in METRICS:
        names = set(metric.attribute_names)
        if metric.name.startswith("gen_ai.server."):
            assert names >= {"gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model"}
        if metric.name.startswith("rpc."):
            assert names >= {"rpc.system.name", "rpc.method", "rpc.status_code", "error.type"}
    assert catalogue.REQUEST_DURATION.bounds == tuple(round(0.01 * 2**n, 2) for n in range(14))

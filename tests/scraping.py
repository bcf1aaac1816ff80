"""Read the metrics that a process serves for Prometheus."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Scrape:
    """What one process serves: its series by name, each as its labels and its value."""

    series: Mapping[str, list[tuple[dict[str, str], float]]]

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the series of a name that have *labels*."""
        found = self.series.get(name, [])
        return sum(value for own, value in found if labels.items() <= own.items())


def scrape(port: int) -> Scrape:
    """Read the endpoint of a process on this machine."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        text = response.read().decode()
    series: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series.setdefault(sample.name, []).append((sample.labels, sample.value))
    return Scrape(series)

"""Record counters, gauges and histograms at little cost.

A metric has a series for each combination of label values. Recording adds to numbers of the series, which
takes a tenth of the time that OpenTelemetry's SDK takes, and nothing is sent: `runtime.telemetry` reads the
series when they are exported or scraped. Only the labels that a metric declares can be recorded.

Series are recorded on one thread, the event loop's, and read on any.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import add
from typing import Final, Generic, Literal, TypeAlias, TypeVar

from headrace.metrics.words import LABELS, OTHER

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]

# Most series of one metric; further ones are recorded together, with the value `OTHER` for each label.
MAX_SERIES: Final = 1000

S = TypeVar("S")


class _Number:
    """A number that is recorded, or read from a function when it is exported."""

    __slots__ = ("_read", "_value")

    def __init__(self) -> None:
        self._value = 0.0
        self._read: Callable[[], float] | None = None

    @property
    def value(self) -> float:
        """The current value."""
        if self._read is not None:
            # What it reads was changed meanwhile, or no file can be opened to read it. The last value is good
            # enough; an error would hide all other metrics as well.
            with suppress(Exception):
                self._value = self._read()
        return self._value

    @contextmanager
    def reading(self, read: Callable[[], float]) -> Generator[None, None, None]:
        """Use *read* as the value while the block runs; it is called on other threads, and must be quick.

        Afterwards a counter keeps its last value, and a gauge is 0.
        """
        self._read = read
        try:
            yield
        finally:
            if self._read is read:
                self._value = self._at_end(self.value)
                self._read = None

    def _at_end(self, last: float) -> float:
        raise NotImplementedError


class CounterSeries(_Number):
    """A number that only grows."""

    __slots__ = ()

    def add(self, amount: float = 1) -> None:
        """Add *amount*, at least 0."""
        self._value += amount

    def _at_end(self, last: float) -> float:
        return last


class GaugeSeries(_Number):
    """A number that is set, or added to."""

    __slots__ = ()

    def set(self, value: float) -> None:
        """Replace the value."""
        self._value = value

    def add(self, amount: float) -> None:
        """Add *amount*, which may be negative."""
        self._value += amount

    def _at_end(self, last: float) -> float:
        return 0.0


class HistogramSeries:
    """The distribution of recorded values.

    counts   number of values in each bucket: up to the first bound, up to the second, ..., above the last
    total    sum of the values
    """

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def record(self, value: float) -> None:
        """Record one value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def merge(self, other: HistogramSeries) -> None:
        """Record all values of a series with the same buckets."""
        self.counts[:] = map(add, self.counts, other.counts)
        self.total += other.total


class Metric(Generic[S]):
    """One metric of the catalogue, and its series.

    name      as in OpenTelemetry
    unit      in UCUM, such as "s", "By", "1" for ratios, or "{token}"
    labels    names in `words.LABELS`
    services  which services emit it
    bounds    upper bounds of a histogram's buckets
    since     time.time_ns() from which on it has been counted
    """

    kind: Kind

    def __init__(
        self,
        name: str,
        unit: str,
        labels: Sequence[str],
        description: str,
        *,
        services: Sequence[str],
        bounds: Sequence[float] = (),
    ) -> None:
        self.name = name
        self.unit = unit
        self.labels = tuple(labels)
        self.description = description
        self.services = tuple(services)
        self.bounds = tuple(bounds)
        self.since = time.time_ns()
        self._count = len(self.labels)
        self._series: dict[tuple[str, ...], S] = {}

    def of(self, **labels: str) -> S:
        """Return the series with the given value of each label, which may be kept. Raises TypeError."""
        try:
            key = tuple([labels[name] for name in self.labels])
        except KeyError:
            key = ()
        if len(labels) != self._count or len(key) != self._count:
            raise TypeError(f"{self.name} has the labels {', '.join(self.labels)}, not {', '.join(labels)}")
        series = self._series.get(key)
        return series if series is not None else self._add(key)

    def _add(self, key: tuple[str, ...]) -> S:
        if len(self._series) >= MAX_SERIES:
            key = (OTHER,) * self._count
        return self._series.setdefault(key, self._new())

    def _new(self) -> S:
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[dict[str, str], S]]:
        """Iterate over the series and their labels, named as in OpenTelemetry, without empty ones."""
        names = self.attribute_names
        for key, series in list(self._series.items()):
            yield {name: value for name, value in zip(names, key, strict=True) if value}, series

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Its labels as OpenTelemetry names them."""
        return tuple(LABELS[label] for label in self.labels)

    @property
    def prometheus_name(self) -> str:
        """Its name in Prometheus; a histogram has this name with _bucket, _sum and _count."""
        name, suffix = self.name.replace(".", "_"), _SUFFIXES.get(self.unit, "")
        if self.unit == "1" and self.kind == "gauge":
            suffix = "_ratio"
        if suffix and not name.endswith(suffix):
            name += suffix
        return name + "_total" if self.kind == "counter" else name


class Counter(Metric[CounterSeries]):
    """A metric that counts."""

    kind = "counter"

    def _new(self) -> CounterSeries:
        return CounterSeries()


class Gauge(Metric[GaugeSeries]):
    """A metric with a current value."""

    kind = "gauge"

    def _new(self) -> GaugeSeries:
        return GaugeSeries()


class Histogram(Metric[HistogramSeries]):
    """A metric with a distribution."""

    kind = "histogram"

    def _new(self) -> HistogramSeries:
        return HistogramSeries(self.bounds)


# Units that are part of names in Prometheus, by the rules of OpenTelemetry's translation: annotations such as
# "{token}" are not.
_SUFFIXES = {"s": "_seconds", "By": "_bytes", "{token}/s": "_per_second"}

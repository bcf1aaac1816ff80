"""What a run must achieve: limits per request for goodput, and objectives for the whole run."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.cli.bench.options import BadOption

if TYPE_CHECKING:
    from headrace.cli.bench.records import Record

LIMITED = ("ttft", "tpot", "e2el")

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_OBJECTIVE = re.compile(r"\s*([a-z][a-z0-9_.]*)\s*(<=|>=|<|>)\s*([^\s<>=]+)\s*")
# As results write it: 99 and not 99.0.
_PERCENTILE = re.compile(r"p((?:0|[1-9]\d*)(?:\.\d*[1-9])?)_(?:ttft|tpot|itl|e2el|client_queue_time)_ms")


@dataclass(frozen=True)
class Objective:
    """A condition on one figure of the result, such as p99_ttft_ms <= 500."""

    name: str
    comparison: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.comparison}{self.bound:g}"

    def met(self, result: Mapping[str, Any]) -> bool:
        """Return whether *result* meets it; a figure that could not be measured does not."""
        value = result.get(self.name)
        return value is not None and _COMPARE[self.comparison](float(value), self.bound)


def parse_objective(text: str, names: Collection[str]) -> Objective:
    """Parse "p99_ttft_ms<=500". *names* are the figures besides percentiles. Raises BadOption."""
    found = _OBJECTIVE.fullmatch(text)
    bound = _number(found[3]) if found else None
    if found is None or bound is None:
        raise BadOption(f"--slo {text!r} must be a figure, <=, >=, < or >, and a number: 'p99_ttft_ms<=500'")
    name = found[1]
    if name not in names and percent_of(name) is None:
        close = difflib.get_close_matches(
            name, [*names, "p99_ttft_ms", "p99_tpot_ms", "p99_itl_ms", "p99_e2el_ms"]
        )
        hint = (
            f"; did you mean {' or '.join(close)}?"
            if close
            else f"; known are {', '.join(sorted(names))}, and p99_ttft_ms and so on"
        )
        raise BadOption(f"--slo {text!r}: there is no figure {name!r}{hint}")
    return Objective(name, found[2], bound)


def percent_of(name: str) -> float | None:
    """Return 99 for the figure p99_ttft_ms, and so on; None if it is no percentile."""
    found = _PERCENTILE.fullmatch(name)
    return float(found[1]) if found and float(found[1]) <= 100 else None


def parse_goodput(text: str) -> dict[str, float]:
    """Parse "ttft:500,tpot:50" to limits in seconds by latency. Raises BadOption."""
    limits: dict[str, float] = {}
    for part in re.split(r"[,\s]+", text.strip()) if text.strip() else ():
        name, colon, value = part.partition(":")
        number = _number(value)
        if name not in LIMITED or not colon or number is None or number < 0:
            raise BadOption(
                f"--goodput {text!r} must be limits in ms for {', '.join(LIMITED)}: 'ttft:500,tpot:50'"
            )
        limits[name] = number / 1e3
    return limits


def is_good(record: Record, limits: Mapping[str, float]) -> bool:
    """Return whether a completed request kept all limits. With one token, its TPOT is 0, as in vLLM."""
    values = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.e2el}
    return all(values[name] <= limit for name, limit in limits.items())


def parse_percentiles(text: str, objectives: Sequence[Objective] = ()) -> list[float]:
    """Parse "50,90,99", and add the percentiles that *objectives* need. Raises BadOption."""
    percents: set[float] = set()
    for part in text.split(","):
        number = _number(part)
        if number is None or not 0 <= number <= 100:
            raise BadOption(f"--percentiles {text!r} must be numbers from 0 to 100, separated by commas")
        percents.add(number)
    percents.update(percent for one in objectives if (percent := percent_of(one.name)) is not None)
    return sorted(percents)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

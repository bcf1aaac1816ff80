"""All log lines are JSON, and callers can neither flood nor forge them."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

from headrace.runtime.telemetry import logs


class Log(logging.Logger):
    """A separate logger with its output."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._stream = io.StringIO()
        self.addHandler(logs.handler_to(self._stream, "test"))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._stream.getvalue().splitlines()]


def test_a_kind_of_line_beyond_its_rate_is_dropped_and_counted() -> None:
    now = 0.0
    rate = logs._Rate(lambda: now)

    def passed(message: str) -> logging.LogRecord | None:
        record = logging.makeLogRecord({"name": "headrace.test", "msg": message})
        return record if rate.filter(record) else None

    burst = [passed("batcher connected") for _ in range(1000)]
    other = passed("serving")
    now = 1.5
    later = passed("batcher connected")

    assert sum(record is not None for record in burst) == logs.LINES_PER_SECOND
    assert other is not None
    assert later is not None
    assert vars(later)["suppressed"] == 1000 - logs.LINES_PER_SECOND


def test_the_number_of_kinds_is_limited() -> None:
    rate = logs._Rate()
    for number in range(5000):
        rate.filter(logging.makeLogRecord({"name": "grpc", "msg": f"invalid encoding on {number}"}))

    assert len(rate._kinds) <= 1000


def test_values_of_callers_are_clipped_and_cannot_end_their_line() -> None:
    log = Log("headrace.test")
    forged = 'x\n{"level": "CRITICAL"}\n' * 10_000
    log.info("batcher connected", extra={"batcher": forged, "epoch": 7})
    log.info("refused %s", forged)
    try:
        raise ValueError(forged)
    except ValueError:
        log.exception("unexpected error")

    connected, refused, unexpected = log.lines()

    assert len(connected["batcher"]) < 2 * logs.VALUE_BYTES
    assert connected["epoch"] == 7
    assert len(refused["message"]) < 2 * logs.VALUE_BYTES
    assert len(unexpected["exc_info"]) < 2 * logs.TRACEBACK_BYTES
    assert unexpected["exc_info"].startswith("Traceback")
    assert {line["level"] for line in (connected, refused, unexpected)} == {"INFO", "ERROR"}


def test_short_values_are_unchanged() -> None:
    log = Log("headrace.test")
    log.info("calibration read", extra={"thresholds": [0.0, 0.5], "rows": 12})

    (line,) = log.lines()

    assert (line["thresholds"], line["rows"]) == ([0.0, 0.5], 12)


def test_an_error_that_grpc_logs_is_one_line_without_a_traceback() -> None:
    log = Log("grpc._cython.cygrpc")
    try:
        b"\xff".decode()
    except UnicodeDecodeError:
        log.exception("Invalid encoding on %s", b"\xff" * 5000)

    (line,) = log.lines()

    assert "exc_info" not in line
    assert len(line["message"]) < 2 * logs.VALUE_BYTES

"""Write logs as JSON lines to standard error, each with its trace and span ids.

Callers cause log lines and choose values in them, so both are limited: LINES_PER_SECOND for each kind of line
(a logger and its constant phrase), VALUE_BYTES for one value, TRACEBACK_BYTES for a traceback.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from opentelemetry import trace
from pythonjsonlogger.json import JsonFormatter

from headrace.quoting import clipped

LINES_PER_SECOND = 10
VALUE_BYTES = 1000
TRACEBACK_BYTES = 8000
_MAX_KINDS = 1000  # of lines whose rates are tracked

_FORMATTER = logging.Formatter()
_STANDARD = frozenset(vars(logging.makeLogRecord({})))


class _Rate(logging.Filter):
    """Drops lines of a kind that exceeds its rate; the next line of that kind counts them as `suppressed`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        # For each kind: the start of its second, its lines since then, and the number of dropped lines.
        self._kinds: dict[tuple[str, str], tuple[float, int, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind, now = (record.name, str(record.msg)[:VALUE_BYTES]), self._clock()
        began, lines, dropped = self._kinds.pop(kind, (now, 0, 0))
        if now - began >= 1:
            began, lines = now, 0
        passes = lines < LINES_PER_SECOND
        if passes and dropped:
            record.suppressed = dropped
        # Kinds are kept in the order of their last line; the oldest is removed first.
        self._kinds[kind] = (began, lines + 1, 0) if passes else (began, lines, dropped + 1)
        if len(self._kinds) > _MAX_KINDS:
            with suppress(KeyError, RuntimeError):  # another thread does the same
                del self._kinds[next(iter(self._kinds))]
        return passes


class _Clip(logging.Filter):
    """Shortens values that callers may have chosen, and drops tracebacks from gRPC, which callers cause."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            text = "" if record.name.startswith("grpc") else _FORMATTER.formatException(record.exc_info)
            record.exc_info, record.exc_text = None, clipped(text, TRACEBACK_BYTES) or None
        message = record.getMessage()
        if len(message) > VALUE_BYTES:
            record.msg, record.args = clipped(message, VALUE_BYTES), None
        for name in vars(record).keys() - _STANDARD:
            if len(text := str(getattr(record, name))) > VALUE_BYTES:
                setattr(record, name, clipped(text, VALUE_BYTES))
        return True


class _TraceIds(logging.Filter):
    """Adds the ids of the current span, so that lines and traces refer to each other."""

    def filter(self, record: logging.LogRecord) -> bool:
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            record.trace_id = f"{context.trace_id:032x}"
            record.span_id = f"{context.span_id:016x}"
        return True


def configure(service: str, level: str = "INFO") -> None:
    """Write all logs of the process to standard error as JSON, with the name of *service*."""
    root = logging.getLogger()
    root.handlers[:] = [handler_to(sys.stderr, service)]
    root.setLevel(level)
    # Libraries that log every call are limited to warnings.
    for chatty in ("httpx", "urllib3", "filelock", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


def handler_to(stream: TextIO, service: str) -> logging.Handler:
    """Return a handler that writes limited JSON lines to *stream*, with the name of *service*."""
    handler = logging.StreamHandler(stream)
    for each in (_Rate(), _Clip(), _TraceIds()):
        handler.addFilter(each)
    handler.setFormatter(
        JsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            datefmt="%Y-%m-%dT%H:%M:%S%z",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            static_fields={"service": service},
        )
    )
    return handler

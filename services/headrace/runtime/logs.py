"""Write logs as JSON lines on standard error, each with the trace and span that it belongs to.

Callers cause lines and choose words in them, so both are bounded: `LINES_PER_SECOND` of one kind (a logger
and its constant phrase), `WORD_CHARACTERS` of one value, `TRACEBACK_CHARACTERS` of a traceback.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TextIO

from opentelemetry import trace
from pythonjsonlogger.json import JsonFormatter

from headrace.quoting import clipped

LINES_PER_SECOND = 10
WORD_CHARACTERS = 1000
TRACEBACK_CHARACTERS = 8000
_KINDS = 1000  # of lines, whose rates are known

_FORMATTER = logging.Formatter()
_STANDARD = frozenset(vars(logging.makeLogRecord({})))


class _Rate(logging.Filter):
    """Drops lines of a kind that comes too often; the next line of that kind counts them as `suppressed`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        # For each kind: when its second began, its lines since, and how many were dropped.
        self._kinds: dict[tuple[str, str], tuple[float, int, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind, now = (record.name, str(record.msg)[:WORD_CHARACTERS]), self._clock()
        began, lines, dropped = self._kinds.pop(kind, (now, 0, 0))
        if now - began >= 1:
            began, lines = now, 0
        passes = lines < LINES_PER_SECOND
        if passes and dropped:
            record.suppressed = dropped
        # The kind that was seen last is the last to be forgotten.
        self._kinds[kind] = (began, lines + 1, 0) if passes else (began, lines, dropped + 1)
        if len(self._kinds) > _KINDS:
            del self._kinds[next(iter(self._kinds))]
        return passes


class _Clip(logging.Filter):
    """Shortens what callers may have chosen, and drops the tracebacks of gRPC, whose cause is a caller."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            text = "" if record.name.startswith("grpc") else _FORMATTER.formatException(record.exc_info)
            record.exc_info, record.exc_text = None, clipped(text, TRACEBACK_CHARACTERS) or None
        message = record.getMessage()
        if len(message) > WORD_CHARACTERS:
            record.msg, record.args = clipped(message, WORD_CHARACTERS), None
        for name in vars(record).keys() - _STANDARD:
            if len(text := str(getattr(record, name))) > WORD_CHARACTERS:
                setattr(record, name, clipped(text, WORD_CHARACTERS))
        return True


class _TraceIds(logging.Filter):
    """Adds the current span's ids, so that a line is found from its trace and a trace from its line."""

    def filter(self, record: logging.LogRecord) -> bool:
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            record.trace_id = f"{context.trace_id:032x}"
            record.span_id = f"{context.span_id:016x}"
        return True


def configure(service: str, level: str = "INFO") -> None:
    """Send all logs of the process to standard error, as JSON, under the name of *service*."""
    root = logging.getLogger()
    root.handlers[:] = [handler_to(sys.stderr, service)]
    root.setLevel(level)
    # Libraries that report each call of theirs are heard when something is wrong.
    for chatty in ("httpx", "urllib3", "filelock", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


def handler_to(stream: TextIO, service: str) -> logging.Handler:
    """Writes bounded JSON lines to *stream*, under the name of *service*."""
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

"""Write logs as JSON lines on standard error, each with the trace and span that it belongs to."""

from __future__ import annotations

import logging
import sys

from opentelemetry import trace
from pythonjsonlogger.json import JsonFormatter


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
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_TraceIds())
    handler.setFormatter(
        JsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            datefmt="%Y-%m-%dT%H:%M:%S%z",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            static_fields={"service": service},
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Libraries that report each call of theirs are heard when something is wrong.
    for chatty in ("httpx", "urllib3", "filelock", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))

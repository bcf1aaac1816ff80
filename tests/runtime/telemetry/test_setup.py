"""Export is off unless the standard variables are set, and log lines contain the trace."""

from __future__ import annotations

import json
import logging
import os

import pytest
from opentelemetry import trace

from headrace.runtime.telemetry import logs
from headrace.runtime.telemetry.setup import telemetry, wanted


@pytest.mark.parametrize(
    ("variables", "traces", "metrics"),
    [
        ({}, False, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, True, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4317"}, True, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_METRICS_EXPORTER": "none"}, True, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_SDK_DISABLED": "true"}, False, False),
    ],
)
def test_the_standard_variables_decide(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], traces: bool, metrics: bool
) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert (wanted("traces"), wanted("metrics")) == (traces, metrics)


async def test_without_the_variables_nothing_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    before = trace.get_tracer_provider()

    async with telemetry("test"):
        assert trace.get_tracer_provider() is before


def test_log_lines_are_json_with_fields_and_trace_ids(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        logs.configure("batcher")
        with trace.get_tracer("test").start_as_current_span("here") as span:
            logging.getLogger("headrace.test").info("batch closed", extra={"rows": 3})
        context = span.get_span_context()
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)

    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines() if "batch closed" in line]
    assert (line["message"], line["rows"], line["service"], line["level"]) == (
        "batch closed",
        3,
        "batcher",
        "INFO",
    )
    assert line["trace_id"] == f"{context.trace_id:032x}"

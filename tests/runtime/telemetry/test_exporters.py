"""The standard OTEL_* variables select the exporters; each unsupported value is one line of the log."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from headrace.cli.demo.otlp_receiver import Span, otlp_receiver, spans_of
from headrace.cli.launch.mesh import MeshSpec
from headrace.cli.launch.mesh import mesh as processes
from headrace.client import chat, connect
from headrace.runtime.telemetry.exporters import Signal, disabled, plan, unsupported
from tests.harness import PATIENCE, collect

GRPC, HTTP = "otlp_proto_grpc", "otlp_proto_http"
HERE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({}, ()),
        (HERE, (GRPC,)),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4317"}, (GRPC,)),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c:4317"}, ()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, ()),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, (GRPC,)),  # to the default endpoint
        ({"OTEL_TRACES_EXPORTER": "console"}, ("console",)),
        ({**HERE, "OTEL_TRACES_EXPORTER": "otlp,console"}, (GRPC, "console")),
        ({**HERE, "OTEL_TRACES_EXPORTER": " console , OTLP, otlp,"}, ("console", GRPC)),
        ({**HERE, "OTEL_TRACES_EXPORTER": ""}, (GRPC,)),  # empty means unset
        ({**HERE, "OTEL_TRACES_EXPORTER": "none"}, ()),
        ({**HERE, "OTEL_TRACES_EXPORTER": "None"}, ()),
        ({**HERE, "OTEL_TRACES_EXPORTER": HTTP}, (HTTP,)),
        ({**HERE, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, (HTTP,)),
        ({**HERE, "OTEL_EXPORTER_OTLP_PROTOCOL": "HTTP/Protobuf"}, (HTTP,)),
        ({**HERE, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, (GRPC,)),
        (
            {
                **HERE,
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            },
            (HTTP,),
        ),
        (
            {**HERE, "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf"},
            (GRPC,),
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, (HTTP,)),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, (HTTP,)),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, (GRPC,)),
        ({**HERE, "OTEL_SDK_DISABLED": "true"}, ()),
        ({**HERE, "OTEL_SDK_DISABLED": "TRUE"}, ()),
        ({**HERE, "OTEL_SDK_DISABLED": "1"}, (GRPC,)),  # by the specification only "true" counts
    ],
)
def test_the_variables_select_the_exporters_of_traces(
    variables: dict[str, str], names: tuple[str, ...]
) -> None:
    assert plan("traces", variables).names == names
    assert plan("traces", variables).problems == ()


@pytest.mark.parametrize(
    ("signal", "variables", "names", "problem"),
    [
        ("traces", {"OTEL_TRACES_EXPORTER": "zipkin,console"}, ("console",), "'zipkin' is not installed"),
        ("traces", {"OTEL_TRACES_EXPORTER": "prometheus"}, (), "'prometheus' is not installed"),
        ("metrics", {"OTEL_METRICS_EXPORTER": "prometheus,otlp"}, (GRPC,), "'prometheus' is not installed"),
        ("metrics", {"OTEL_METRICS_EXPORTER": "oltp"}, (), "available: console, otlp, none"),
        (
            "traces",
            {**HERE, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
            (HTTP,),
            "OTEL_EXPORTER_OTLP_PROTOCOL: 'http/json' is not supported; using http/protobuf",
        ),
        (
            "metrics",
            {**HERE, "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "udp"},
            (),
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL: 'udp' is not supported; use grpc or http/protobuf",
        ),
    ],
)
def test_an_unsupported_value_is_reported_in_one_line(
    signal: Signal, variables: dict[str, str], names: tuple[str, ...], problem: str
) -> None:
    made = plan(signal, variables)

    assert made.names == names
    (line,) = made.problems
    assert problem in line


def test_unsupported_variables_are_reported() -> None:
    assert unsupported({}) == []
    assert unsupported({"OTEL_LOGS_EXPORTER": "none"}) == []
    assert "OTEL_LOGS_EXPORTER: not supported" in unsupported({"OTEL_LOGS_EXPORTER": "otlp"})[0]
    assert "not supported" in unsupported({"OTEL_CONFIG_FILE": "x.yaml"})[0]
    assert unsupported({"OTEL_CONFIG_FILE": "x.yaml", "OTEL_SDK_DISABLED": "true"}) == []
    assert disabled({"OTEL_SDK_DISABLED": "True"})


@dataclass
class Receiver:
    """A collector for OTLP over HTTP."""

    endpoint: str = ""
    spans: list[Span] = field(default_factory=list)
    metrics: set[str] = field(default_factory=set)
    paths: set[str] = field(default_factory=set)
    headers: dict[str, str] = field(default_factory=dict)

    def take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        self.paths.add(path)
        self.headers = headers
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        if path == "/v1/traces":
            self.spans += spans_of(ExportTraceServiceRequest.FromString(body))
        elif path == "/v1/metrics":
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                self.metrics |= {one.name for scope in resource.scope_metrics for one in scope.metrics}


@asynccontextmanager
async def http_receiver() -> AsyncGenerator[Receiver, None]:
    receiver = Receiver()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            path = line.decode().split()[1]
            headers = {}
            while (header := (await reader.readline()).decode().strip()) != "":
                name, _, value = header.partition(":")
                headers[name.lower()] = value.strip()
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            assert headers["content-type"] == "application/x-protobuf"
            receiver.take(path, headers, body)
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n"
            )
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    receiver.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield receiver


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.05)


async def test_a_mesh_exports_over_http_by_a_list_with_b3_between_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trace over all processes, to two exporters, without the proxy that the environment sets."""
    for variable in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "grpc_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    async with http_receiver() as receiver:
        variables = {
            "OTEL_PROPAGATORS": "b3",
            "OTEL_TRACES_EXPORTER": "otlp,console",
            "OTEL_METRICS_EXPORTER": "otlp",
            "OTEL_METRIC_EXPORT_INTERVAL": "300",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
        }
        spec = MeshSpec(cache=tmp_path, log_dir=tmp_path / "logs", fake=True, environment=variables)
        async with processes(spec) as running, connect(running.address) as client:
            answer = await collect(client, chat("hello"))

            def names() -> set[str]:
                return {span.name for span in receiver.spans}

            await until(lambda: {"worker.decode", "router.score", "batcher.tokenize"} <= names())
            await until(lambda: "headrace.tokens.delivered" in receiver.metrics)

    entries = [
        span
        for span in receiver.spans
        if span.attributes.get("headrace.request.id") == answer.accepted.request_id
    ]
    (trace_id,) = {span.trace_id for span in entries}
    ours = [span for span in receiver.spans if span.name != "batcher.batch"]
    assert {span.trace_id for span in ours} == {trace_id}, "one request is one trace"
    assert {span.service for span in ours} == {"headrace-router", "headrace-batcher", "headrace-worker"}
    assert receiver.paths == {"/v1/traces", "/v1/metrics"}
    for log in (tmp_path / "logs").glob("batcher-*.log"):
        text = log.read_text()
        assert "telemetry:" not in text
        assert "Traceback" not in text
    assert '"name": "worker.decode"' in "".join(
        log.read_text() for log in (tmp_path / "logs").glob("worker-*.log")
    ), "the console has them, too"


async def started(variables: dict[str, str], until: str) -> tuple[int | None, list[str]]:
    """Start a worker; return its exit code, None if it is running, and its log lines up to *until*."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "headrace.worker", "--engine", "echo", "--port", "0"),
        env={**environment, **variables},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    lines: list[str] = []
    async with asyncio.timeout(PATIENCE):
        while line := (await process.stderr.readline()).decode():
            lines.append(line)
            if until in line:
                process.kill()
                await process.wait()
                return None, lines
        return await process.wait(), lines


async def test_a_missing_propagator_stops_the_start_with_one_line() -> None:
    code, lines = await started({"OTEL_PROPAGATORS": "tracecontext,sleipnir"}, '"ready"')

    assert code == 1
    (line,) = lines
    said = json.loads(line)["message"]
    assert said.startswith("OTEL_PROPAGATORS: sleipnir not installed")
    assert "b3" in said


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "'zipkin' is not installed"),
        ({"OTEL_METRICS_EXPORTER": "prometheus"}, "'prometheus' is not installed"),
        ({**HERE, "OTEL_EXPORTER_OTLP_PROTOCOL": "udp", "OTEL_METRICS_EXPORTER": "none"}, "'udp'"),
        ({"OTEL_LOGS_EXPORTER": "otlp"}, "OTEL_LOGS_EXPORTER: not supported"),
        (
            {
                "OTEL_TRACES_EXPORTER": "console",
                "OTEL_TRACES_SAMPLER": "traceidratio",
                "OTEL_TRACES_SAMPLER_ARG": "7",
            },
            "Using default rate 1.0",
        ),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "soon"},
            "traces are not exported by otlp_proto_grpc",
        ),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": "zstd"},
            "traces are not exported by otlp_proto_grpc",
        ),
    ],
    ids=str,
)
async def test_an_invalid_variable_is_logged_and_the_service_starts(
    variables: dict[str, str], told: str
) -> None:
    code, lines = await started(variables, '"ready"')

    assert code is None, "it serves"
    warnings = [json.loads(line)["message"] for line in lines if '"WARNING"' in line]
    assert [line for line in warnings if told in line] == warnings
    assert len(warnings) == 1
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("propagators", ["none", "tracecontext,none", "b3multi", "baggage,tracecontext", ""])
async def test_installed_propagators_are_used(propagators: str) -> None:
    code, lines = await started({"OTEL_PROPAGATORS": propagators}, '"ready"')

    assert code is None, lines


async def test_a_signal_may_have_its_own_endpoint_and_protocol(tmp_path: Path) -> None:
    """Traces are exported by gRPC to one collector, metrics by HTTP to another."""
    async with http_receiver() as receiver, otlp_receiver() as sink:
        variables = {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": sink.endpoint,
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"{receiver.endpoint}/v1/metrics",
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf",
            "OTEL_METRIC_EXPORT_INTERVAL": "300",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        spec = MeshSpec(cache=tmp_path, log_dir=tmp_path / "logs", fake=True, environment=variables)
        async with processes(spec) as running, connect(running.address) as client:
            await collect(client, chat("hello"))
            await sink.wait_for(lambda spans: any(span.name == "worker.decode" for span in spans), PATIENCE)
            await until(lambda: "headrace.tokens.delivered" in receiver.metrics)

    assert receiver.paths == {"/v1/metrics"}


@asynccontextmanager
async def grpc_receiver() -> AsyncGenerator[Receiver, None]:
    """A collector for OTLP over gRPC that keeps the headers."""
    receiver = Receiver()

    class Servicer(TraceServiceServicer):
        async def Export(self, request: Any, context: Any) -> Any:
            receiver.headers = dict(context.invocation_metadata())
            receiver.spans += spans_of(request)
            return ExportTraceServiceResponse()

    server = grpc.aio.server()
    add_TraceServiceServicer_to_server(Servicer(), server)  # type: ignore[no-untyped-call]
    receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield receiver
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("protocol", "running_receiver"), [("grpc", grpc_receiver), ("http/protobuf", http_receiver)]
)
async def test_headers_compression_and_the_resource_are_as_the_variables_say(
    protocol: str, running_receiver: Callable[[], AbstractAsyncContextManager[Receiver]], tmp_path: Path
) -> None:
    async with running_receiver() as receiver:
        variables = {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_EXPORTER_OTLP_HEADERS": "api-key=known,tenant=us%20two",
            "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": "gzip",
            "OTEL_SPAN_EVENT_COUNT_LIMIT": "1",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        spec = MeshSpec(cache=tmp_path, log_dir=tmp_path / "logs", fake=True, environment=variables)
        async with processes(spec) as running, connect(running.address) as client:
            await collect(client, chat("hello"))
            await until(lambda: any(span.name == "worker.decode" for span in receiver.spans))

    assert receiver.headers["api-key"] == "known"
    assert receiver.headers["tenant"] == "us two"
    if protocol != "grpc":  # gRPC does not show its encoding
        assert receiver.headers["content-encoding"] == "gzip"
    assert max(len(span.events) for span in receiver.spans) == 1

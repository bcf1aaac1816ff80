"""Metrics are served to Prometheus, whatever scrapers do."""

from __future__ import annotations

import asyncio
import math
import socket
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from headrace.cli.launch.mesh import reserved_ports
from headrace.metrics.catalogue import METRICS
from headrace.metrics.instruments import Counter, Gauge, Histogram
from headrace.runtime.serving.bind_check import bind_error
from headrace.runtime.serving.server import StartFailed
from headrace.runtime.telemetry import prometheus
from headrace.runtime.telemetry.prometheus import MAX_CONNECTIONS, Text, endpoint
from headrace.runtime.telemetry.scraping import scraping
from tests.harness import PATIENCE, Mesh, collect, eventually, prompt

SERVICE = {"service_name": "headrace-test"}


async def ask(port: int, request: str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") -> tuple[str, str]:
    """The head and the body of a response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request.encode())
        response = await asyncio.wait_for(reader.read(), PATIENCE)
    finally:
        writer.close()
    head, _, body = response.decode().partition("\r\n\r\n")
    return head, body


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in families(text).values():
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


async def test_a_scrape_has_all_that_was_recorded_and_nothing_else(mesh: Mesh) -> None:
    await collect(mesh.client, prompt("hello", max_tokens=3))
    async with endpoint("127.0.0.1", 0, Text(SERVICE, {"service_version": "1"}).current) as port:
        head, body = await ask(port)

    assert "200 OK" in head
    assert "text/plain; version=0.0.4" in head
    found = families(body)
    assert set(found) - {"target_info", "target"} <= {
        metric.prometheus_name.removesuffix("_total") for metric in METRICS
    }
    known = {metric.prometheus_name.removesuffix("_total"): metric for metric in METRICS}
    for name, family in found.items():
        for sample in family.samples:
            assert sample.labels["service_name"] == "headrace-test"
            declared = (
                {label.replace(".", "_") for label in known[name].attribute_names} if name in known else set()
            )
            assert set(sample.labels) - {"service_name", "service_version", "le"} <= declared
    assert {"headrace_requests", "gen_ai_server_time_to_first_token_seconds", "headrace_step_rows"} <= set(
        found
    )


@given(value=st.text(max_size=30))
def test_any_label_value_arrives_as_it_was_recorded(value: str) -> None:
    requests = Counter("test.requests", "{request}", ("tenant",), "a \\ and\na line", services=())
    requests.of(tenant=value).add(3)
    (line,) = [
        line
        for line in "".join(prometheus._metric_lines(requests, {})).split("\n")
        if line[:1] not in ("", "#")
    ]

    ((name, labels, read),) = samples(line + "\n")
    assert (name, labels.get("headrace_tenant", ""), read) == ("test_requests_total", value, 3)


def test_a_histogram_is_cumulative_and_complete() -> None:
    wait = Histogram("test.wait", "s", (), "wait", services=(), bounds=(0.5, 1))
    for value in (0.1, 0.5, 0.7, 3):
        wait.of().record(value)

    read = {
        (name, labels.get("le")): value
        for name, labels, value in samples("".join(prometheus._metric_lines(wait, {})))
    }
    assert read == {
        ("test_wait_seconds_bucket", "0.5"): 2,
        ("test_wait_seconds_bucket", "1"): 3,
        ("test_wait_seconds_bucket", "+Inf"): 4,
        ("test_wait_seconds_sum", None): pytest.approx(4.3),
        ("test_wait_seconds_count", None): 4,
    }


@pytest.mark.parametrize("value", [-0.25, math.inf, -math.inf, math.nan])
def test_gauges_may_be_negative_have_fractions_and_be_no_finite_number(value: float) -> None:
    level = Gauge("test.level", "1", (), "level", services=())
    level.of().set(value)

    ((name, _, read),) = samples("".join(prometheus._metric_lines(level, {})))
    assert name == "test_level_ratio"
    assert read == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET / HTTP/1.1", "404"),
        ("POST /metrics HTTP/1.1", "405"),
        ("GET /metrics?name=x HTTP/1.0", "200"),
        ("\x01\x02", "405"),
    ],
)
async def test_other_requests_get_a_status(request_line: str, status: str) -> None:
    async with endpoint("127.0.0.1", 0, lambda: b"up 1\n") as port:
        head, _ = await ask(port, f"{request_line}\r\n\r\n")

    assert head.split()[1] == status


async def test_a_head_request_has_no_body() -> None:
    async with endpoint("127.0.0.1", 0, lambda: b"up 1\n") as port:
        head, body = await ask(port, "HEAD /metrics HTTP/1.1\r\n\r\n")

    assert "Content-Length: 5" in head
    assert body == ""


@asynccontextmanager
async def connections(port: int, count: int) -> AsyncGenerator[list[socket.socket], None]:
    """Connections whose small receive buffers are read only by the test."""
    opened = []
    try:
        for _ in range(count):
            one = socket.socket()
            opened.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.setblocking(False)
            await asyncio.get_running_loop().sock_connect(one, ("127.0.0.1", port))
        yield opened
    finally:
        for one in opened:
            one.close()


async def until_closed(one: socket.socket) -> int:
    """Read until the server closes the connection; return the number of bytes."""
    received = 0
    with suppress(ConnectionResetError):
        async with asyncio.timeout(PATIENCE):
            while data := await asyncio.get_running_loop().sock_recv(one, 1 << 20):
                received += len(data)
    return received


async def test_scrapers_that_send_nothing_or_do_not_read_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "EXCHANGE_SECONDS", 0.3)
    async with endpoint("127.0.0.1", 0, lambda: b"x" * 30_000_000) as port, connections(port, 3) as opened:
        silent, deaf, watched = opened
        deaf.send(b"GET /metrics HTTP/1.1\r\n\r\n")

        assert await until_closed(silent) == 0
        # Connected later than the deaf one, so its time ends later.
        assert await until_closed(watched) == 0
        assert await until_closed(deaf) < 30_000_000


async def test_more_connections_than_the_limit_are_closed_and_later_ones_served() -> None:
    async with endpoint("127.0.0.1", 0, lambda: b"up 1\n") as port:
        async with connections(port, MAX_CONNECTIONS + 1) as opened:
            assert await until_closed(opened[-1]) == 0

        async def served() -> bool:
            try:
                return (await ask(port))[1] == "up 1\n"
            except ConnectionError:
                return False

        async with asyncio.timeout(PATIENCE):
            while not await served():
                await asyncio.sleep(0.01)


async def test_a_failed_scrape_does_not_end_the_endpoint(caplog: pytest.LogCaptureFixture) -> None:
    texts = iter([b"up 1\n"])

    def text() -> bytes:
        if "metrics cannot be served" not in caplog.text:
            raise ZeroDivisionError
        return next(texts)

    async with endpoint("127.0.0.1", 0, text) as port:
        assert await ask(port) == ("", "")
        assert (await ask(port))[1] == "up 1\n"


async def test_frequent_scrapes_share_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    text = Text(SERVICE, {})
    first = text.current()
    text._fresh_until = now + 1.0  # writing it has taken 50 ms

    assert text.current() is first
    now += 1.0
    assert text.current() is not first


async def test_a_port_in_use_stops_the_start_with_the_setting_to_change() -> None:
    async with endpoint("127.0.0.1", 0, lambda: b"") as port:
        with pytest.raises(StartFailed, match=rf"127\.0\.0\.1:{port}: .* another --metrics-port"):
            async with scraping("127.0.0.1", port, "test", ""):
                pass


async def test_the_attributes_of_the_process_are_labels_of_its_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=worker-0,1st/key=a%22b,service.name=mine")
    with reserved_ports(1) as (port,):
        async with scraping("127.0.0.1", port, "worker", "instance-1"):
            _, body = await ask(port)

    (labels,) = [labels for name, labels, _ in samples(body) if name == "target_info"]
    assert labels["k8s_pod_name"] == "worker-0"
    assert labels["_1st_key"] == 'a"b'
    assert (labels["service_name"], labels["service_instance_id"]) == ("mine", "instance-1")


async def test_without_a_port_nothing_is_served() -> None:
    async with scraping("256.0.0.1", 0, "test", ""):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="processes share a port on Linux only")
async def test_each_process_of_a_router_has_an_endpoint(mesh: Mesh, tmp_path: Path) -> None:
    tiers = ",".join(f"{name}=127.0.0.1:{part.batcher.server.port}" for name, part in mesh.tiers.items())
    with reserved_ports(20) as ports, (tmp_path / "log").open("ab") as output:
        router, first = ports[0], next(p for p in ports[1:] if bind_error("127.0.0.1", p + 1) is None)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "headrace.router", "--port", str(router), "--tiers", tiers),
            *("--processes", "2", "--metrics-port", str(first)),
            stdout=output,
            stderr=output,
        )
        try:
            log = tmp_path / "log"
            await eventually(lambda: log.read_text().count('"message": "serving"') == 2)
            texts = [(await ask(first + number))[1] for number in range(2)]
        finally:
            process.terminate()
            assert await asyncio.wait_for(process.wait(), PATIENCE) == 0

    targets = [labels for text in texts for name, labels, _ in samples(text) if name == "target_info"]
    assert {target["service_name"] for target in targets} == {"headrace-router"}
    assert len({target["service_instance_id"] for target in targets}) == 2
    assert all(target["service_version"] for target in targets)

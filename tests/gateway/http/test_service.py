"""Identity, telemetry, HTTPS and the drain of the HTTP server."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace import errors
from headrace.gateway.http import https as https_module
from headrace.gateway.http.callers import tenant_of
from headrace.gateway.http.exchange import Exchange
from headrace.gateway.http.https import Https
from headrace.gateway.problems import Problem
from headrace.runtime.security.access import required_scope
from headrace.runtime.security.caller_guard import Accepted, CallerGuard
from headrace.runtime.security.callers_file import parse
from headrace.runtime.security.identity import Identity
from headrace.runtime.serving.calls import TraceContext
from headrace.runtime.serving.server import StartFailed
from tests.certificates import Certificates, issued, replace
from tests.gateway.http.served import JSON, PATH, eventually, served
from tests.security import Callers

POST = f"POST {PATH} HTTP/1.1"
TRACE, PARENT = "1" * 32, "2" * 16
TRACEPARENT = f"traceparent: 00-{TRACE}-{PARENT}-01"


def test_callers_are_known_by_their_token(tmp_path: Path) -> None:
    callers = Callers(tmp_path / "callers.toml")
    token, other = callers.add("search"), callers.add("rater", scopes=["feedback"])
    found = parse(callers.path.read_bytes())
    seen: list[tuple[str | None, dict[str, str]]] = []

    async def note(exchange: Exchange) -> None:
        seen.append((exchange.identity.tenant, exchange.metadata))
        await exchange.reply({})

    guard = CallerGuard("gateway", Accepted(callers=lambda: found))
    with served(note, guard=guard, forward=True) as running:
        wire = running.wire()
        nobody = wire.post(b"{}")
        unknown = wire.post(b"{}", "authorization: Bearer wrong")
        rater = wire.post(b"{}", f"authorization: Bearer {other}")
        search = wire.post(b"{}", f"authorization: Bearer {token}")

    assert [answer.status for answer in (nobody, unknown, rater, search)] == [401, 401, 403, 200]
    assert nobody.headers["www-authenticate"] == "Bearer"
    assert nobody.error["type"] == "authentication_error"
    assert rater.error["type"] == "permission_error"
    assert seen == [("search", {"authorization": f"Bearer {token}"})]


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/", None),
        ("/health", None),
        ("/health/live", None),
        ("/v1/chat/completions", "generate"),
        ("/v1/models/{model:path}", "generate"),
        ("/tokenize", "generate"),
        ("/detokenize", "generate"),
        ("/metrics", "admin"),
        ("/healthy", "admin"),
    ],
)
def test_paths_need_scopes(path: str, scope: str | None) -> None:
    assert required_scope("gateway", path) == scope


def test_the_tenant_is_that_of_the_credentials_the_header_or_the_user() -> None:
    bound = Identity(name="a", scopes=frozenset(), tenant="acme")
    free = Identity(name="b", scopes=frozenset())

    assert tenant_of(bound, "someone") == "acme"
    assert tenant_of(bound, None, "acme") == "acme"
    assert tenant_of(free, "someone") == "someone"
    assert tenant_of(free, "someone", "acme") == "acme"
    assert tenant_of(free, None) == ""
    for identity, user, header, status in (
        (bound, None, "other", 403),
        (free, "a\nb", None, 400),
        (free, None, "x" * 257, 400),
    ):
        with pytest.raises(Problem) as caught:
            tenant_of(identity, user, header)
        assert caught.value.status == status


@pytest.mark.parametrize("policy", ["trust", "link", "ignore"])
def test_a_request_is_a_span(
    policy: TraceContext, spans: InMemorySpanExporter, count: Callable[..., float]
) -> None:
    labels = {"http_method": "POST", "http_route": PATH, "http_status": "200"}
    before = count("http.server.request.duration", **labels)
    with served(trace_context=policy) as running:
        answer = running.wire().post(b'{"secret":1}', TRACEPARENT)
        eventually(spans.get_finished_spans)
        (span,) = spans.get_finished_spans()
    context = span.get_span_context()

    assert span.name == f"POST {PATH}"
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": PATH,
        "url.path": PATH,
        "url.scheme": "http",
        "http.response.status_code": 200,
    }
    assert context is not None
    assert answer.headers["traceparent"].startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-0")
    assert (f"{context.trace_id:032x}" == TRACE) == (policy == "trust")
    assert len(span.links) == (policy == "link")
    assert count("http.server.request.duration", **labels) == before + 1
    assert count("http.server.active_requests") == 0


def test_a_client_that_left_and_a_fault_are_in_spans_and_metrics(
    spans: InMemorySpanExporter, count: Callable[..., float]
) -> None:
    async def handle(exchange: Exchange) -> None:
        exchange.first_token()
        if await exchange.json():
            raise RuntimeError("secret")
        await asyncio.sleep(1000)

    before = count("http.server.request.duration", http_status="499", error="CANCELLED")
    tokens = count("headrace.http.time_to_first_token", http_route=PATH)
    with served(handle) as running:
        wire = running.wire()
        assert wire.post(b'{"a":1}').status == 500
        wire.send(POST, JSON, body=b"{}")
        eventually(lambda: running.http.requests.in_flight == 1)
        wire.close()
        eventually(lambda: len(spans.get_finished_spans()) == 2)
    fault, left = spans.get_finished_spans()

    assert (fault.attributes or {})["error.type"] == "INTERNAL"
    assert not fault.status.is_ok
    assert "secret" not in str(fault.status.description)
    assert (left.attributes or {})["http.response.status_code"] == 499
    assert count("http.server.request.duration", http_status="499", error="CANCELLED") == before + 1
    assert count("headrace.http.time_to_first_token", http_route=PATH) == tokens + 2


def test_a_client_that_left_is_recorded_as_such_however_the_mesh_ends_its_call(
    count: Callable[..., float],
) -> None:
    async def handle(exchange: Exchange) -> None:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            raise errors.RequestCancelled("the call was cancelled") from None

    before = count("http.server.request.duration", http_status="499", error="CANCELLED")
    with served(handle) as running:
        wire = running.wire()
        wire.send(POST, JSON, body=b"{}")
        eventually(lambda: running.http.requests.in_flight == 1)
        wire.close()
        eventually(
            lambda: count("http.server.request.duration", http_status="499", error="CANCELLED") == before + 1
        )


def test_a_drain_completes_what_is_in_flight_and_refuses_the_rest() -> None:
    go = threading.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.start_events()
        await asyncio.to_thread(go.wait)
        await exchange.send_event(b"done")
        await exchange.end_events()

    with served(stream, drain_seconds=60) as running:
        streaming, idle = running.wire(), running.wire()
        idle.send(f"DELETE {PATH} HTTP/1.1")
        assert idle.response().status == 405
        streaming.send(POST, JSON, body=b"{}")
        eventually(lambda: running.http.requests.in_flight == 1)
        running.stop()
        eventually(lambda: running.http.requests.draining)
        with pytest.raises(ConnectionRefusedError):
            running.wire()
        refused = idle.post(b"{}")
        go.set()

        assert refused.status == 503
        assert refused.error["code"] == "draining"
        assert refused.headers["connection"] == "close"
        assert streaming.response().events == ["done"]
        assert streaming.ended()


def test_a_drain_that_takes_too_long_ends_streams_with_an_error() -> None:
    async def stream(exchange: Exchange) -> None:
        if await exchange.json():
            await exchange.start_events()
        await asyncio.sleep(1000)

    with served(stream, drain_seconds=0.05) as running:
        streaming, whole = running.wire(), running.wire()
        streaming.send(POST, JSON, body=b'{"a":1}')
        whole.send(POST, JSON, body=b"{}")
        eventually(lambda: running.http.requests.in_flight == 2)
        running.stop()

        (event,) = streaming.response().events
        assert json.loads(event)["error"]["code"] == "draining"
        assert whole.response().status == 503


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return issued(tmp_path, ["router-a", "router-b"])


def test_https_uses_the_current_certificate(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(https_module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr("headrace.tls.files.CHECK_SECONDS", 0.0)
    files, other = certificates.client("router-a"), certificates.client("router-b")
    client = ssl.create_default_context(cafile=str(certificates.ca))
    old = ssl.create_default_context(cafile=str(certificates.ca))
    old.maximum_version = ssl.TLSVersion.TLSv1_2

    def peer(wire: object) -> bytes:
        found: bytes = wire.socket.getpeercert(binary_form=True)  # type: ignore[attr-defined]
        return found

    with served(https=Https(files["cert"], files["key"])) as running:
        first = running.wire(client)
        assert first.post(b'{"a":1}').body == b'{"a":1}'
        assert running.wire(old).post(b"{}").status == 200
        replace(files["key"], b"half written")
        assert running.wire(client).post(b"{}").status == 200, "the last good files stay in use"
        replace(files["cert"], other["cert"].read_bytes())
        replace(files["key"], other["key"].read_bytes())
        eventually(lambda: peer(running.wire(client)) != peer(first))

        assert first.post(b"{}").status == 200


def test_https_needs_usable_files(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="--https-cert: cannot read"):
        Https(tmp_path / "none.pem", tmp_path / "none.key")

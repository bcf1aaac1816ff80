"""Requests over HTTP are read, refused and answered as HTTP and OpenAI's API say."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
from collections.abc import Iterator

import pytest

from headrace import errors
from headrace.gateway.http.exchange import Exchange
from headrace.gateway.problems import Problem
from tests.gateway.http.served import JSON, PATH, Served, eventually, served

POST = f"POST {PATH} HTTP/1.1"


@pytest.fixture(scope="module")
def plain() -> Iterator[Served]:
    with served(max_body_bytes=10_000, max_inflight_bytes=100_000) as running:
        yield running


def test_a_connection_serves_one_request_after_the_other(plain: Served) -> None:
    wire = plain.wire()

    answers = [wire.post(json.dumps({"n": n}).encode()) for n in range(3)]

    assert [json.loads(answer.body) for answer in answers] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert answers[0].headers["content-type"] == "application/json"
    assert "connection" not in answers[0].headers
    assert "date" in answers[0].headers
    assert "server" not in answers[0].headers


def test_pipelined_requests_are_answered_in_order(plain: Served) -> None:
    wire = plain.wire()
    for n in range(20):
        wire.send(POST, JSON, body=json.dumps({"n": n}).encode())

    assert [json.loads(wire.response().body)["n"] for _ in range(20)] == list(range(20))


def test_a_chunked_body_is_one_body(plain: Served) -> None:
    wire = plain.wire()
    wire.send(POST, JSON, "transfer-encoding: chunked")
    wire.socket.sendall(b'4\r\n{"a"\r\n3;ext=1\r\n:1}\r\n0\r\ntrailer: 1\r\n\r\n')

    assert wire.response().body == b'{"a":1}'
    assert wire.post(b'{"b":2}').status == 200


def test_http_1_0_ends_with_the_connection(plain: Served) -> None:
    wire = plain.wire()
    wire.send(f"POST {PATH} HTTP/1.0", JSON, body=b'{"a":1}')

    assert wire.response().body == b'{"a":1}'
    assert wire.ended()


def test_a_stream_to_http_1_0_has_no_chunks() -> None:
    async def stream(exchange: Exchange) -> None:
        await exchange.start_events()
        await exchange.send_event(b"one")
        exchange.tick(0)
        await exchange.send_event(b"two")
        await exchange.end_events()

    with served(stream) as running:
        wire = running.wire()
        wire.send(f"POST {PATH} HTTP/1.0", JSON, body=b"{}")
        head = wire.until(b"\r\n\r\n")

        assert b"transfer-encoding" not in head
        assert b"connection: close" in head
        body = b"data: one\n\n: ping\n\ndata: two\n\n"
        assert wire.take(len(body)) == body
        assert wire.ended()


def test_a_client_that_expects_100_continue_gets_it_only_if_its_body_is_wanted(plain: Served) -> None:
    wire = plain.wire()
    wire.send(POST, JSON, "expect: 100-continue", "content-length: 7")
    assert wire.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.socket.sendall(b'{"a":1}')
    assert wire.response().status == 200

    wire = plain.wire()
    wire.send(POST, JSON, "expect: 100-continue", "content-length: 10001")

    assert wire.response().status == 413


def test_a_request_for_another_protocol_is_answered_as_http_1(plain: Served) -> None:
    """As Java's client sends its first request."""
    wire = plain.wire()
    upgrade = (
        "connection: Upgrade, HTTP2-Settings",
        "upgrade: h2c",
        "http2-settings: AAEAAEAAAAIAAAABAAMAAABk",
    )
    wire.send(POST, JSON, *upgrade, body=b'{"a":1}')
    assert wire.response().body == b'{"a":1}'
    wire.send(POST, JSON, *upgrade, "content-length: 7")
    wire.socket.sendall(b'{"b":1}')

    assert wire.response().body == b'{"b":1}'


def test_http_1_0_is_kept_when_a_request_for_another_protocol_is_ignored(plain: Served) -> None:
    wire = plain.wire()
    wire.send(f"POST {PATH} HTTP/1.0", JSON, "connection: Upgrade", "upgrade: h2c", body=b'{"a":1}')

    assert wire.response().body == b'{"a":1}'
    assert wire.ended()


def test_options_and_other_methods(plain: Served) -> None:
    wire = plain.wire()
    wire.send(f"OPTIONS {PATH} HTTP/1.1")
    options = wire.response()
    wire.send(f"DELETE {PATH} HTTP/1.1")
    delete = wire.response()

    assert options.status == 204
    assert options.headers["allow"] == delete.headers["allow"] == "POST, GET, HEAD, OPTIONS"
    assert delete.status == 405
    assert delete.error["code"] == "method_not_allowed"


def test_head_has_the_headers_of_get() -> None:
    async def hello(exchange: Exchange) -> None:
        await exchange.reply({"hello": 1})

    with served(hello) as running:
        wire = running.wire()
        wire.send(f"HEAD {PATH} HTTP/1.1")
        head = wire.response("HEAD")
        wire.send(f"GET {PATH} HTTP/1.1")

        assert head.status == 200
        assert head.headers["content-length"] == "11"
        assert wire.response().body == b'{"hello":1}'


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ((), "needs the header `content-type: application/json`"),
        (("content-type: text/plain",), "'text/plain' is not supported"),
        (("content-type: application/x-www-form-urlencoded",), "is not supported"),
        (("content-type: application/json; charset=latin-1",), "charset 'latin-1' is not supported"),
        ((JSON, "content-encoding: gzip"), "content-encoding 'gzip' is not supported"),
    ],
)
def test_other_bodies_than_json_in_utf_8_are_refused(
    plain: Served, headers: tuple[str, ...], said: str
) -> None:
    wire = plain.wire()
    wire.send(POST, *headers, body=gzip.compress(b'{"a":1}'))
    answer = wire.response()

    assert answer.status == 415
    assert said in answer.error["message"]
    assert wire.post(b"{}").status == 200, "the connection is kept"


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf8"']
)
def test_json_may_name_its_charset(plain: Served, kind: str) -> None:
    wire = plain.wire()
    wire.send(POST, f"content-type: {kind}", body='{"a":"ä"}'.encode())

    assert wire.response().body == '{"a":"ä"}'.encode()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is empty"),
        (b"{", "not valid JSON"),
        (b'{"a":1}}', "trailing characters"),
        (b'{"a":"\xff"}', "invalid unicode"),
        (b'{"a":"\\ud83d"}', "not valid JSON"),
        (b'{"a":NaN}', "not valid JSON"),
        (b"[" * 5000, "recursion limit"),
        (b'{"a":' * 1500, "recursion limit"),
        (b"[1]", "is an array"),
        (b'"text"', "is a string"),
        (b"1", "is a number"),
        (b"null", "is null"),
        (b"true", "is a boolean"),
        (b'{"a":' + b"1" * 5000 + b"}", "out of range"),
    ],
)
def test_what_is_not_a_json_object_is_refused_in_words(plain: Served, body: bytes, said: str) -> None:
    answer = plain.wire().post(body)

    assert answer.status == 400
    assert answer.error["code"] == "invalid_json"
    assert said in answer.error["message"]


def test_a_body_over_the_limit_is_refused_before_it_is_read(plain: Served) -> None:
    wire = plain.wire()
    wire.send(POST, JSON, "content-length: 10001")
    answer = wire.response()

    assert answer.status == 413
    assert answer.error["message"] == "the body has 10001 bytes, the limit is 10000"
    assert answer.headers["connection"] == "close"


def test_a_client_that_sends_more_than_the_limit_reads_why(plain: Served) -> None:
    """It has sent megabytes before it reads; a reset would have taken the response from it."""
    wire = plain.wire()
    wire.send(POST, JSON, "transfer-encoding: chunked")
    for _ in range(100):
        wire.socket.sendall(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
    wire.socket.sendall(b"0\r\n\r\n")

    assert wire.response().status == 413
    assert wire.ended()


def test_a_problem_of_the_handler_is_openais_error() -> None:
    async def fail(exchange: Exchange) -> None:
        exchange.params = {"sampling.top_p": "top_p"}
        sent = await exchange.json()
        if sent == {"kind": "mesh"}:
            raise errors.InvalidSampling("sampling.top_p is 3, must be at most 1", field="sampling.top_p")
        if sent == {"kind": "problem"}:
            raise Problem(400, "no", code="nope", param="x")
        raise RuntimeError("secret")

    with served(fail) as running:
        wire = running.wire()
        mesh, problem, bug = (wire.post(b'{"kind":"%s"}' % kind) for kind in (b"mesh", b"problem", b"bug"))

    assert (mesh.status, mesh.error) == (
        400,
        {
            "message": "top_p is 3, must be at most 1",
            "type": "invalid_request_error",
            "param": "top_p",
            "code": "invalid_sampling",
        },
    )
    assert (problem.status, problem.error["code"], problem.error["param"]) == (400, "nope", "x")
    assert bug.status == 500
    assert "details" in bug.error["message"]
    assert "secret" not in bug.error["message"]


def test_an_error_in_a_stream_is_its_last_event() -> None:
    async def stream(exchange: Exchange) -> None:
        await exchange.start_events({"x-headrace-tier": "small"})
        await exchange.send_event(b'{"n":1}')
        raise errors.NoWorkers("no worker is left", retry_after=0.5)

    with served(stream) as running:
        wire = running.wire()
        answer = wire.post(b"{}")

        assert answer.status == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-headrace-tier"] == "small"
        assert answer.events[0] == '{"n":1}'
        assert json.loads(answer.events[1])["error"]["code"] == "no_workers"
        assert len(answer.events) == 2
        assert wire.post(b"{}").status == 200


def test_a_quiet_stream_has_comments() -> None:
    go = threading.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.start_events()
        await asyncio.to_thread(go.wait)
        await exchange.send_event(b"done")
        await exchange.end_events()

    with served(stream, ping_seconds=0.03) as running:
        wire = running.wire()
        wire.send(POST, JSON, body=b"{}")
        wire.until(b": ping\n\n")
        wire.until(b": ping\n\n")
        go.set()
        wire.until(b"data: done\n\n")

        assert b"0\r\n\r\n" in wire.until(b"0\r\n\r\n")


def test_requests_beyond_the_limit_are_told_to_retry() -> None:
    go = threading.Event()

    async def wait(exchange: Exchange) -> None:
        await asyncio.to_thread(go.wait)
        await exchange.reply({})

    with served(wait, max_calls=4) as running:
        waiting = [running.wire() for _ in range(3)]  # a host may have three quarters
        for wire in waiting:
            wire.send(POST, JSON, body=b"{}")
        eventually(lambda: running.http.budget.calls == 3)
        answer = running.wire().post(b"{}")
        go.set()

        assert answer.status == 429
        assert answer.error["type"] == "rate_limit_error"
        assert answer.error["code"] == "server_busy"
        assert answer.headers["retry-after"] == "1"
        assert 500 <= int(answer.headers["retry-after-ms"]) <= 1000
        assert all(wire.response().status == 200 for wire in waiting)
        eventually(lambda: running.http.budget.calls == 0)


def test_bodies_in_flight_are_bounded() -> None:
    with served(max_body_bytes=10_000, max_inflight_bytes=40_000) as running:
        partial = [running.wire() for _ in range(2)]
        for wire in partial:
            wire.send(POST, JSON, "content-length: 10000")
            wire.socket.sendall(b" " * 6_000)
        eventually(lambda: running.http.budget.bytes == 12_000)  # a host may have 15,000 of incomplete ones
        refused = running.wire()
        refused.send(POST, JSON, "content-length: 10000")
        refused.socket.sendall(b" " * 6_000)

        assert refused.response().status == 429
        for wire in partial:
            wire.socket.sendall(b" " * 3_998 + b"{}")
            assert wire.response().status == 200
        eventually(lambda: running.http.budget.bytes == 0)


def test_a_client_that_leaves_cancels_its_request_in_any_state() -> None:
    seen: list[str] = []

    async def handle(exchange: Exchange) -> None:
        kind = (await exchange.json())["kind"]
        try:
            if kind != "whole":
                await exchange.start_events()
            seen.append(kind)
            while kind == "reading":
                await exchange.send_event(b"x" * 1000)
            await asyncio.sleep(1000)
        finally:
            seen.append(f"{kind} ended")

    with served(handle) as running:
        for kind in ("whole", "streaming", "reading"):
            wire = running.wire()
            wire.send(POST, JSON, body=json.dumps({"kind": kind}).encode())
            eventually(lambda kind=kind: kind in seen)  # type: ignore[misc]
            wire.close()
            eventually(lambda kind=kind: f"{kind} ended" in seen)  # type: ignore[misc]
        wire = running.wire()
        wire.send(POST, JSON, body=b'{"kind":"whole"}')
        wire.send(POST, JSON, body=b'{"kind":"never"}')
        eventually(lambda: seen.count("whole") == 2)
        wire.socket.shutdown(socket.SHUT_WR)
        eventually(lambda: seen.count("whole ended") == 2)
        eventually(lambda: running.http.requests.in_flight == 0)

    assert "never" not in seen


def test_a_handler_that_is_cancelled_for_the_client_may_still_clean_up() -> None:
    cleaned = threading.Event()

    async def handle(exchange: Exchange) -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    with served(handle) as running:
        wire = running.wire()
        wire.send(POST, JSON, body=b"{}")
        eventually(lambda: running.http.requests.in_flight == 1)
        wire.close()
        assert cleaned.wait(30)
        eventually(lambda: running.http.requests.in_flight == 0)


def test_a_large_body_is_parsed_whole_and_one_with_too_many_values_is_refused() -> None:
    ids = json.dumps({"ids": list(range(131_072))}).encode()
    bomb = b'{"a":[' + b",".join([b"[]"] * 600_000) + b"]}"
    text = json.dumps({"text": "a,b[" * 400_000}).encode()
    with served() as running:
        wire = running.wire()
        whole, refused, long = wire.post(ids), wire.post(bomb), wire.post(text)

    assert len(json.loads(whole.body)["ids"]) == 131_072
    assert refused.status == 400
    assert "600002 objects and arrays" in refused.error["message"]
    assert long.status == 200


def test_the_echo_is_what_was_sent(plain: Served) -> None:
    assert plain.wire().post(b'{"\\u0061":[1.5,-0,1e3,true,null,"\\ud83d\\ude00"]}').body == (
        '{"a":[1.5,0,1000.0,true,null,"😀"]}'.encode()
    )

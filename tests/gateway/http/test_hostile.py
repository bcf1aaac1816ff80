"""Clients that are slow, broken or malicious harm only themselves."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator

import pytest

from headrace.gateway.http import request_body
from headrace.gateway.http.exchange import Exchange
from tests.gateway.http.served import JSON, PATH, Served, eventually, served

POST = f"POST {PATH} HTTP/1.1"
GET = f"GET {PATH} HTTP/1.1"


@pytest.fixture(scope="module")
def plain() -> Iterator[Served]:
    with served(max_header_bytes=4096) as running:
        yield running


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\nhost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS on a port without it
        b"GET / HTTP/1.1\r\n\r\n",  # no host
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost : a\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n x: folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: \x00\r\n\r\n",
        b"GET / HTTP/1.1\nhost: a\n\n",
        b"GET  HTTP/1.1\r\nhost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +3\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused_and_ends_the_connection(plain: Served, request_bytes: bytes) -> None:
    wire = plain.wire()
    wire.socket.sendall(request_bytes)
    answer = wire.response()

    assert answer.status in (400, 405)
    assert answer.error["type"] == "invalid_request_error"
    assert answer.headers["connection"] == "close"
    assert wire.ended()


@pytest.mark.parametrize("garbage", [b"zz\r\n", b"5\r\nabcdefgh\r\n", b"ffffffffffffffffff\r\n", b"-1\r\n"])
def test_garbage_in_a_chunked_body_is_refused(plain: Served, garbage: bytes) -> None:
    wire = plain.wire()
    wire.send(POST, JSON, "transfer-encoding: chunked")
    eventually(lambda: plain.http.requests.in_flight == 1)
    wire.socket.sendall(garbage)

    assert wire.response().status == 400
    assert wire.ended()
    eventually(lambda: plain.http.requests.in_flight == 0)


def test_the_target_of_connect_is_not_reached(plain: Served) -> None:
    wire = plain.wire()
    wire.socket.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\n")

    assert wire.response().status in (400, 405)


@pytest.mark.parametrize(
    "lines",
    [
        (f"GET {PATH}?{'x' * 5000} HTTP/1.1",),
        (GET, "x: " + "y" * 5000),
        (GET, *(f"x{n}: {'y' * 100}" for n in range(50))),
    ],
)
@pytest.mark.parametrize("pieces", [1, 30])
def test_headers_beyond_the_limit_are_refused(plain: Served, lines: tuple[str, ...], pieces: int) -> None:
    wire = plain.wire()
    data = "\r\n".join((*lines, "host: test", "", "")).encode()
    size = len(data) // pieces + 1
    for at in range(0, len(data), size):
        wire.socket.sendall(data[at : at + size])

    answer = wire.response()
    assert answer.status == 431
    assert answer.error["code"] == "headers_too_large"


def test_headers_without_an_end_are_refused(plain: Served) -> None:
    wire = plain.wire()
    wire.socket.sendall(f"{GET}\r\nx: ".encode())
    for _ in range(100):
        wire.socket.sendall(b"y" * 1000)

    assert wire.response().status == 431


def test_too_many_headers_are_refused(plain: Served) -> None:
    wire = plain.wire()
    wire.send(GET, *(f"x{n}: 1" for n in range(101)))

    assert wire.response().error["code"] == "too_many_headers"


def test_a_large_body_does_not_count_as_headers(plain: Served) -> None:
    """The headers of the next request begin in the same packet."""
    wire = plain.wire()
    body = json.dumps({"text": "x" * 50_000}).encode()
    start = f"{POST}\r\nhost: a\r\n{JSON}\r\ncontent-length: {len(body)}\r\n".encode()
    for _ in range(3):
        wire.socket.sendall(b"\r\n" + body + start if _ else start)
    wire.socket.sendall(b"\r\n" + body)

    assert [len(wire.response().body) > 50_000 for _ in range(3)] == [True] * 3


def test_a_request_within_a_body_is_only_a_body(plain: Served) -> None:
    wire = plain.wire()
    inner = b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"
    wire.send(POST, JSON, body=inner)

    assert wire.response().error["code"] == "invalid_json"
    assert wire.post(b'{"next":1}').body == b'{"next":1}'


def test_an_unread_body_never_becomes_a_request(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request is refused before its body is read; what follows is not a second one."""
    monkeypatch.setattr(request_body, "LINGER_SECONDS", 0.1)
    wire = plain.wire()
    wire.send(POST, "content-type: text/plain", "content-length: 200000")
    refused = wire.response()
    wire.socket.sendall(f"{GET}\r\nhost: a\r\n\r\n".encode())

    assert refused.status == 415
    assert refused.headers["connection"] == "close"
    assert wire.ended()


def test_garbage_behind_a_request_does_not_break_its_answer() -> None:
    go = threading.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.start_events()
        await asyncio.to_thread(go.wait)
        await exchange.send_event(b"whole")
        await exchange.end_events()

    with served(stream) as running:
        wire = running.wire()
        wire.send(POST, JSON, body=b"{}")
        wire.send(POST, JSON, body=b"{}")
        eventually(lambda: running.http.requests.in_flight == 1)
        wire.socket.sendall(b"garbage\r\n\r\n")
        time.sleep(0.05)
        go.set()

        assert [wire.response().events for _ in range(2)] == [["whole"]] * 2
        assert wire.ended()


def test_a_client_that_sends_no_headers_is_closed_in_time() -> None:
    with served(header_seconds=0.2) as running:
        silent, slow, kept, blank = (running.wire() for _ in range(4))
        slow.socket.sendall(b"POST ")
        assert kept.post(b"{}").status == 200
        kept.socket.sendall(b"G")  # the next request begins, and stops
        assert blank.post(b"{}").status == 200
        blank.socket.sendall(b"\r\n")

        assert silent.ended()
        for wire in (slow, kept):
            answer = wire.response()
            assert answer.status == 408
            assert answer.error["code"] == "header_timeout"
            assert wire.ended()
        assert blank.ended()


def test_one_byte_now_and_then_does_not_keep_a_connection() -> None:
    with served(header_seconds=0.1) as running:
        wire = running.wire()
        with pytest.raises(OSError):  # noqa: PT011 # of one kind or another, once the server has closed it
            for byte in f"{GET}\r\nx: ".encode() + b"y" * 4000:
                wire.socket.sendall(bytes((byte,)))
                time.sleep(0.01)


def test_a_body_that_does_not_arrive_is_refused_in_time() -> None:
    with served(body_seconds=0.1) as running:
        wire = running.wire()
        wire.send(POST, JSON, "content-length: 100")
        wire.socket.sendall(b"{")
        answer = wire.response()

        assert answer.status == 408
        assert answer.error["code"] == "body_timeout"
        assert answer.headers["connection"] == "close"
        eventually(lambda: running.http.budget.bytes == 0)


def test_an_idle_connection_is_closed_in_time() -> None:
    with served(idle_seconds=0.1) as running:
        wire = running.wire()
        assert wire.post(b"{}").status == 200

        assert wire.ended()


@pytest.mark.parametrize("whole", [True, False])
def test_a_client_that_does_not_read_delays_only_itself_and_is_closed_in_time(whole: bool) -> None:
    sent = [0]

    async def flood(exchange: Exchange) -> None:
        if not await exchange.json():
            await exchange.reply({})
        elif whole:
            sent[0] = 1
            await exchange.reply(b"x" * 50_000_000)
        else:
            await exchange.start_events()
            while True:
                await exchange.send_event(b"x" * 10_000)
                sent[0] += 1

    with served(flood, unread_seconds=0.4) as running:
        wire = running.wire()
        wire.send(POST, JSON, body=b'{"flood":1}')
        eventually(lambda: sent[0] > 0)
        assert running.wire().post(b"{}").status == 200
        eventually(lambda: running.http.requests.in_flight == 0)

        assert sent[0] < 2000, "what was not read is bounded"
        eventually(lambda: len(running.listening.state.connections) <= 1)


def test_a_client_that_reads_slowly_gets_the_whole_answer() -> None:
    """However long it takes: only one that reads nothing is closed."""
    size = 16_000_000

    async def long(exchange: Exchange) -> None:
        await exchange.reply(b"x" * size)

    with served(long, unread_seconds=1.0, idle_seconds=0.2) as running:
        wire = running.wire()
        wire.send(POST, JSON, body=b"{}")
        wire.until(b"\r\n\r\n")
        for _ in range(40):
            wire.take(size // 40)
            time.sleep(0.05)

        assert wire.ended()


def test_a_short_answer_that_is_not_read_does_not_keep_a_connection_open_forever() -> None:
    """The system takes the answer from the server, or the server closes the connection."""
    with served(unread_seconds=0.2, idle_seconds=0.2) as running:
        wire = running.wire()
        wire.send(POST, JSON, body=b"{}")

        eventually(lambda: not running.listening.state.connections)


def test_connections_beyond_the_limit_are_refused() -> None:
    with served(max_connections=3) as running:
        wires = [running.wire() for _ in range(3)]
        assert all(wire.post(b"{}").status == 200 for wire in wires)
        refused = running.wire()
        answer = refused.response()

        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert refused.ended()
        wires[0].close()
        eventually(lambda: len(running.listening.state.connections) < 3)
        assert running.wire().post(b"{}").status == 200


def test_a_flood_of_pipelined_requests_is_bounded() -> None:
    go = threading.Event()

    async def wait(exchange: Exchange) -> None:
        await asyncio.to_thread(go.wait)
        await exchange.reply({})

    with served(wait) as running:
        wire = running.wire()
        wire.socket.sendall(f"{GET}\r\nhost: a\r\n\r\n".encode() * 2000)
        eventually(lambda: running.http.requests.in_flight == 1)
        (connection,) = running.listening.state.connections
        eventually(lambda: len(connection.pipeline) == 32)  # type: ignore[union-attr]
        go.set()
        answers = [wire.response() for _ in range(33)]

        assert {answer.status for answer in answers} == {200}
        assert wire.ended()


def test_a_client_that_resets_its_connections_leaves_nothing(plain: Served) -> None:
    for data in (b"", b"POST", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n123"):
        wire = plain.wire()
        wire.socket.sendall(data)
        wire.socket.setsockopt(1, 13, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # SO_LINGER of 0: RST
        wire.close()

    eventually(lambda: plain.http.requests.in_flight == 0)
    assert plain.wire().post(b"{}").status == 200

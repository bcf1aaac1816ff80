"""Servers with OpenAI's API are measured over real HTTP, whatever they do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace.bearer import BadToken
from headrace.cli.bench.backends.openai import OpenAiBackend, OpenAiOptions, connect_openai
from headrace.cli.bench.load import Run, send
from headrace.cli.bench.options import BadOption, Load
from headrace.cli.bench.prompts import ListedPrompts, Prompt
from headrace.cli.bench.records import (
    DISCONNECTED,
    ENDED_EARLY,
    ERROR_EVENT,
    MALFORMED,
    TIMEOUT,
    Failed,
    Record,
)
from headrace.cli.calls.connection import Connection
from headrace.tls.files import BadTls
from tests.cli.bench.servers import DONE, Hangup, Write, chunk, event, serving, usage, words
from tests.harness import PATIENCE, eventually

PROMPT = Prompt((("system", "be short"), ("user", "one two three")), 4)
NOWHERE = Connection(target="")


@asynccontextmanager
async def backend(
    url: str, connection: Connection = NOWHERE, **options: Any
) -> AsyncGenerator[OpenAiBackend, None]:
    async with connect_openai(OpenAiOptions(url=url, **options), connection) as made:
        yield made


async def ask(url: str, prompt: Prompt = PROMPT, *, timeout: float = PATIENCE, **options: Any) -> Record:
    record = Record(parts=[])
    async with backend(url, **options) as made:
        await made.ask(prompt, record, timeout=timeout)
        assert record.parts == [] or made.text_of(record) != ""
    return record


async def test_a_chat_is_sent_and_measured() -> None:
    async with serving() as server:
        record = await ask(server.url, temperature=0.5)

    assert (record.complete, record.finish, record.tokens) == (True, "length", 4)
    assert (record.input_tokens, record.output_tokens, record.model) == (5, 4, "m")
    assert len(record.times) == 4
    assert server.paths == ["/v1/chat/completions"]
    assert server.bodies == [
        {
            "model": "first",
            "messages": [
                {"role": "system", "content": "be short"},
                {"role": "user", "content": "one two three"},
            ],
            "max_tokens": 4,
            "temperature": 0.5,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert "authorization" not in server.headers[0]


async def test_raw_text_is_sent_to_completions() -> None:
    async with serving() as server:
        await ask(
            server.url + "/", Prompt((("user", "one two"),), 3, exact=True), chat_api=False, model="mine"
        )

    assert server.paths == ["/v1/completions"]
    assert server.bodies[0]["prompt"] == "one two"
    assert server.bodies[0]["ignore_eos"] is True
    assert server.bodies[0]["model"] == "mine"


async def test_fields_can_be_added_and_removed() -> None:
    async with serving() as server:
        await ask(
            server.url, extra_body={"stream_options": None, "temperature": None, "top_k": 3}, temperature=1.0
        )

    assert "stream_options" not in server.bodies[0]
    assert "temperature" not in server.bodies[0]
    assert server.bodies[0]["top_k"] == 3


async def test_a_key_and_headers_are_sent(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("from-file\n")
    async with serving() as server:
        await ask(server.url, api_key="secret", headers={"x-tenant": "a"})
        async with backend(server.url, Connection(target="", token_file=token)) as made:
            await made.ask(PROMPT, Record(), timeout=PATIENCE)

    assert server.headers[0]["authorization"] == "Bearer secret"
    assert server.headers[0]["x-tenant"] == "a"
    assert server.headers[1]["authorization"] == "Bearer from-file"


async def test_a_key_is_not_sent_in_plain_text_to_another_machine() -> None:
    with pytest.raises(BadToken, match="without TLS"):
        await ask("http://192.0.2.1/v1", api_key="secret")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8080/v1", "must start with http"),
        ("ftp://h/v1", "must start with http"),
        ("http://", "must start with http"),
        ("http://h:99999/v1", "[Pp]ort"),
        ("http://h:x/v1", "[Pp]ort"),
        ("http://[::1/v1", "IPv6"),
        ("http://h/v1/chat/completions", "must be the base URL"),
        ("http://h/v1/completions/", "must be the base URL"),
    ],
)
async def test_a_bad_url_is_explained(url: str, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        await ask(url, model="m")


async def test_bad_files_of_tls_are_explained(tmp_path: Path) -> None:
    with pytest.raises(BadTls):
        async with backend("https://127.0.0.1:1/v1", Connection(target="", ca=tmp_path / "none.pem")):
            pass


async def failure(url: str, **options: Any) -> Failed:
    with pytest.raises(Failed) as raised:
        await ask(url, model="m", **options)
    return raised.value


@pytest.mark.parametrize(
    ("status", "error", "kind", "message"),
    [
        (429, {"message": "slow down", "code": "rate_limit"}, "HTTP 429 rate_limit", "slow down"),
        (503, {"message": "full", "type": "overloaded", "code": None}, "HTTP 503 overloaded", "full"),
        (500, "<html>oops", "HTTP 500", "<html>oops"),
        (404, {}, "HTTP 404", "{}"),
        (400, None, "HTTP 400", "None"),
    ],
)
async def test_a_status_is_a_kind_of_failure(status: int, error: object, kind: str, message: str) -> None:
    async with serving(status=status, error=error) as server:
        failed = await failure(server.url)

    assert (failed.kind, str(failed)) == (kind, message)


async def stalls(body: dict[str, Any], write: Write) -> None:
    await write(chunk("a"))
    await asyncio.Event().wait()


async def hangs_up(body: dict[str, Any], write: Write) -> None:
    await write(chunk("a"))
    raise Hangup


async def ends_early(body: dict[str, Any], write: Write) -> None:
    await write(chunk("a"))


async def garbles(body: dict[str, Any], write: Write) -> None:
    await write(chunk("a") + b"data: {oops\n\n")


async def breaks(body: dict[str, Any], write: Write) -> None:
    await write(chunk("a") + event({"error": {"message": "gone", "code": "worker_lost"}}))


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (hangs_up, DISCONNECTED),
        (ends_early, ENDED_EARLY),
        (garbles, MALFORMED),
        (breaks, f"{ERROR_EVENT} worker_lost"),
    ],
)
async def test_a_stream_that_breaks_is_a_failure(behaviour: Any, kind: str) -> None:
    async with serving(behaviour) as server:
        assert (await failure(server.url)).kind == kind


async def test_a_server_that_stalls_is_left_in_time() -> None:
    async with serving(stalls) as server:
        assert (await failure(server.url, timeout=0.2)).kind == TIMEOUT
        await eventually(lambda: server.in_flight == 0)


async def in_parts(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the list of models in many packets."""
    body = json.dumps({"data": [{"id": f"model-{number}"} for number in range(100)]}).encode()
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body))
    for start in range(0, len(body), 500):
        writer.write(body[start : start + 500])
        await writer.drain()
        await asyncio.sleep(0.01)
    writer.close()


async def test_a_list_of_models_that_arrives_in_parts_is_read_as_a_whole() -> None:
    async with await asyncio.start_server(in_parts, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with asyncio.timeout(PATIENCE), backend(f"http://127.0.0.1:{port}/v1") as made:
            assert made.model == "model-0"


async def test_a_redirect_is_not_followed() -> None:
    """It would send keys in headers to another server."""

    async def moved(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        location = b"location: %s/models\r\n" % elsewhere.url.encode()
        writer.write(b"HTTP/1.1 302 Found\r\n" + location + b"content-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with serving() as elsewhere, await asyncio.start_server(moved, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        assert (await failure(url)).kind == "HTTP 302"
        with pytest.raises(Failed, match="Found"):
            await ask(url)


async def test_a_server_is_not_asked_to_compress_its_answers() -> None:
    async with serving() as server:
        await ask(server.url)

    assert server.headers[0]["accept-encoding"] == "identity"


async def test_an_answer_that_is_not_streamed_is_a_failure() -> None:
    async with serving(status=200) as server:
        assert (await failure(server.url.removesuffix("/v1") + "/nothing")).kind.startswith("HTTP 404")
    async with serving(models={"data": []}) as server:
        with pytest.raises(Failed, match="lists no model"):
            await ask(server.url)
        async with backend(server.url, model="m") as made:
            made._post = server.url + "/models"  # answers JSON to GET only
            with pytest.raises(Failed, match="405"):
                await made.ask(PROMPT, Record(), timeout=PATIENCE)


async def test_no_server_is_a_failed_connection(unused_port: int) -> None:
    failed = await failure(f"http://127.0.0.1:{unused_port}/v1")

    assert failed.kind == "connection failed"
    assert "refused" in str(failed).lower()


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


async def no_usage(body: dict[str, Any], write: Write) -> None:
    for _ in range(3):
        await write(chunk("a"))
    await write(chunk(finish="stop") + DONE)


async def test_tokens_are_counted_by_events_if_the_server_does_not() -> None:
    async with serving(no_usage) as server:
        record = await ask(server.url)

    assert (record.output_tokens, record.tokens) == (None, 3)


async def open_after_done(body: dict[str, Any], write: Write) -> None:
    await write(chunk("a", finish="stop") + usage(1, 1) + DONE)
    await asyncio.Event().wait()


async def test_a_server_that_does_not_end_after_the_last_event_is_left() -> None:
    async with serving(open_after_done) as server:
        record = await ask(server.url)
        await eventually(lambda: server.in_flight == 0)

    assert record.complete


async def test_many_requests_use_as_many_connections_as_are_in_flight() -> None:
    gate = asyncio.Event()

    async def gated(body: dict[str, Any], write: Write) -> None:
        await gate.wait()
        await words(body, write)

    prompts, run = ListedPrompts([PROMPT], max_tokens=2), Run()
    async with serving(gated) as server, backend(server.url) as made:
        sending = asyncio.create_task(send(made, prompts, Load(concurrency=150, requests=300), run))
        await eventually(lambda: server.in_flight == 150)
        gate.set()
        await sending

    assert (run.completed, run.failed) == (300, 0)
    assert server.most == 150

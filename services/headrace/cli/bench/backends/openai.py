"""Send requests to a server with OpenAI's API over HTTP, and read its streamed answers."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import time
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp

from headrace.bearer import Authorization, authorization_of, check_plaintext
from headrace.channel import is_local, join
from headrace.cli.bench.backends.events import EventReader, described, text_in
from headrace.cli.bench.options import BadOption
from headrace.cli.bench.records import DISCONNECTED, NOT_STREAMED, TIMEOUT, Failed
from headrace.tls.files import BadTls

if TYPE_CHECKING:
    from pathlib import Path

    from headrace.cli.bench.prompts import Prompt
    from headrace.cli.bench.records import Record
    from headrace.cli.calls.connection import Connection

CONNECT_SECONDS = 10.0
# Servers close idle connections, uvicorn after five seconds. A request that is sent at that moment would fail
# and must not be repeated, so the connections are closed here first.
IDLE_SECONDS = 4.0
MAX_ERROR_BYTES = 2**16

_CHAT, _COMPLETIONS = "chat/completions", "completions"


@dataclass(frozen=True, kw_only=True)
class OpenAiOptions:
    """How requests are made.

    url           the base URL, which ends in /v1 for most servers
    model         name of the model; empty: the first one that the server lists
    chat_api      whether prompts are sent to chat/completions; else as raw text to completions
    api_key       sent as bearer token; empty: none
    headers       additional headers
    extra_body    merged into the body of each request; None removes a field
    """

    url: str
    model: str = ""
    temperature: float | None = None
    chat_api: bool = True
    api_key: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)


class OpenAiBackend:
    """A server with OpenAI's API; use `connect_openai` to create it."""

    def __init__(
        self, session: aiohttp.ClientSession, options: OpenAiOptions, authorization: Authorization
    ) -> None:
        self.name = "openai-chat" if options.chat_api else "openai"
        self.where = options.url
        self.model = options.model
        self._session = session
        self._options = options
        self._authorization = authorization
        base = options.url.rstrip("/")
        self._models = f"{base}/models"
        self._post = f"{base}/{_CHAT if options.chat_api else _COMPLETIONS}"

    async def find_model(self) -> None:
        """Use the first model that the server lists, unless one was given. Raises Failed."""
        if self.model:
            return
        with _failures():
            async with (
                asyncio.timeout(CONNECT_SECONDS),
                self._session.get(self._models, **self._request()) as response,
            ):
                if response.status != 200:
                    raise await _refused(response)
                body = await _read(response, MAX_ERROR_BYTES * 16)
        try:
            self.model = str(json.loads(body)["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise Failed(NOT_STREAMED, f"{self._models} lists no model; give one with --model") from None

    async def ask(self, prompt: Prompt, record: Record, *, timeout: float) -> None:
        """Send one request; see `Backend`."""
        body = self._body(prompt)
        reader = EventReader(record)
        now = time.perf_counter
        with _failures():
            async with (
                asyncio.timeout(timeout),
                self._session.post(self._post, data=body, **self._request()) as response,
            ):
                if response.status != 200:
                    raise await _refused(response)
                if response.content_type != "text/event-stream":
                    raise Failed(
                        NOT_STREAMED, f"the answer is {response.content_type!r}, not text/event-stream"
                    )
                record.tier = response.headers.get("x-headrace-tier", "")[:200]
                async for piece in response.content.iter_any():
                    reader.feed(piece, now())
                    if reader.done:
                        break
                with suppress(TimeoutError):
                    # The end of the body mostly comes with [DONE]. Else the connection is not used again.
                    async with asyncio.timeout(1.0):
                        await response.content.read()
        reader.end()

    def text_of(self, record: Record) -> str:
        """Return the text of an answer."""
        return "".join(map(text_in, record.parts or ()))

    def _request(self) -> dict[str, Any]:
        # Nothing is decompressed here: that would delay and combine events.
        sent = {
            "content-type": "application/json",
            "accept": "text/event-stream",
            "accept-encoding": "identity",
        }
        headers = {**sent, **dict(self._authorization()), **self._options.headers}
        # A redirect would send keys in headers to another server, and a POST as a GET.
        return {"headers": headers, "allow_redirects": False}

    def _body(self, prompt: Prompt) -> bytes:
        fields: dict[str, Any] = {"model": self.model}
        if self._options.chat_api:
            fields["messages"] = [{"role": role, "content": text} for role, text in prompt.turns]
        else:
            fields["prompt"] = prompt.text
        fields |= {"max_tokens": prompt.max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        if self._options.temperature is not None:
            fields["temperature"] = self._options.temperature
        if prompt.exact:
            fields["ignore_eos"] = True
        fields |= self._options.extra_body
        return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


@asynccontextmanager
async def connect_openai(
    options: OpenAiOptions, connection: Connection
) -> AsyncGenerator[OpenAiBackend, None]:
    """Open a backend; *connection* has the files of TLS and of a token.

    Raises BadOption, BadTls, BadToken, and Failed if the server does not list its models and none is given.
    """
    try:
        parts = urlsplit(options.url)
        port = parts.port
    except ValueError as error:
        raise BadOption(f"--url {options.url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadOption(
            f"--url {options.url!r} must start with http:// or https://: http://127.0.0.1:8080/v1"
        )
    if parts.path.rstrip("/").endswith(f"/{_COMPLETIONS}"):
        raise BadOption(
            f"--url {options.url!r} must be the base URL, which usually ends in /v1; see --endpoint"
        )
    authorization = authorization_of(options.api_key, connection.token_file)
    address = join(parts.hostname, port or 80)
    if parts.scheme == "http" and authorization():
        check_plaintext(address, allowed=connection.plaintext_token)
    connector = aiohttp.TCPConnector(
        limit=0, keepalive_timeout=IDLE_SECONDS, ssl=_tls(connection) if parts.scheme == "https" else True
    )
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, trust_env=not is_local(address), auto_decompress=False
    ) as session:
        backend = OpenAiBackend(session, options, authorization)
        await backend.find_model()
        yield backend


def _tls(connection: Connection) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=_name(connection.ca))
        if connection.cert is not None:
            context.load_cert_chain(connection.cert, connection.key)
    except (OSError, ssl.SSLError) as error:
        raise BadTls(f"the files of TLS cannot be used: {error}") from None
    return context


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes:
    """Return the body, or its first *most* bytes: one call of aiohttp's `read` returns what has arrived."""
    body = b""
    while len(body) < most and (piece := await response.content.read(most - len(body))):
        body += piece
    return body


async def _refused(response: aiohttp.ClientResponse) -> Failed:
    """Return the failure that a response with another status than 200 describes."""
    kind = f"HTTP {response.status}"
    body = await _read(response, MAX_ERROR_BYTES)
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return Failed(kind, body[:200].decode(errors="replace").strip() or (response.reason or ""))
    return Failed(*described(error, kind))


@contextmanager
def _failures() -> Generator[None, None, None]:
    """Convert the errors of HTTP to Failed."""
    try:
        yield
    except TimeoutError:
        raise Failed(TIMEOUT, "no complete answer in time") from None
    except aiohttp.ClientConnectorError as error:
        raise Failed("connection failed", _cause(error.os_error)) from error
    except (aiohttp.ClientError, OSError) as error:
        raise Failed(DISCONNECTED, f"{type(error).__name__}: {error}") from error


def _cause(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)

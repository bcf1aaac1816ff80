"""Serve the metrics of this process to Prometheus, over plain HTTP on a port of its own.

The server has a thread with an event loop of its own, so a slow scraper does not delay the service. However
many there are, they take less than a tenth of a core: connections are accepted one after the other with
pauses, and the text is not written again too soon.

The text is written here rather than by opentelemetry-exporter-prometheus, which is a pre-release and reads
only the SDK's instruments. The format is version 0.0.4 of
https://prometheus.io/docs/instrumenting/exposition_formats/, and names are translated as OpenTelemetry's
compatibility specification says.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from itertools import accumulate
from typing import Any

from headrace.channel import join
from headrace.metrics import instruments
from headrace.metrics.catalogue import METRICS

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PATH = "/metrics"
MAX_CONNECTIONS = 16  # further ones are closed
ACCEPT_SECONDS = 0.01  # between two connections: accepting as many as possible would cost most of a core
EXCHANGE_SECONDS = 10.0  # from the connection to the end of the response
REQUEST_BYTES = 16 * 1024
_IDLE_SHARE = 19  # the text is kept for this many times the time that it took: scrapes take 5 % of a core
_START_SECONDS = 10.0
_ALL_ADDRESSES = ("0.0.0.0", "::")


class Text:
    """The text of all metrics, written again when it is asked for, but not too often.

    labels   of every series
    target   of the series target_info
    """

    def __init__(self, labels: Mapping[str, str], target: Mapping[str, str]) -> None:
        self._labels = labels
        self._target = target
        self._kept = b""
        self._fresh_until = 0.0

    def current(self) -> bytes:
        """Return the text."""
        now = time.monotonic()
        if now >= self._fresh_until:
            self._kept = "".join(self._lines()).encode(errors="replace")
            done = time.monotonic()
            self._fresh_until = done + _IDLE_SHARE * (done - now)
        return self._kept

    def _lines(self) -> Iterator[str]:
        yield "# HELP target_info The process that is scraped.\n# TYPE target_info gauge\n"
        yield f"target_info{_braces({**self._target, **self._labels})} 1\n"
        for metric in METRICS:
            yield from _metric_lines(metric, self._labels)


def _metric_lines(metric: instruments.Metric[Any], common: Mapping[str, str]) -> Iterator[str]:
    name, first = metric.prometheus_name, True
    for labels, series in metric:
        if first:
            first = False
            yield f"# HELP {name} {_escaped(metric.description)}\n# TYPE {name} {metric.kind}\n"
        labels = {**{_label(key): value for key, value in labels.items()}, **common}
        if isinstance(series, instruments.HistogramSeries):
            cumulated = list(accumulate(series.counts))
            inner = _inner(labels)
            bounds = [*map(_number, metric.bounds), "+Inf"]
            for bound, count in zip(bounds, cumulated, strict=True):
                yield f'{name}_bucket{{{inner},le="{bound}"}} {count}\n'
            yield f"{name}_sum{{{inner}}} {_number(series.total)}\n"
            yield f"{name}_count{{{inner}}} {cumulated[-1]}\n"
        else:
            yield f"{name}{_braces(labels)} {_number(series.value)}\n"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _label(name: str) -> str:
    return name.replace(".", "_")


def _braces(labels: Mapping[str, str]) -> str:
    return f"{{{_inner(labels)}}}"


def _inner(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value, quotes=True)}"' for name, value in labels.items())


def _escaped(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text


@asynccontextmanager
async def endpoint(host: str, port: int, text: Callable[[], bytes]) -> AsyncGenerator[int, None]:
    """Serve *text* at http://HOST:PORT/metrics while the block runs; yield the port.

    port   0 picks a free one

    Raises OSError if it cannot listen.
    """
    server = _Server(host, port, text)
    bound = await asyncio.to_thread(server.start)
    log.info("metrics are served", extra={"url": f"http://{join(host, bound)}{PATH}"})
    try:
        yield bound
    finally:
        await asyncio.to_thread(server.stop)


class _Server:
    """An HTTP server on a thread of its own."""

    def __init__(self, host: str, port: int, text: Callable[[], bytes]) -> None:
        self._host, self._port, self._text = host, port, text
        self._exchanges: set[asyncio.Task[None]] = set()
        self._loop = asyncio.SelectorEventLoop()
        self._stopping = asyncio.Event()
        self._listening = threading.Event()
        self._problem: OSError | UnicodeError | None = None
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> int:
        """Listen; return the port. Raises OSError."""
        self._thread.start()
        if not self._listening.wait(_START_SECONDS):
            raise OSError("it did not start in time")
        if self._problem is not None:
            raise self._problem
        return self._port

    def stop(self) -> None:
        """Close the port and all connections."""
        with suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(EXCHANGE_SECONDS)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except (OSError, UnicodeError) as error:
            self._problem = error
        finally:
            self._listening.set()
            self._loop.close()

    async def _serve(self) -> None:
        listening = _listen(self._host, self._port)
        self._port = listening[0].getsockname()[1]
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._accept(one, tasks)) for one in listening]
                self._listening.set()
                await self._stopping.wait()
                for task in (*running, *self._exchanges):
                    task.cancel()
        finally:
            for one in listening:
                one.close()

    async def _accept(self, listening: socket.socket, tasks: asyncio.TaskGroup) -> None:
        while True:
            with suppress(OSError):  # the other end is gone already, or there are too many open files
                connection, _ = await self._loop.sock_accept(listening)
                if len(self._exchanges) < MAX_CONNECTIONS:
                    task = tasks.create_task(self._exchange(connection))
                    self._exchanges.add(task)
                    task.add_done_callback(self._exchanges.discard)
                else:
                    connection.close()
            await asyncio.sleep(ACCEPT_SECONDS)

    async def _exchange(self, connection: socket.socket) -> None:
        """Answer one request and close the connection, whatever the other end does."""
        try:
            with connection:
                async with asyncio.timeout(EXCHANGE_SECONDS):
                    request = b""
                    while b"\r\n\r\n" not in request:
                        read = await self._loop.sock_recv(connection, REQUEST_BYTES)
                        request += read
                        if not read or len(request) > REQUEST_BYTES:
                            return
                    await self._loop.sock_sendall(connection, _response(request, self._text))
        except (TimeoutError, OSError):
            pass
        except Exception:  # later scrapes may succeed
            log.exception("metrics cannot be served")


def _listen(host: str, port: int) -> list[socket.socket]:
    """Listen on all addresses of *host*, an address or a name. Raises OSError and UnicodeError."""
    if host in _ALL_ADDRESSES and socket.has_dualstack_ipv6():
        listening = [socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)]
    else:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listening = [socket.create_server(where[:2], family=family) for family, *_, where in found]
    for one in listening:
        one.setblocking(False)
    return listening


def _response(request: bytes, text: Callable[[], bytes]) -> bytes:
    method, _, rest = request.partition(b"\r\n")[0].partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0].decode("latin-1")
    status, kind, body = "200 OK", CONTENT_TYPE, b""
    if method not in (b"GET", b"HEAD"):
        status, kind, body = "405 Method Not Allowed", "text/plain", b"only GET is supported\n"
    elif path != PATH:
        status, kind, body = "404 Not Found", "text/plain", f"metrics are at {PATH}\n".encode()
    else:
        body = text()
    fields = (f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}")
    head = "\r\n".join((*fields, "Connection: close", "", ""))
    return head.encode() + (b"" if method == b"HEAD" else body)

"""Run one tier inside the test's process: a batcher, several workers, and a wire to each that can be cut."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from headrace.batcher.__main__ import RunningBatcher, batcher
from headrace.batcher.settings import Settings as BatcherSettings
from headrace.batcher.text.tokens import ByteTokenizer, Tokenizer
from headrace.cli.launch.mesh import reserved_ports
from headrace.client import Client, connect
from headrace.worker.__main__ import Worker
from headrace.worker.engine.echo import EOS_ID, EchoEngine
from headrace.worker.engine.interface import Engine, Result, Row, Token, TopTokens
from tests.harness import PATIENCE, eventually, running_worker


class OracleEngine(EchoEngine):
    """Computes each token as a hash of all that it may depend on: prompt, answer so far, seed, sampling.

    An answer that is resumed from any state but its exact one differs, as it does with a model. One that is
    resumed correctly is byte-identical, as on an EXACT worker.

    drew   called on the engine's thread with the answer's offset before each token is returned
    """

    def __init__(self, *, drew: Callable[[int], None] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.drew = drew

    def step(self, rows: Sequence[Row]) -> list[Result]:
        results = super().step(rows)
        for row in rows:
            if self.drew is not None and row.sample:
                self.drew(row.stop - row.prompt)
        return [
            _detailed(oracle(row), result) if isinstance(result, Token) else result
            for row, result in zip(rows, results, strict=True)
        ]


def oracle(row: Row) -> Token:
    """Return the token that follows the row's ids."""
    params = row.params if row.params.temperature else replace(row.params, seed=0)  # greedy: no noise
    state = (list(row.ids[: row.stop]), row.prompt, params)
    number = int.from_bytes(hashlib.blake2b(repr(state).encode(), digest_size=8).digest())
    answered = row.stop - row.prompt
    if number % 64 == 0 and answered >= row.params.min_tokens and not row.params.ignore_eos:
        return Token(EOS_ID, 0.0)
    letters = b"abcdefghij -"
    return Token(letters[number // 64 % len(letters)], -(number % 997) / 100)


def _detailed(token: Token, echo: Token) -> Token:
    """Return a token with what the echo engine adds to its own: the token is its most likely one."""
    top = None
    if echo.top is not None:
        others = [id for id in range(len(echo.top.ids)) if id != token.id][: len(echo.top.ids) - 1]
        own = token.logprob or 0.0
        top = TopTokens((token.id, *others), (own, *(own - 1 - rank for rank in range(len(others)))))
    return replace(token, top=top, prompt=echo.prompt)


class Wire:
    """A TCP wire to a port on this machine, which can be cut and joined again.

    target   the port that it leads to
    port   where to connect; outside of the system's ephemeral ports, so that no other process can get it
           while the wire is cut
    """

    def __init__(self, target: int, port: int) -> None:
        self.target = target
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.port = port
        self.cuts = 0

    async def join(self) -> None:
        """Listen again on the same port."""
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self.port)

    def cut(self) -> None:
        """Reset every connection and refuse new ones until `join`."""
        self.cuts += 1
        if self._server is not None:
            self._server.close()
        self.reset()

    def reset(self) -> None:
        """Reset every connection; new ones are accepted."""
        for writer in self._writers:
            writer.transport.abort()

    def freeze(self) -> None:
        """Forward no more data; connections stay open."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Forward data again, starting with what was held back."""
        self._flowing.set()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)  # now, because the wire may be cut before the far end is connected
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            self._writers.discard(writer)
            writer.transport.abort()
            return
        self._writers.add(far_writer)
        if writer.transport.is_closing():
            far_writer.transport.abort()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(reader, far_writer))
                tasks.create_task(self._pump(far_reader, writer))
        finally:
            self._writers -= {writer, far_writer}
            writer.transport.abort()
            far_writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@dataclass
class Tier:
    """A running tier."""

    client: Client
    batcher: RunningBatcher
    workers: list[Worker] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)

    @property
    def serving(self) -> int:
        """Which worker has sequences."""
        return next(number for number, worker in enumerate(self.workers) if worker.streams.in_flight)


@asynccontextmanager
async def running_tier(
    engines: Sequence[Engine],
    *,
    tokenizer: Tokenizer | None = None,
    worker_settings: dict[str, Any] | None = None,
    extra_workers: Sequence[str] = (),
    **settings: Any,
) -> AsyncGenerator[Tier, None]:
    """Run a worker for each of *engines*, a wire to each, and a batcher with *settings*.

    extra_workers   targets of more workers, which the tier does not wait for
    """
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(running_worker(engine, **(worker_settings or {})))
            for engine in engines
        ]
        ports = stack.enter_context(reserved_ports(len(engines)))
        wires = [Wire(worker.server.port, port) for worker, port in zip(workers, ports, strict=True)]
        for wire in wires:
            await wire.join()
            stack.callback(wire.cut)
            stack.callback(wire.thaw)
        targets = ",".join([*(f"127.0.0.1:{wire.port}" for wire in wires), *extra_workers])
        running = await stack.enter_async_context(
            batcher(
                BatcherSettings(port=0, tier="t", workers=targets, fake=True, drain_seconds=2.0, **settings),
                tokenizer or ByteTokenizer(),
                "b",
            )
        )
        client = await stack.enter_async_context(connect(f"127.0.0.1:{running.server.port}", retries=0))
        await eventually(lambda: len(running.coalescer.pool.ready()) >= len(engines))
        yield Tier(client, running, workers, wires, list(engines))


class Trap:
    """Blocks an engine's thread before it returns the token of an offset, until `open`.

    sprung   set on the event loop when the thread is blocked
    """

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self._loop = asyncio.get_running_loop()
        self._go = threading.Event()
        self._used = False
        self.sprung = asyncio.Event()

    def __call__(self, offset: int) -> None:
        if offset == self.offset and not self._used:
            self._used = True
            self._loop.call_soon_threadsafe(self.sprung.set)
            self._go.wait(PATIENCE)

    def open(self) -> None:
        """Release the thread."""
        self._go.set()

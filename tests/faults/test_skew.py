"""Peers of another version: unknown fields and events are ignored."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from headrace.cli.launch.mesh import reserved_ports
from tests.faults.fleet import HOST, Plan, fleet
from tests.faults.secured import connect, listen, open_channel
from tests.faults.tally import Row, mixed, visit

# Field 111, which none of our messages defines, with the text "new".
NEWS = bytes([0xFA, 0x06, 3]) + b"new"
# Methods whose messages may all be of an unknown kind: a oneof may get new members, and others new fields.
STREAMS = {"Generate", "Multiplex", "Run"}


class Newer(grpc.GenericRpcHandler):
    """A proxy of a service that makes all messages look like those of a later version.

    It adds a field to each message, and messages of an unknown kind to each stream.
    """

    def __init__(self, target: str) -> None:
        self._channel = open_channel(target)
        self.added = 0

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """Handle every method; see grpc.GenericRpcHandler."""
        method = details.method
        streams = method.rpartition("/")[2] in STREAMS

        async def relay(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async def sent() -> AsyncIterator[bytes]:
                async for message in requests:
                    yield message + NEWS
                    if method.endswith(("/Multiplex", "/Run")):
                        yield NEWS

            forward: Any = self._channel.stream_stream(method)
            call = forward(
                sent(), timeout=context.time_remaining(), metadata=_own(context.invocation_metadata())
            )
            try:
                first = True
                async for message in call:
                    # Not before the first, nor after the last: the contract defines what these are.
                    if streams and not first:
                        self.added += 1
                        yield NEWS
                    first = False
                    yield message + NEWS
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "", error.trailing_metadata() or ())
            finally:
                call.cancel()

        return grpc.stream_stream_rpc_method_handler(relay)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


def _own(metadata: Any) -> tuple[tuple[str, str | bytes], ...]:
    return tuple((key, value) for key, value in metadata or () if not key.startswith(("user-agent", "grpc-")))


@asynccontextmanager
async def newer(target: str) -> AsyncGenerator[tuple[str, Newer], None]:
    handler = Newer(target)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = listen(server, HOST)
    await server.start()
    try:
        yield f"{HOST}:{port}", handler
    finally:
        await server.stop(0.5)
        await handler.close()


@pytest.mark.parametrize("service", ["worker", "batcher", "router"])
async def test_a_service_of_a_later_version(
    row: Callable[[str], Row], rng: random.Random, tmp_path_factory: pytest.TempPathFactory, service: str
) -> None:
    counted = row(f"unknown fields and events, to and from a {service}")
    with reserved_ports(2) as (worker_port, batcher_port):
        targets = {"worker": f"{HOST}:{worker_port}", "batcher": f"{HOST}:{batcher_port}"}
        async with newer(targets.get(service, targets["batcher"])) as (address, handler):
            plan = Plan(
                workers=1,
                batchers=1,
                routers=1,
                worker_ports=[worker_port],
                batcher_ports=[batcher_port],
                to_worker={0: address} if service == "worker" else {},
                to_batcher={0: address} if service == "batcher" else {},
            )
            async with fleet(plan, tmp_path_factory.mktemp("skew")) as few:
                if service == "router":
                    async with newer(few.target) as (front, handler), connect(front, retries=0) as client:
                        counted.add([await visit(client, one) for one in mixed(rng, 8)])
                else:
                    async with connect(few.target, retries=0) as client:
                        counted.add([await visit(client, one) for one in mixed(rng, 8)])

    counted.check()
    assert handler.added > 0, "unknown messages were sent"

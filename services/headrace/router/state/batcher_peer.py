"""The connection to one batcher of a tier: its health, limits and load, and the answers that it streams.

A router may serve a tier in place of a batcher. It is treated the same; `router` and `models` show it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from headrace import errors
from headrace.channel import open_channel
from headrace.client import Client
from headrace.deadline import Deadline
from headrace.flushing import Flusher
from headrace.multiplex.call import Take
from headrace.router.state.peer_reports import BadReply, read_tiers
from headrace.runtime.serving.calls import Metadata
from headrace.tls.files import TlsReader
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing

R = TypeVar("R")

log = logging.getLogger(__name__)

HOPS = "headrace-hops"  # the header with the number of routers that a request has passed
MAX_HOPS = 4  # routers that a request may pass
# Errors of a poll that mean that the batcher is busy. Any other error means that it cannot serve.
_BUSY = (errors.DeadlineExceeded, errors.RequestCancelled, errors.Overloaded)


def hops_of(metadata: Metadata) -> int:
    """Return how many routers a request has passed. Raises NoWorkers if there are too many."""
    value = next((value for key, value in metadata if key == HOPS), "")
    valid = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 9
    hops = int(value) if valid else 0
    if hops > MAX_HOPS:
        raise errors.NoWorkers(
            f"the request has passed {hops} routers, which name each other as tiers: correct their --tiers"
        )
    return hops


class Stalled(Exception):
    """The batcher has sent nothing for too long, although its connection is open."""


class BatcherPeer:
    """One batcher: its client, its last report, and the number of answers that it streams.

    reported   its last report: health, limits and load
    models     the models that it serves
    router     whether it is a router
    suspect    a stream of it broke; it gets no request before the next poll
    late       it did not reply to the last poll in time
    in_flight  answers that it streams to this router
    last_message   time.monotonic() of its last message

    stall_seconds   it is lost if it sends nothing for so long, neither to polls nor on any stream
    tls             for calls over TLS; None: plaintext
    server_name     the name in its certificate; empty: the host of *address*
    """

    def __init__(
        self, address: str, *, stall_seconds: float, tls: TlsReader | None = None, server_name: str = ""
    ) -> None:
        self.address = address
        self.reported = routing.Tier(unhealthy_reason="not polled yet")
        self.models: frozenset[str] = frozenset()
        self.router = False
        self.suspect = False
        self.late = False
        self.in_flight = 0
        self._in_flight_at_poll = 0
        self._stall_seconds = stall_seconds
        channel = open_channel(address, tls=tls, server_name=server_name, direct=True)
        self._client = Client(channel, target=address, multiplex=True, stall_seconds=stall_seconds)
        self.last_message = time.monotonic()
        self._poll_now = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether it accepts requests, as far as is known."""
        return self.reported.healthy and not self.suspect

    @property
    def busy(self) -> int:
        """Requests that it has queued or runs: this router's as of now, others' as of the last poll."""
        load = self.reported.load
        return self.in_flight + max(load.queued + load.running - self._in_flight_at_poll, 0)

    def mark_suspect(self) -> None:
        """Send it no request before the next poll, which is made immediately."""
        self.suspect = True
        self._poll_now.set()

    async def generate(
        self,
        request: pb.GenerateRequest,
        *,
        deadline: Deadline,
        hops: int = 0,
        flusher: Flusher | None = None,
        take: Take | None = None,
        **labels: str | int,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Stream its answer. Raises the client's errors, and Stalled.

        hops     routers that the request has passed before this one
        flusher  when gathered tokens are handed over; None: each at once
        take     as in `Client.attempt`; it sets `last_message`
        labels   attributes of the call's span
        """
        self.in_flight += 1
        stream = self._client.attempt(
            request,
            timeout=max(deadline.left(time.monotonic()), 0.0),
            metadata={HOPS: str(hops + 1)} if self.router else {},
            labels=labels,
            flusher=flusher,
            take=take,
        )
        try:
            async with aclosing(stream) as responses:
                async for response in responses:
                    self.last_message = time.monotonic()
                    yield response
        finally:
            self.in_flight -= 1

    async def tokenizer_call(
        self, method: Callable[..., Awaitable[R]], request: object, *, deadline: Deadline, hops: int
    ) -> R:
        """Return its response to *request*. Raises the client's errors.

        method   of `Client`, for one RPC of the TokenizerService
        hops     as in `generate`
        """
        return await method(
            self._client,
            request,
            timeout=max(deadline.left(time.monotonic()), 0.0),
            metadata={HOPS: str(hops + 1)} if self.router else {},
        )

    async def poll(self, timeout: float) -> None:
        """Request its report. A failure affects only its health."""
        was_healthy = self.reported.healthy
        try:
            report = read_tiers(await self._client.list_tiers(timeout=timeout))
        except BadReply as error:
            self.late = False
            self.last_message = time.monotonic()
            self._set_unhealthy(f"the batcher at {self.address} is not usable: {error}")
        except errors.HeadraceError as error:
            # A refused connection is not silence: a draining batcher accepts none and still sends on its
            # streams. One late reply is not silence either: the batcher may be busy.
            self.late = isinstance(error, _BUSY)
            silent = self.late and time.monotonic() - self.last_message > self._stall_seconds
            if silent:
                self._client.fail_calls(
                    Stalled(f"the batcher at {self.address} has sent nothing for {self._stall_seconds:g} s")
                )
            if silent or not self.late:
                self._set_unhealthy(f"no reply from the batcher at {self.address}: {error}")
        except Exception as error:
            log.error("poll of a batcher failed", exc_info=error, extra={"batcher": self.address})
            self._set_unhealthy(f"the batcher at {self.address} cannot be polled: {type(error).__name__}")
        else:
            self.reported, self.models, self.router = report.tier, report.models, report.router
            self.late = False
            self.last_message = time.monotonic()
            self._in_flight_at_poll = self.in_flight
        self.suspect = False
        if was_healthy != self.reported.healthy:
            log.info(
                "batcher health changed",
                extra={
                    "batcher": self.address,
                    "healthy": self.reported.healthy,
                    "reason": self.reported.unhealthy_reason,
                },
            )

    async def until_next_poll(self, seconds: float) -> None:
        """Wait *seconds*, or until `mark_suspect` is called."""
        try:
            async with asyncio.timeout(seconds):
                await self._poll_now.wait()
        except TimeoutError:
            return
        finally:
            self._poll_now.clear()

    async def close(self) -> None:
        """End all calls and close the channel."""
        await self._client.close()

    def _set_unhealthy(self, reason: str) -> None:
        report = routing.Tier(model=self.reported.model, unhealthy_reason=reason)
        report.limits.CopyFrom(self.reported.limits)
        self.reported = report

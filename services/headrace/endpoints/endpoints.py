"""Spread the calls of a client over the servers behind one name.

gRPC's default policy, `pick_first`, keeps all calls on one connection until that breaks: a server that is
added would get no calls. Its `round_robin` resolves the name only when a connection breaks, and cannot say
which server a call, a shared stream or a request's feedback reaches. So each address has a channel of its own
here. The name is resolved again while calls are made, and a call goes to the address with the fewest calls of
this client.

- A conversation stays on one server, chosen by the hash of its id: the server remembers its tier. Feedback
  goes to the server that gave the answer.
- An address that is no longer in DNS gets no more calls. Its calls continue: it may be draining.
- A target that is not a replicated name is left to gRPC, and so is a name that cannot be resolved.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import heapq
import logging
import math
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass

import grpc

from headrace.channel import reconnected
from headrace.endpoints.endpoint import Endpoint
from headrace.endpoints.resolving import resolve
from headrace.multiplex.call import Call
from headrace.multiplex.calling import Caller

log = logging.getLogger(__name__)

RESOLVE_SECONDS = 5.0  # between lookups of the name, while calls are made
URGENT_SECONDS = 1.0  # the same while no address is connected
CHECK_SECONDS = 0.02  # between checks whether one is connected again
CONNECT_SECONDS = 2.0  # the longest that a call waits for the first connection before it is made anyway
MAX_ADDRESSES = 16  # that one client uses; clients choose different ones if there are more
MAX_ANSWERS = 8192  # ids of answers and their requests whose servers are remembered for feedback


@dataclass(frozen=True)
class Spread:
    """How the servers behind a name are found and connected.

    find              returns the current addresses; empty if the target is left to gRPC. Raises OSError
    open              opens a channel to an address
    resolve_seconds   between two calls of *find*, while calls are made
    """

    find: Callable[[], Awaitable[Iterable[str]]]
    open: Callable[[str], grpc.aio.Channel]
    resolve_seconds: float = RESOLVE_SECONDS


class Endpoints:
    """The endpoints of one client.

    home      the channel to the target as gRPC resolves it
    calling   returns the caller of a channel
    spread    None: all calls go to *home*
    """

    def __init__(
        self,
        home: grpc.aio.Channel,
        calling: Callable[[grpc.aio.Channel], Caller],
        spread: Spread | None = None,
    ) -> None:
        self._home = Endpoint("", home, calling(home))
        self._calling = calling
        self._spread = spread
        self._current: dict[str, Endpoint] = {}  # empty: the home alone
        self._retired: set[Endpoint] = set()
        self._resolved_at = -math.inf
        self._resolving: asyncio.Task[None] | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._recovering: asyncio.Task[None] | None = None
        self._waiting = 0  # calls that wait for it
        self._closing: set[asyncio.Task[None]] = set()
        self._answered: OrderedDict[str, Endpoint] = OrderedDict()
        self._salt = secrets.token_bytes(8)

    def fail_all(self, error: Exception) -> None:
        """End all calls of Generate in flight with *error*."""
        for endpoint in self._all():
            endpoint.caller.fail_all(error)

    def pick(self, session: str = "") -> Endpoint | None:
        """Return the endpoint for the next call; None if it is not known without waiting.

        session   id of the request's conversation
        """
        if self._spread is None:
            return self._home
        self._resolve_if_due(self._spread.resolve_seconds)
        if not self._current:
            return None if self._resolved_at < 0 else self._home
        if len(self._current) == 1:
            return next(iter(self._current.values()))
        ready = [endpoint for endpoint in self._current.values() if endpoint.ready]
        if not ready:
            return None
        return _best([one for one in ready if not one.avoided] or ready, session)

    async def wait(self, session: str = "") -> Endpoint:
        """Like `pick`, but wait for the addresses and a connection if there is none."""
        if (picked := self.pick(session)) is not None:
            return picked
        if self._resolved_at < 0 and self._resolving is not None:
            await asyncio.shield(self._resolving)
        if (picked := self.pick(session)) is not None:
            return picked
        if self._connecting is None:  # one for all calls that wait
            self._connecting = _background(self._connect_any())
        await asyncio.shield(self._connecting)
        return self.pick(session) or _best(self._current.values(), session)

    async def reconnected(self) -> None:
        """Wait until a call that lost its connection can be made again."""
        if self._spread is None or not self._current:
            await reconnected(self._home.channel)
            return
        if self._recovering is None or self._recovering.done():
            self._recovering = _background(self._recover())  # one for all calls that wait
        self._waiting += 1
        try:
            await asyncio.shield(self._recovering)
        finally:
            self._waiting -= 1
            if not self._waiting and self._recovering is not None:
                self._recovering.cancel()
                self._recovering = None

    def remember(self, name: str, endpoint: Endpoint) -> None:
        """Remember which server gives an answer. *name* is the id of the answer or of its request."""
        if endpoint is not self._home:
            self._answered[name] = endpoint
            if len(self._answered) > MAX_ANSWERS:
                self._answered.popitem(last=False)

    def of(self, name: str) -> Endpoint | None:
        """Return the server that gave the answer of that name, if it is known and still there."""
        endpoint = self._answered.get(name)
        return None if endpoint is None or endpoint.retired else endpoint

    def end(self, endpoint: Endpoint, call: Call) -> None:
        """Cancel a call of *endpoint* unless it has ended, and forget it."""
        endpoint.caller.ended(call)
        endpoint.in_flight -= 1
        if endpoint.retired and not endpoint.in_flight:
            self._close(endpoint)

    async def close(self) -> None:
        """Cancel all calls and close all channels."""
        for task in (self._resolving, self._connecting, self._recovering):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        await asyncio.gather(*(endpoint.close() for endpoint in self._all()))
        if self._closing:
            await asyncio.wait(self._closing)

    def _all(self) -> list[Endpoint]:
        return [self._home, *self._current.values(), *self._retired]

    def _resolve_if_due(self, seconds: float) -> None:
        """Start to resolve the name unless that was done so recently."""
        if self._resolving is None and time.monotonic() - self._resolved_at >= seconds:
            self._resolving = _background(self._resolve())

    async def _resolve(self) -> None:
        assert self._spread is not None, "there is a name"
        try:
            found = await self._spread.find()
            # If there are more, each client uses others; one that stays in DNS stays in use.
            chosen = heapq.nlargest(MAX_ADDRESSES, set(found), key=lambda one: _hash(self._salt, one))
            self._follow(chosen)
        except (OSError, UnicodeError) as error:
            log.debug("name not resolved", extra={"problem": str(error)})  # the last result remains valid
        finally:
            self._resolved_at = time.monotonic()
            self._resolving = None

    def _follow(self, addresses: Iterable[str]) -> None:
        found = set(addresses)
        for address in self._current.keys() - found:
            self._retire(self._current.pop(address))
        assert self._spread is not None, "there is a name"
        for address in found - self._current.keys():
            channel = self._spread.open(address)
            self._current[address] = Endpoint(address, channel, self._calling(channel))

    def _retire(self, endpoint: Endpoint) -> None:
        endpoint.retired = True
        self._retired.add(endpoint)
        if not endpoint.in_flight:
            self._close(endpoint)

    def _close(self, endpoint: Endpoint) -> None:
        self._retired.discard(endpoint)
        closing = _background(endpoint.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _recover(self) -> None:
        """Wait until an address is connected, or the target is left to gRPC."""
        while self._current and not any(endpoint.ready for endpoint in self._current.values()):
            self._resolve_if_due(URGENT_SECONDS)
            await asyncio.sleep(CHECK_SECONDS)

    async def _connect_any(self) -> None:
        """Wait until an address is connected, all have failed, or CONNECT_SECONDS have passed."""
        waits = {asyncio.create_task(one.connected()) for one in self._current.values()}
        until = time.monotonic() + CONNECT_SECONDS
        try:
            while waits and (left := until - time.monotonic()) > 0:
                done, waits = await asyncio.wait(waits, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if any(not task.cancelled() and task.exception() is None and task.result() for task in done):
                    return
        finally:
            self._connecting = None
            for task in waits:
                task.cancel()


def servers_of(host: str, port: str, connect: Callable[[str], grpc.aio.Channel]) -> Spread:
    """Return how the servers behind a DNS name are found; *connect* opens a channel to one of them."""

    async def find() -> frozenset[str]:
        v4, v6 = await resolve(host, port)
        # One server with an address of each family: gRPC tries both. If there are several, both families
        # lead to the same ones.
        return frozenset() if len(v4) == len(v6) == 1 else v4 or v6

    return Spread(find, connect)


def _best(endpoints: Iterable[Endpoint], session: str) -> Endpoint:
    """Return the endpoint with the fewest calls, or that of a conversation."""
    if session:  # rendezvous hashing: another server moves only the conversations that it gets or had
        key = session.encode("utf-8", "replace")
        return max(endpoints, key=lambda one: _hash(key, one.address))
    return min(endpoints, key=lambda one: (one.in_flight, random.random()))


def _hash(key: bytes, address: str) -> bytes:
    return hashlib.blake2b(address.encode(), key=key[:64], digest_size=8).digest()


def _background(coroutine: Coroutine[object, object, None]) -> asyncio.Task[None]:
    """Run a coroutine in a task of its own context, which belongs to no request and so to no trace."""
    return asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())

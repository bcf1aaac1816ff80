"""A channel whose new calls use the current certificate files.

gRPC's credentials are fixed when a channel is opened. Here a new channel replaces the old one when the files
have changed. Calls of the old channel continue until they end by themselves; then it is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from headrace.tls.files import Material, TlsReader

_LEAST_WAIT_SECONDS = 0.05


def channel_credentials(material: Material) -> grpc.ChannelCredentials:
    """Return the credentials of a client."""
    return grpc.ssl_channel_credentials(material.ca, material.key, material.cert)


class RotatingChannel(grpc.aio.Channel):
    """A channel over TLS whose new calls use the files' current contents.

    reader        reads the files
    open_channel  opens a channel with credentials
    """

    def __init__(
        self, reader: TlsReader, open_channel: Callable[[grpc.ChannelCredentials], grpc.aio.Channel]
    ) -> None:
        self._reader = reader
        self._open_channel = open_channel
        self._current = self._opened(reader.current())
        self._retired: set[_Generation] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def _opened(self, material: Material) -> _Generation:
        return _Generation(material, self._open_channel(channel_credentials(material)))

    def fresh(self) -> _Generation:
        """Return the channel for new calls."""
        material = self._reader.current()
        old = self._current
        if old.material is not material:
            self._current = self._opened(material)
            self._retired.add(old)
            old.retire(lambda: self._close(old))
        return self._current

    def _close(self, old: _Generation) -> None:
        task = asyncio.get_running_loop().create_task(old.channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        self._retired.discard(old)

    async def __aenter__(self) -> RotatingChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Close the channel and cancel its calls; see grpc.aio.Channel."""
        generations = [self._current, *self._retired]
        self._retired.clear()
        await asyncio.gather(*(one.channel.close(grace) for one in generations), *self._closing)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return the state of the channel for new calls."""
        return self.fresh().channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the channel for new calls is in another state."""
        await self._current.channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the channel for new calls is connected, possibly with files that are yet to come."""
        while True:
            generation = self.fresh()
            try:
                async with asyncio.timeout(max(self._reader.check_seconds, _LEAST_WAIT_SECONDS)):
                    return await generation.channel.channel_ready()
            except TimeoutError:
                continue
            except grpc.aio.UsageError:
                if generation is self._current:
                    raise
                # Another task has replaced the channel, which closed this one.

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        """See grpc.aio.Channel."""
        return _Method(self, "unary_unary", args, options)

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        """See grpc.aio.Channel."""
        return _Method(self, "unary_stream", args, options)

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        """See grpc.aio.Channel."""
        return _Method(self, "stream_unary", args, options)

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        """See grpc.aio.Channel."""
        return _Method(self, "stream_stream", args, options)


class _Generation:
    """One channel, and the number of its calls in flight."""

    def __init__(self, material: Material, channel: grpc.aio.Channel) -> None:
        self.material = material
        self.channel = channel
        self._calls = 0
        self._when_idle: Callable[[], None] | None = None

    def started(self, call: Any) -> None:
        self._calls += 1
        call.add_done_callback(self._ended)

    def _ended(self, _: Any) -> None:
        self._calls -= 1
        if self._when_idle is not None and not self._calls:
            self._when_idle()

    def retire(self, when_idle: Callable[[], None]) -> None:
        """Call *when_idle* once no calls are in flight."""
        self._when_idle = when_idle
        if not self._calls:
            when_idle()


class _Method:
    """A method of a stub; each call of it is one of the channel that is current then."""

    def __init__(
        self, channel: RotatingChannel, kind: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self._channel = channel
        self._kind = kind
        self._args = args
        self._options = options
        self._generation: _Generation | None = None
        self._method: Any = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        generation = self._channel.fresh()
        if generation is not self._generation:
            self._generation = generation
            self._method = getattr(generation.channel, self._kind)(*self._args, **self._options)
        call = self._method(*args, **options)
        generation.started(call)
        return call

"""Ask the mesh for all choices of a request, and merge their events.

The first choice of a prompt is routed. The others are pinned to the tier and the model that answer it, with
the next seeds, and start once its prompt was computed: they find it in the prefix cache, so that it is
computed once instead of n times. The failure of one choice is that of all, and all are cancelled together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TypeAlias

from headrace.client import Client
from headrace.deadline import Deadline
from headrace.gateway.pace import Pace
from headrace.v1 import generation_pb2 as pb

# An event of a choice, by its index: that of the prompt, times n, plus that among the choices of the prompt.
Event: TypeAlias = tuple[int, pb.GenerateResponse]
_Item: TypeAlias = Event | BaseException | None

_BUFFERED = 16  # events that wait for the reader of the merged stream; beyond that, the mesh waits


def answers(
    client: Client,
    requests: Sequence[pb.GenerateRequest],
    pace: Pace,
    *,
    n: int = 1,
    timeout: float | None,
    metadata: Mapping[str, str],
) -> AsyncGenerator[Event, None]:
    """Return the events of *n* answers to each of *requests*. Iterate under `contextlib.aclosing`.

    pace                counts the tokens, and decides when they are handed over
    timeout, metadata   as in `Client.generate`; the timeout is for all answers together

    Iterating raises the first HeadraceError of any choice.
    """
    asking = _Asking(client, n, pace, timeout, metadata)
    return asking.ask(0, requests[0]) if len(requests) * n == 1 else _merged(asking, requests, n)


async def _merged(
    asking: _Asking, requests: Sequence[pb.GenerateRequest], n: int
) -> AsyncGenerator[Event, None]:
    try:
        for place, request in enumerate(requests):
            asking.start(asking.lead(place * n, request))
        while asking.open:
            item = await asking.merged.get()
            if item is None:
                asking.open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        await asking.stop()


class _Asking:
    """The calls for several choices.

    merged   their events, None for the end of a call, or the exception that ended it
    open     calls whose end has not been read
    """

    def __init__(
        self, client: Client, n: int, pace: Pace, timeout: float | None, metadata: Mapping[str, str]
    ) -> None:
        self.merged: asyncio.Queue[_Item] = asyncio.Queue(_BUFFERED)
        self.open = 0
        self._client = client
        self._n = n
        self._pace = pace
        self._deadline = Deadline.after(timeout, time.monotonic())
        self._metadata = metadata
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, call: AsyncGenerator[Event, None]) -> None:
        """Read the events of *call* in a task."""
        self.open += 1
        self._tasks.add(asyncio.create_task(self._read(call)))

    async def stop(self) -> None:
        """Cancel all calls, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def lead(self, index: int, request: pb.GenerateRequest) -> AsyncGenerator[Event, None]:
        """Ask for the first choice, and start the others of the prompt with its first delta.

        Then the prompt was computed, and all its tokens were passed on, if they were requested.
        """
        accepted: pb.Accepted | None = None
        others = range(1, self._n)
        async with aclosing(self.ask(index, request)) as events:
            async for event in events:
                if accepted is None:
                    accepted = event[1].accepted
                elif others and not event[1].HasField("prompt_tokens"):
                    for place in others:
                        self.start(self.ask(index + place, _follower(request, accepted, place)))
                    others = range(0)
                yield event

    async def ask(self, index: int, request: pb.GenerateRequest) -> AsyncGenerator[Event, None]:
        """Ask for one choice."""
        left = max(self._deadline.left(time.monotonic()), 0.0) if self._deadline.exists else None
        stream = self._client.generate(
            request, timeout=left, metadata=self._metadata, flusher=self._pace.flusher
        )
        async with aclosing(stream) as responses:
            async for response in responses:
                if response.HasField("delta"):
                    self._pace.count(response.delta.token_count)
                yield index, response

    async def _read(self, call: AsyncGenerator[Event, None]) -> None:
        ending: _Item = None
        try:
            async with aclosing(call) as events:
                async for event in events:
                    await self.merged.put(event)
        except Exception as error:
            ending = error
        await self.merged.put(ending)


def _follower(request: pb.GenerateRequest, accepted: pb.Accepted, place: int) -> pb.GenerateRequest:
    """Return the request for another choice of the prompt that *accepted* answers."""
    follower = pb.GenerateRequest()
    follower.CopyFrom(request)
    follower.sampling.seed = (accepted.seed + place) % 2**64
    follower.sampling.ClearField("prompt_logprobs")  # the first choice delivers those of the prompt
    routing = follower.routing
    routing.tier, routing.model = accepted.tier, accepted.model
    routing.min_tier = routing.max_tier = ""
    routing.cascade = False
    if follower.request_id:
        follower.request_id += f"-{place}"
    return follower

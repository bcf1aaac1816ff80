"""A peer of a worker: a `Run` stream whose messages the test writes itself."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from headrace import errors, statuses
from headrace.channel import open_channel
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub
from tests.harness import PATIENCE

HELLO = wire.RunRequest(hello=wire.Hello(batcher_id="peer", epoch=1))


def sequence(handle: int, text: str = "hello", **sampling: Any) -> wire.Sequence:
    asked = pb.Sampling(**{"seed": 1, "max_tokens": 50, **sampling})
    return wire.Sequence(handle=handle, prompt_ids=list(text.encode()), sampling=asked)


def submit(*sequences: wire.Sequence) -> wire.RunRequest:
    return wire.RunRequest(submit=wire.Submit(batch_id=1, sequences=sequences))


def bad_sampling(*, vocabulary: int) -> list[dict[str, Any]]:
    """Return parameters that a worker must refuse, each for one reason."""
    return [
        {"temperature": math.nan},
        {"temperature": -1.0},
        {"temperature": math.inf},
        {"top_p": math.nan},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -3.0},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"logit_bias": {4_000_000_000: 1.0}},
        {"logit_bias": {vocabulary: 1.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: math.inf}},
        {"stop_token_ids": [4_000_000_000]},
        {"stop_token_ids": [vocabulary]},
        {"stop_token_ids": range(200)},
        {"max_tokens": 0},
    ]


class Peer:
    """One `Run` stream, with messages written by the test."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.received: list[wire.RunResponse] = []
        self.submitted = 0  # by `submit`

    async def hello(self) -> wire.Welcome:
        await self.call.write(HELLO)
        return (await self.read("welcome")).welcome

    async def read(
        self, kind: str, *, until: Callable[[Any], bool] = lambda message: True
    ) -> wire.RunResponse:
        """Return the next message of a kind for which *until* holds."""
        async with asyncio.timeout(PATIENCE):
            async for response in self.call:
                self.received.append(response)
                if response.WhichOneof("message") == kind and until(response):
                    return self.received[-1]
        raise AssertionError(f"the stream ended without {kind}: {await self.call.code()}")

    async def credit(self, least: int) -> None:
        """Wait until the credit is at least so large."""
        if self.granted < least:
            await self.read("credit", until=lambda response: response.credit.sequences >= least)

    @property
    def granted(self) -> int:
        """The newest credit that was received."""
        for response in reversed(self.received):
            if response.HasField("credit"):
                return response.credit.sequences
            if response.HasField("welcome"):
                return response.welcome.credit.sequences
        return 0

    async def submit(self, *sequences: wire.Sequence) -> None:
        """Submit sequences as the credit allows; it grows while a stream uses all of it."""
        left = list(sequences)
        while left:
            ended = sum(bool(delta.finish) or delta.HasField("error") for delta in self.deltas())
            room = self.granted - (self.submitted - ended)
            if room > 0:
                await self.call.write(submit(*left[:room]))
                self.submitted += len(left[:room])
                del left[:room]
            else:
                await self.read_any()

    async def read_any(self) -> None:
        """Read one message."""
        async with asyncio.timeout(PATIENCE):
            async for response in self.call:
                self.received.append(response)
                return
        raise AssertionError(f"the stream ended: {await self.call.code()}")

    async def end(self) -> errors.HeadraceError | None:
        """Read to the end of the stream and return its error."""
        try:
            async with asyncio.timeout(PATIENCE):
                async for response in self.call:
                    self.received.append(response)
        except grpc.aio.AioRpcError as error:
            return statuses.from_rpc_error(error)
        return None

    def deltas(self) -> list[wire.SequenceDelta]:
        return [delta for response in self.received for delta in response.step.deltas]

    def verdicts(self) -> dict[int, wire.Verdict]:
        return {one.handle: one for response in self.received for one in response.admission.verdicts}


@asynccontextmanager
async def dialled(port: int) -> AsyncGenerator[Peer, None]:
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call = WorkerServiceStub(channel).Run(timeout=PATIENCE)
        try:
            yield Peer(call)
        finally:
            call.cancel()

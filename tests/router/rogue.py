"""A fake batcher that violates the contract, and the events that it sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from headrace.client import Client
from headrace.v1 import generation_pb2 as pb
from tests.harness import PATIENCE
from tests.router.fake_batchers import FakeBatcher


@dataclass
class InvalidBatcher(FakeBatcher):
    """Answers every request with the events of `script`, unchanged.

    lingers   it leaves its stream open after the last event
    """

    script: Sequence[pb.GenerateResponse] = ()
    lingers: bool = False
    left: int = 0

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        try:
            for event in self.script:
                yield event
            if self.lingers:
                await asyncio.Event().wait()
        finally:
            self.left += 1


def event(**fields: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(**fields)


ACCEPTED = event(accepted=pb.Accepted(model="echo", tier="somewhere", prompt_tokens=3))
FINISH = event(
    finish=pb.Finish(reason=pb.FINISH_REASON_STOP, usage=pb.Usage(prompt_tokens=3, completion_tokens=1))
)


def delta(offset: int, text: str = "a", **fields: Any) -> pb.GenerateResponse:
    given = {"token_count": 1, "token_ids": [97], **fields}
    return event(delta=pb.Delta(offset=offset, text=text, **given))


async def read(client: Client, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    async with aclosing(client.generate(request, timeout=PATIENCE, resume=False)) as stream:
        return [response async for response in stream]

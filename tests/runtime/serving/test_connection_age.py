"""A connection that has reached its age accepts no further calls, and nobody loses one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from headrace.batcher.settings import Settings as BatcherSettings
from headrace.client import Client, connect
from headrace.router.settings import Settings as RouterSettings
from headrace.runtime.serving.limits import Limits
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.settings import Settings as WorkerSettings
from tests.faults.proxy import Proxy
from tests.harness import PATIENCE, collect, prompt, running_mesh


class Entrance(Proxy):
    """A proxy that counts the connections that were opened."""

    opened = 0

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        await super()._connect(reader, writer)


@dataclass
class Ageing:
    """A router whose connections age, its client, and the connections that were opened."""

    client: Client
    entrance: Entrance


@asynccontextmanager
async def ageing(*, age: float, grace: float, **options: Any) -> AsyncGenerator[Ageing, None]:
    """Run a router; a step of its worker takes 10 ms."""
    async with (
        running_mesh(
            "only",
            engine=partial(EchoEngine, step_seconds=0.01),
            router_settings={"max_connection_age": age, "max_connection_age_grace": grace},
        ) as mesh,
        AsyncExitStack() as stack,
    ):
        entrance = Entrance(f"127.0.0.1:{mesh.port}")
        await stack.enter_async_context(entrance.serving())
        client = await stack.enter_async_context(connect(entrance.address, **options))
        yield Ageing(client, entrance)


@pytest.mark.parametrize("multiplex", [False, True])
async def test_connections_are_replaced_without_a_failed_call(multiplex: bool) -> None:
    """Neither short calls nor one that outlasts the age fails, without retries and resumption."""
    async with ageing(age=0.5, grace=PATIENCE, retries=0, multiplex=multiplex) as router:

        async def call(request: pb.GenerateRequest) -> int:
            stream = router.client.generate(request, timeout=PATIENCE, resume=False)
            async with aclosing(stream) as responses:
                events = [response async for response in responses]
            assert events[-1].HasField("finish")
            return events[-1].finish.usage.completion_tokens

        long = asyncio.create_task(call(prompt("again ", max_tokens=400, ignore_eos=True)))
        async with asyncio.timeout(PATIENCE):
            while router.entrance.opened < 3 or not long.done():
                await call(prompt("hello"))

        assert await long == 400


async def test_an_answer_that_outlasts_the_grace_is_resumed() -> None:
    async with ageing(age=0.3, grace=0.2) as router:
        answer = await collect(router.client, prompt("abc", max_tokens=200, ignore_eos=True))

        assert answer.tokens == 200
        assert answer.text == ("abc" * 67)[:200]
        assert router.entrance.opened >= 2


def test_connections_age_at_routers_and_never_at_workers() -> None:
    def ages(limits: Limits) -> dict[str, int]:
        return {name: value for name, value in limits.options() if "connection_age" in name}

    assert ages(RouterSettings(tiers="only=127.0.0.1:1").limits) == {
        "grpc.max_connection_age_ms": 25_000,
        "grpc.max_connection_age_grace_ms": 600_000,
    }
    assert ages(RouterSettings(tiers="only=127.0.0.1:1", max_connection_age=0).limits) == {}
    assert ages(BatcherSettings(workers="127.0.0.1:1", fake=True).limits) == {}
    assert ages(WorkerSettings(engine="echo").limits) == {}
    assert not {name for name in WorkerSettings.model_fields if "age" in name.split("_")}

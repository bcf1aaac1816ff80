"""The client retries what is safe to retry, within its budget, and cancels what it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import grpc
import pytest

from headrace import errors
from headrace.client import Client, RetryBudget, chat, connect
from headrace.runtime.server import serving
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_service_pb2
from headrace.v1.generation_service_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)
from tests.harness import collect, eventually


class Flaky(GenerationServiceServicer):
    """Fails the first calls, before or after its first event."""

    def __init__(self, failures: int, *, after_accepted: bool = False) -> None:
        self.failures = failures
        self.after_accepted = after_accepted
        self.calls = 0
        self.cancelled = 0

    async def Generate(
        self, request: pb.GenerateRequest, context: object
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.calls += 1
        failing = self.calls <= self.failures
        if failing and not self.after_accepted:
            raise errors.Draining("try again", retry_after=0.01)
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id="r"))
        if failing:
            raise errors.WorkerLost("gone")
        if request.prompt == "wait":
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        yield pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_STOP))


@asynccontextmanager
async def calling(servicer: Flaky, *, retries: int = 2) -> AsyncGenerator[Client, None]:
    def register(server: grpc.aio.Server) -> None:
        add_GenerationServiceServicer_to_server(servicer, server)

    services = generation_service_pb2.DESCRIPTOR.services_by_name.values()
    async with (
        serving(register, services, host="127.0.0.1", port=0, drain_seconds=0, ready=lambda: True) as server,
        connect(f"127.0.0.1:{server.port}", retries=retries) as client,
    ):
        yield client


async def test_a_call_that_failed_before_its_first_event_is_tried_again() -> None:
    servicer = Flaky(2)
    async with calling(servicer) as client:
        answer = await collect(client, chat("x"))

    assert answer.finish.reason == pb.FINISH_REASON_STOP
    assert servicer.calls == 3


async def test_a_call_that_was_accepted_is_not_tried_again() -> None:
    servicer = Flaky(1, after_accepted=True)
    async with calling(servicer) as client:
        with pytest.raises(errors.WorkerLost):
            await collect(client, chat("x"))

    assert servicer.calls == 1


async def test_retries_end_and_the_last_error_is_told() -> None:
    servicer = Flaky(99)
    async with calling(servicer, retries=1) as client:
        with pytest.raises(errors.Draining):
            await collect(client, chat("x"))

    assert servicer.calls == 2


async def test_a_server_in_trouble_is_not_buried_under_retries() -> None:
    servicer = Flaky(10_000)
    async with calling(servicer, retries=3) as client:
        for _ in range(20):
            with pytest.raises(errors.Draining):
                await collect(client, chat("x"))

    assert servicer.calls == 20 + 5, "five retries, and then the budget is spent"


async def test_leaving_the_stream_cancels_the_call() -> None:
    servicer = Flaky(0)
    async with calling(servicer) as client:
        async with aclosing(client.generate(pb.GenerateRequest(prompt="wait"), timeout=30)) as stream:
            await anext(stream)

        await eventually(lambda: servicer.cancelled == 1)


def test_the_retry_budget_is_spent_at_half_and_refilled_by_success() -> None:
    budget = RetryBudget(tokens=10, refund=0.5)
    assert [budget.take() for _ in range(6)] == [True] * 5 + [False]
    budget.succeed()

    assert budget.take()


def test_chat_builds_a_request() -> None:
    request = chat("why?", system="be brief", temperature=0, max_tokens=8)

    assert [(turn.role, turn.content) for turn in request.chat.messages] == [
        ("system", "be brief"),
        ("user", "why?"),
    ]
    assert request.sampling.HasField("temperature")
    assert request.sampling.max_tokens == 8

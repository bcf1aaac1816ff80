"""The router in front of batchers that fail: what it hides, and what it says when it cannot."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest

from headrace import errors
from headrace.client import Client, chat, connect
from headrace.router.__main__ import router
from headrace.router.settings import Settings
from headrace.runtime.server import serving
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1.generation_service_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)
from headrace.v1.routing_service_pb2_grpc import (
    RoutingServiceServicer,
    add_RoutingServiceServicer_to_server,
)
from tests.harness import collect, eventually


class Front(GenerationServiceServicer, RoutingServiceServicer):
    """A batcher that says it is healthy, and then does as it is told: answers, refuses or breaks."""

    def __init__(self, *, refuses: bool = False, breaks: bool = False) -> None:
        self.refuses = refuses
        self.breaks = breaks
        self.requests: list[pb.GenerateRequest] = []

    async def ListTiers(self, request: object, context: object) -> routing.ListTiersResponse:
        return routing.ListTiersResponse(tiers=[routing.Tier(healthy=True)])

    async def Explain(self, request: object, context: object) -> routing.ExplainResponse:
        raise errors.Unimplemented("a batcher does not explain")

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        if self.refuses:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "as a broken connection: without details")
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id=request.request_id))
        if self.breaks:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "as a broken connection: without details")
        yield pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_STOP))


@asynccontextmanager
async def routed(**fronts: Front) -> AsyncGenerator[Client, None]:
    """A router in front of these batchers, smallest first, and a client that does not retry."""
    async with AsyncExitStack() as stack:
        targets = []
        for name, front in fronts.items():

            def register(server: grpc.aio.Server, front: Front = front) -> None:
                add_GenerationServiceServicer_to_server(front, server)
                add_RoutingServiceServicer_to_server(front, server)

            server = await stack.enter_async_context(
                serving(register, (), host="127.0.0.1", port=0, drain_seconds=0, ready=lambda: True)
            )
            targets.append(f"{name}=127.0.0.1:{server.port}")
        gate = await stack.enter_async_context(
            router(Settings(port=0, tiers=",".join(targets), drain_seconds=0, poll_seconds=60))
        )
        await eventually(lambda: gate.health.ready)
        yield await stack.enter_async_context(connect(f"127.0.0.1:{gate.port}", retries=0))


async def test_a_tier_that_refuses_before_accepting_is_replaced_unseen() -> None:
    small, large = Front(refuses=True), Front()
    async with routed(small=small, large=large) as client:
        answer = await collect(client, chat("Hi!"))

    assert answer.finish.reason == pb.FINISH_REASON_STOP
    assert (len(small.requests), len(large.requests)) == (1, 1)
    assert small.requests[0].sampling.seed == large.requests[0].sampling.seed, "one request, one seed"
    assert small.requests[0].request_id == large.requests[0].request_id


async def test_without_leave_to_move_the_caller_hears_that_nobody_serves() -> None:
    small, large = Front(refuses=True), Front()
    async with routed(small=small, large=large) as client:
        request = chat("Hi!")
        request.routing.allow_escalation = False
        with pytest.raises(errors.NoWorkers, match="'small' cannot be reached") as caught:
            await collect(client, request)

    assert caught.value.retry_after == 1.0
    assert large.requests == []


async def test_when_every_tier_refuses_the_last_one_is_named() -> None:
    async with routed(small=Front(refuses=True), large=Front(refuses=True)) as client:
        with pytest.raises(errors.NoWorkers, match="'large' cannot be reached"):
            await collect(client, chat("Hi!"))


async def test_an_answer_that_breaks_off_is_not_begun_again_elsewhere() -> None:
    small, large = Front(breaks=True), Front()
    async with routed(small=small, large=large) as client:
        with pytest.raises(errors.BatcherLost, match="'small'"):
            await collect(client, chat("Hi!"))

    assert large.requests == []

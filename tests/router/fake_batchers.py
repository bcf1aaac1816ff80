"""Batchers that do as they are told, and a router in front of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from headrace import errors
from headrace.channel import open_channel
from headrace.client import Client, connect
from headrace.router.__main__ import router
from headrace.router.settings import Settings
from headrace.runtime.server import serving
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1.admin_service_pb2_grpc import AdminServiceStub
from headrace.v1.generation_service_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)
from headrace.v1.routing_service_pb2_grpc import (
    RoutingServiceServicer,
    add_RoutingServiceServicer_to_server,
)
from tests.harness import PATIENCE, eventually


@dataclass
class Front(GenerationServiceServicer, RoutingServiceServicer):
    """Says the prompt back, a byte a token and `pieces` tokens a delta, until it fails as it was told.

    refuses      raised instead of `accepted`; a string breaks off without details, as a connection does
    refusals     how many requests it refuses
    breaks       for each request in turn, after how many tokens of its own its stream breaks; then no more
    breaks_with  what it breaks with
    hangs        says nothing more after `accepted`, and answers no look
    running, queued   what it says of its load
    healthy      what it says of its health
    tier         what it calls its tier
    listed       what it answers to ListTiers, in place of the truth
    timing       of each answer
    """

    model: str = "echo"
    refuses: errors.HeadraceError | str = ""
    refusals: float = math.inf
    breaks: Sequence[int] = ()
    breaks_with: errors.HeadraceError | str = "broken"
    hangs: bool = False
    pieces: int = 1
    running: int = 0
    queued: int = 0
    healthy: bool = True
    tier: str = ""
    listed: routing.ListTiersResponse | None = None
    timing: pb.Timing | None = None
    looks: int = 0
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    time_left: list[float] = field(default_factory=list)

    async def ListTiers(self, request: object, context: object) -> routing.ListTiersResponse:
        self.looks += 1
        if self.hangs and self.requests:
            await asyncio.Event().wait()
        if self.listed is not None:
            return self.listed
        load = routing.TierLoad(running=self.running, queued=self.queued, workers=1)
        tier = routing.Tier(name=self.tier, healthy=self.healthy, model=self.model, load=load)
        return routing.ListTiersResponse(tiers=[tier])

    async def Explain(self, request: object, context: object) -> routing.ExplainResponse:
        raise errors.Unimplemented("a batcher does not explain")

    async def Feedback(self, request: object, context: object) -> routing.FeedbackResponse:
        raise errors.Unimplemented("a batcher takes no feedback")

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        breaks = self.breaks[len(self.requests)] if len(self.requests) < len(self.breaks) else None
        self.requests.append(request)
        self.time_left.append(context.time_remaining())
        if self.refuses and len(self.requests) <= self.refusals:
            await self._fail(self.refuses, context)
        yield pb.GenerateResponse(
            accepted=pb.Accepted(
                request_id=request.request_id, model=self.model, tier=self.tier, seed=request.sampling.seed
            )
        )
        if self.hangs:
            await asyncio.Event().wait()
        said = list((request.prompt or request.chat.messages[-1].content).encode())
        had = at = len(request.resume.token_ids)
        assert list(request.resume.token_ids) == said[:at], "what was said before is what is said"
        while at < len(said):
            ids = said[at : at + self.pieces]
            if breaks is not None and at - had + len(ids) > breaks:
                break
            delta = pb.Delta(offset=at, token_count=len(ids), token_ids=ids, text=bytes(ids).decode())
            if not request.stream.include_token_ids:
                del delta.token_ids[:]
            yield pb.GenerateResponse(delta=delta)
            at += len(ids)
        if breaks is not None:
            await self._fail(self.breaks_with, context)
        usage = pb.Usage(completion_tokens=len(said), replayed_tokens=had)
        finish = pb.Finish(reason=pb.FINISH_REASON_STOP, usage=usage, timing=self.timing)
        yield pb.GenerateResponse(finish=finish)

    async def _fail(self, failure: errors.HeadraceError | str, context: Any) -> None:
        if isinstance(failure, errors.HeadraceError):
            raise failure
        await context.abort(grpc.StatusCode.UNAVAILABLE, failure)


@asynccontextmanager
async def serving_front(front: Front) -> AsyncGenerator[str, None]:
    """Serve one; yields its address."""

    def register(server: grpc.aio.Server) -> None:
        add_GenerationServiceServicer_to_server(front, server)
        add_RoutingServiceServicer_to_server(front, server)

    async with serving(register, (), host="127.0.0.1", port=0, drain_seconds=0, ready=lambda: True) as server:
        yield f"127.0.0.1:{server.port}"


@asynccontextmanager
async def routed(
    settings: dict[str, Any] | None = None, **tiers: Front | Sequence[Front] | str
) -> AsyncGenerator[Client, None]:
    """A router in front of these tiers' batchers, smallest first, and a client that does not retry.

    tiers   what serves each; a string is the address of something that serves already
    """
    async with routing_port(settings, **tiers) as port, connect(f"127.0.0.1:{port}", retries=0) as client:
        yield client


@asynccontextmanager
async def routing_port(
    settings: dict[str, Any] | None = None, **tiers: Front | Sequence[Front] | str
) -> AsyncGenerator[int, None]:
    """As `routed`; yields the router's port."""
    async with AsyncExitStack() as stack:
        targets = []
        every: dict[str, bool] = {}
        for name, fronts in tiers.items():
            if isinstance(fronts, str):
                targets.append(f"{name}={fronts}")
                every[fronts] = True
                continue
            here = {
                await stack.enter_async_context(serving_front(front)): front
                for front in ([fronts] if isinstance(fronts, Front) else fronts)
            }
            targets.append(f"{name}={'+'.join(here)}")
            every |= {address: front.healthy for address, front in here.items()}
        given: dict[str, Any] = {
            "drain_seconds": 0,
            "poll_seconds": 60,
            "resume_seconds": 60,
            "wait_seconds": 0,
        }
        given |= settings or {}
        gate = await stack.enter_async_context(router(Settings(port=0, tiers=",".join(targets), **given)))
        await eventually(lambda: gate.health.ready)
        await _until_looked_at(gate.port, every)
        yield gate.port


async def _until_looked_at(port: int, healthy: Mapping[str, bool]) -> None:
    """Wait until the router knows each batcher, by address, for what it is: its first look may time out."""
    async with open_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(PATIENCE):
        while True:
            state = (await AdminServiceStub(channel).Inspect(admin.InspectRequest())).router
            known = {batcher.address: batcher.ready for batcher in state.batchers}
            if known == healthy:
                return
            await asyncio.sleep(0.01)

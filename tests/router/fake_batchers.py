"""Fake batchers with configurable behaviour, and a router in front of them."""

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
from headrace.multiplex.serving import METHOD as MULTIPLEX
from headrace.router.__main__ import router
from headrace.router.settings import Settings
from headrace.runtime.serving.server import serving
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1.admin_service_pb2_grpc import AdminServiceStub
from headrace.v1.generation_service_pb2_grpc import add_GenerationServiceServicer_to_server
from headrace.v1.routing_service_pb2_grpc import (
    RoutingServiceServicer,
    add_RoutingServiceServicer_to_server,
)
from tests.harness import PATIENCE, eventually
from tests.multiplexed import MultiplexedServicer


@dataclass
class FakeBatcher(MultiplexedServicer, RoutingServiceServicer):
    """Echoes the prompt, one byte per token and `pieces` tokens per delta, until it fails as configured.

    refuses      raised instead of `accepted`; a string ends the call without details, as a lost connection
    refusals     number of requests that it refuses
    breaks       for each request in turn, the number of its own tokens after which its stream breaks
    breaks_with  the error of a broken stream
    hangs        it sends nothing after `accepted`, and does not reply to polls
    running, queued   the load that it reports
    healthy      the health that it reports
    tier         its own name of its tier
    listed       its reply to ListTiers; None: the right one
    timing       of each answer
    text_only    whether its answers are text alone, as of a service outside of the mesh
    usage        of each answer of text alone, as that service reports it; None: it reports none
    polls        number of polls received
    multiplexes  whether it offers Multiplex
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
    text_only: bool = False
    usage: pb.Usage | None = None
    polls: int = 0
    multiplexes: bool = True
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    time_left: list[float] = field(default_factory=list)

    async def ListTiers(self, request: object, context: object) -> routing.ListTiersResponse:
        self.polls += 1
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
                request_id=request.request_id,
                model=self.model,
                tier=self.tier,
                seed=request.sampling.seed,
                text_only=self.text_only,
            )
        )
        if self.hangs:
            await asyncio.Event().wait()
        text = request.chat.messages[-1].content if request.HasField("chat") else request.prompt
        said = list(request.token_ids.ids or text.encode())
        had = at = len(request.resume.token_ids)
        assert list(request.resume.token_ids) == said[:at], "a resumed answer continues its own text"
        while at < len(said):
            ids = said[at : at + self.pieces]
            if breaks is not None and at - had + len(ids) > breaks:
                break
            delta = pb.Delta(offset=at, token_count=len(ids), token_ids=ids, text=bytes(ids).decode())
            if self.text_only or not request.stream.include_token_ids:
                del delta.token_ids[:]
            yield pb.GenerateResponse(delta=delta)
            at += len(ids)
        if breaks is not None:
            await self._fail(self.breaks_with, context)
        usage = pb.Usage(completion_tokens=len(said), replayed_tokens=had)
        if self.text_only:
            usage = self.usage or pb.Usage()
        finish = pb.Finish(reason=pb.FINISH_REASON_STOP, usage=usage, timing=self.timing)
        yield pb.GenerateResponse(finish=finish)

    async def _fail(self, failure: errors.HeadraceError | str, context: Any) -> None:
        if isinstance(failure, errors.HeadraceError):
            raise failure
        await context.abort(grpc.StatusCode.UNAVAILABLE, failure)


@asynccontextmanager
async def serving_fake(fake: FakeBatcher) -> AsyncGenerator[str, None]:
    """Serve a fake batcher; yield its address."""

    def register(server: grpc.aio.Server) -> None:
        add_GenerationServiceServicer_to_server(fake, server)
        add_RoutingServiceServicer_to_server(fake, server)

    async with serving(
        register,
        (),
        host="127.0.0.1",
        port=0,
        drain_seconds=0,
        untracked=frozenset({MULTIPLEX}),
        ready=lambda: True,
    ) as server:
        yield f"127.0.0.1:{server.port}"


@asynccontextmanager
async def routed(
    settings: dict[str, Any] | None = None, **tiers: FakeBatcher | Sequence[FakeBatcher] | str
) -> AsyncGenerator[Client, None]:
    """Start a router in front of these tiers' batchers, smallest first; yield a client that does not retry.

    tiers   the batchers of each; a string is the address of a running server
    """
    async with routing_port(settings, **tiers) as port, connect(f"127.0.0.1:{port}", retries=0) as client:
        yield client


@asynccontextmanager
async def routing_port(
    settings: dict[str, Any] | None = None, **tiers: FakeBatcher | Sequence[FakeBatcher] | str
) -> AsyncGenerator[int, None]:
    """Start the same router as `routed`; yield its port."""
    async with AsyncExitStack() as stack:
        targets = []
        every: dict[str, bool] = {}
        for name, fakes in tiers.items():
            if isinstance(fakes, str):
                targets.append(f"{name}={fakes}")
                every[fakes] = True
                continue
            here = {
                await stack.enter_async_context(serving_fake(fake)): fake
                for fake in ([fakes] if isinstance(fakes, FakeBatcher) else fakes)
            }
            targets.append(f"{name}={'+'.join(here)}")
            every |= {address: fake.healthy for address, fake in here.items()}
        given: dict[str, Any] = {
            "drain_seconds": 0,
            "poll_seconds": 60,
            "failover_seconds": 60,
            "tier_wait_seconds": 0,
        }
        given |= settings or {}
        gate = await stack.enter_async_context(router(Settings(port=0, tiers=",".join(targets), **given)))
        await eventually(lambda: gate.health.ready)
        await _until_polled(gate.port, every)
        yield gate.port


async def _until_polled(port: int, healthy: Mapping[str, bool]) -> None:
    """Wait until the router has the right health of each batcher, by address: the first poll may time out."""
    async with open_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(PATIENCE):
        while True:
            state = (await AdminServiceStub(channel).Inspect(admin.InspectRequest())).router
            known = {batcher.address: batcher.ready for batcher in state.batchers}
            if known == healthy:
                return
            await asyncio.sleep(0.01)

"""A router that records what it is asked, and answers with configured tokens."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx

from headrace import errors
from headrace.gateway.__main__ import gateway
from headrace.gateway.settings import Settings
from headrace.multiplex.serving import METHOD as MULTIPLEX
from headrace.runtime.serving.server import serving
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1.generation_service_pb2_grpc import add_GenerationServiceServicer_to_server
from headrace.v1.routing_service_pb2_grpc import (
    RoutingServiceServicer,
    add_RoutingServiceServicer_to_server,
)
from tests.harness import eventually
from tests.multiplexed import MultiplexedServicer

TIERS = {"small": "tiny", "large": "big,bigger"}
ROCKET = "🚀".encode()
TOKENS = (b"Hello", b" ", ROCKET[:2], ROCKET[2:], b"\n")
TEXT = "Hello 🚀\n"
SCORE = 0.25


@dataclass
class FakeRouter(MultiplexedServicer, RoutingServiceServicer):
    """Answers each request with the same tokens, one in a delta, on the tier that it pins or the first one.

    tokens     of each answer
    deltas     of each answer, instead of those of the tokens; offsets and ids are added
    tool_calls   the answer to a request with tools, unless it ends with the result of one
    logprobs   of each token, first to last; the others have -0.5
    reason, stop_sequence   of each finish
    text_only  whether answers are text alone: their tokens have no ids
    cost       of each answer; None: no bill
    tiers      names and models
    refuses    raised instead of `accepted`
    breaks     raised after the first delta
    failing    the number of the request, from 0, that is refused or breaks; None: all
    held_back  awaited after `accepted`, if set
    gate       awaited after the first delta, if set
    started_after   for each request, the first tokens that were sent before it
    """

    tokens: Sequence[bytes] = TOKENS
    deltas: Sequence[pb.Delta] = ()
    tool_calls: Sequence[pb.ToolCallDelta] = ()
    logprobs: Sequence[float] = ()
    reason: pb.FinishReason.ValueType = pb.FINISH_REASON_STOP
    stop_sequence: str = ""
    text_only: bool = False
    cost: float | None = 0.5
    tiers: Mapping[str, str] = field(default_factory=lambda: dict(TIERS))
    refuses: errors.HeadraceError | None = None
    breaks: errors.HeadraceError | None = None
    failing: int | None = None
    held_back: asyncio.Event | None = None
    gate: asyncio.Event | None = None
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    time_left: list[float | None] = field(default_factory=list)
    polls: list[dict[str, str]] = field(default_factory=list)
    active: int = 0
    first_tokens: int = 0
    started_after: list[int] = field(default_factory=list)

    def reset(self) -> None:
        """Forget all requests but those that run, and behave as by default."""
        active = self.active
        self.__init__()  # type: ignore[misc]
        self.active = active

    async def renew(self, ask: Callable[[], Awaitable[object]]) -> None:
        """Reset once the requests of earlier tests have arrived and ended; their callers may have left.

        ask   sends a request: those that were sent before it arrive before it
        """
        self.reset()
        await ask()
        await eventually(lambda: self.active == 0)
        self.reset()

    async def ListTiers(self, request: object, context: Any) -> routing.ListTiersResponse:
        self.polls.append(dict(context.invocation_metadata()))
        if self.refuses is not None:
            raise self.refuses
        limits = routing.TierLimits(context_length=2048)
        tiers = [routing.Tier(name=name, model=model, limits=limits) for name, model in self.tiers.items()]
        tiers[-1].limits.context_length = 4096
        return routing.ListTiersResponse(tiers=tiers)

    async def Explain(self, request: object, context: object) -> routing.ExplainResponse:
        raise errors.Unimplemented("a fake router does not explain")

    async def Feedback(self, request: object, context: object) -> routing.FeedbackResponse:
        raise errors.Unimplemented("a fake router takes no feedback")

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        number = len(self.requests)
        self.requests.append(request)
        self.time_left.append(context.time_remaining())
        self.active += 1
        self.started_after.append(self.first_tokens)
        try:
            async with aclosing(self._events(request, number)) as events:
                async for response in events:
                    yield response
        finally:
            self.active -= 1

    async def _events(
        self, request: pb.GenerateRequest, number: int
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        fails = self.failing in (None, number)
        if self.refuses is not None and fails:
            raise self.refuses
        tier = request.routing.tier or next(iter(self.tiers))
        accepted = pb.Accepted(
            request_id=request.request_id,
            model=request.routing.model or self.tiers.get(tier, "").split(",")[0],
            tier=tier,
            score=SCORE,
            prompt_tokens=0 if self.text_only else 7,
            seed=request.sampling.seed,
            text_only=self.text_only,
            answer_id=f"answer-{number}",
        )
        yield pb.GenerateResponse(accepted=accepted)
        if self.held_back is not None:
            await self.held_back.wait()
        deltas = [*(_numbered(self.deltas) or self._deltas(request.sampling))]
        if self.tool_calls and request.chat.tools and request.chat.messages[-1].role != "tool":
            deltas = _numbered([pb.Delta(token_count=1, tool_calls=self.tool_calls)])
        for place, delta in enumerate(deltas):
            self.first_tokens += place == 0
            if self.text_only:
                _remove_ids(delta)
            yield pb.GenerateResponse(delta=delta)
            if place == 0 and self.gate is not None:
                await self.gate.wait()
            if place == 0 and self.breaks is not None and fails:
                raise self.breaks
        count = sum(delta.token_count for delta in deltas)
        usage = pb.Usage(prompt_tokens=7, cached_tokens=4, completion_tokens=count)
        finish = pb.Finish(reason=self.reason, stop_sequence=self.stop_sequence, usage=usage)
        if self.cost is not None:
            finish.bill.cost = self.cost
        yield pb.GenerateResponse(finish=finish)

    def _deltas(self, sampling: pb.Sampling) -> Iterator[pb.Delta]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        for offset, token in enumerate(self.tokens):
            delta = pb.Delta(
                offset=offset, token_count=1, token_ids=[100 + offset], text=decoder.decode(token)
            )
            if sampling.HasField("top_logprobs"):
                delta.tokens.append(self._details(offset, token, sampling.top_logprobs))
            yield delta

    def _details(self, offset: int, token: bytes, most: int) -> pb.TokenLogprobs:
        logprob = self.logprobs[offset] if offset < len(self.logprobs) else -0.5
        own = pb.TokenLogprob(id=100 + offset, logprob=logprob, text=token)
        others = [pb.TokenLogprob(id=rank, logprob=-1.0 - rank, text=b"o") for rank in range(most - 1)]
        return pb.TokenLogprobs(token=own, top=[own, *others] if most else [])


def _remove_ids(delta: pb.Delta) -> None:
    del delta.token_ids[:]
    for described in delta.tokens:
        for token in (described.token, *described.top):
            token.id = 0


def _numbered(deltas: Sequence[pb.Delta]) -> list[pb.Delta]:
    """Return copies with the offset and, where there are none, the ids of their tokens."""
    offset, numbered = 0, []
    for delta in deltas:
        copy = pb.Delta()
        copy.CopyFrom(delta)
        copy.offset = offset
        if not copy.token_ids:
            copy.token_ids.extend(range(100 + offset, 100 + offset + delta.token_count))
        offset += delta.token_count
        numbered.append(copy)
    return numbered


@asynccontextmanager
async def serving_router(router: FakeRouter) -> AsyncGenerator[str, None]:
    """Serve a fake router; yield its target."""

    def register(server: grpc.aio.Server) -> None:
        add_GenerationServiceServicer_to_server(router, server)
        add_RoutingServiceServicer_to_server(router, server)

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


@dataclass(frozen=True)
class Edge:
    """A gateway in front of a fake router, and an HTTP client of it.

    url   where OpenAI's API is
    """

    router: FakeRouter
    http: httpx.AsyncClient
    url: str

    async def chat(self, *, headers: Mapping[str, str] | None = None, **parameters: Any) -> httpx.Response:
        """Ask for a chat completion."""
        messages = [{"role": "user", "content": "Hi"}]
        body = {"messages": messages, **parameters}
        return await self.http.post("/chat/completions", json=body, headers=headers)

    @property
    def asked(self) -> pb.GenerateRequest:
        """The last request that the router received."""
        return self.router.requests[-1]


@asynccontextmanager
async def edge(**router: Any) -> AsyncGenerator[Edge, None]:
    """Run a gateway in front of a fake router."""
    fake = FakeRouter(**router)
    async with (
        serving_router(fake) as target,
        gateway(Settings(port=0, router=target)) as running,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.port}/v1", timeout=60) as http,
    ):
        yield Edge(fake, http, str(http.base_url))

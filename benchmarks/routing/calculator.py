"""A tier that is not a language model: it evaluates the arithmetic in a prompt, and nothing else.

It stands for the tools and special models that are better than any larger model at one thing and useless at
others. It speaks the contract of a batcher.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc

from headrace import errors
from headrace.multiplex.serving import METHOD as MULTIPLEX
from headrace.routing.drafts.arithmetic import equations
from headrace.runtime.serving.server import serving
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1.generation_service_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)
from headrace.v1.routing_service_pb2_grpc import RoutingServiceServicer, add_RoutingServiceServicer_to_server

_MODEL = "calculator"
_DECLINED = "I can only calculate."


def calculated(prompt: str) -> str:
    """Return the value of the last expression in *prompt*, or a sentence if there is none."""
    for sentence in reversed(re.split(r"[?.!](?:\s|$)|[:\n]", prompt)):
        with suppress(IndexError):
            return f"{equations(f'{sentence} = 0')[-1].left:.10g}"
    return _DECLINED


class Calculator(GenerationServiceServicer, RoutingServiceServicer):
    """Answers like a batcher: accepted, one delta, finish."""

    async def ListTiers(self, request: Any, context: Any) -> routing.ListTiersResponse:
        """Return the one tier."""
        load = routing.TierLoad(workers=1)
        return routing.ListTiersResponse(tiers=[routing.Tier(healthy=True, model=_MODEL, load=load)])

    async def Explain(self, request: Any, context: Any) -> routing.ExplainResponse:
        """Reject it, like a batcher."""
        raise errors.Unimplemented("a calculator does not explain")

    async def Feedback(self, request: Any, context: Any) -> routing.FeedbackResponse:
        """Reject it, like a batcher."""
        raise errors.Unimplemented("a calculator takes no feedback")

    async def Multiplex(self, request_iterator: Any, context: Any) -> Any:  # type: ignore[override]
        """Reject it; the router then uses Generate."""
        raise errors.Unimplemented("a calculator has no shared streams")

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        """Answer the last message; a character counts as a token."""
        prompt = request.chat.messages[-1].content if request.HasField("chat") else request.prompt
        answer, had = calculated(prompt), len(request.resume.token_ids)
        yield pb.GenerateResponse(
            accepted=pb.Accepted(
                request_id=request.request_id,
                model=_MODEL,
                prompt_tokens=len(prompt),
                seed=request.sampling.seed,
            )
        )
        rest = answer[had:]
        yield pb.GenerateResponse(
            delta=pb.Delta(text=rest, offset=had, token_count=len(rest), token_ids=rest.encode("ascii"))
        )
        usage = pb.Usage(prompt_tokens=len(prompt), completion_tokens=len(answer))
        yield pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_STOP, usage=usage))


@asynccontextmanager
async def calculator() -> AsyncGenerator[str, None]:
    """Serve a calculator while the block runs; yields its target."""
    servicer = Calculator()

    def register(server: grpc.aio.Server) -> None:
        add_GenerationServiceServicer_to_server(servicer, server)
        add_RoutingServiceServicer_to_server(servicer, server)

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

"""A fake router whose models have one token per byte, and a special one; it returns the tokens of prompts."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import openai

from headrace import errors
from headrace.gateway.__main__ import gateway
from headrace.gateway.settings import Settings
from headrace.multiplex.serving import METHOD as MULTIPLEX
from headrace.runtime.serving.server import serving
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import tokenizer_service_pb2 as tokens_pb
from headrace.v1.generation_service_pb2_grpc import add_GenerationServiceServicer_to_server
from headrace.v1.routing_service_pb2_grpc import add_RoutingServiceServicer_to_server
from headrace.v1.tokenizer_service_pb2_grpc import (
    TokenizerServiceServicer,
    add_TokenizerServiceServicer_to_server,
)
from tests.gateway.fake_router import FakeRouter

SPECIAL = 256  # the id of the special token, which has no text
NAME = "<s>"


def ids_of(text: str) -> list[int]:
    """Return the tokens of a text."""
    return [
        SPECIAL if part == "\0" else ord(part) for part in text.replace(NAME, "\0").encode().decode("latin-1")
    ]


def text_of(ids: list[int]) -> str:
    """Return the text of tokens."""
    return b"".join(NAME.encode() if id == SPECIAL else bytes([id]) for id in ids).decode(errors="replace")


@dataclass
class TextRouter(FakeRouter, TokenizerServiceServicer):
    """A fake router; the tokens of prompts come in parts of two.

    calls               to its tokenizers
    tokenizer_refuses   raised by them
    """

    calls: list[Any] = field(default_factory=list)
    tokenizer_refuses: errors.HeadraceError | None = None

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        ids = list(request.token_ids.ids) or ids_of(request.prompt)
        async with aclosing(super().Generate(request, context)) as responses:
            async for response in responses:
                if response.HasField("accepted"):
                    response.accepted.prompt_tokens = len(ids)
                elif response.HasField("finish"):
                    response.finish.usage.prompt_tokens = len(ids)
                yield response
                if response.HasField("accepted") and request.sampling.HasField("prompt_logprobs"):
                    for start in range(0, len(ids), 2):
                        tokens = [
                            _details(ids[at], at, request.sampling.prompt_logprobs)
                            for at in range(start, min(start + 2, len(ids)))
                        ]
                        part = pb.PromptTokens(offset=start, tokens=tokens)
                        yield pb.GenerateResponse(prompt_tokens=part)

    async def Tokenize(self, request: tokens_pb.TokenizeRequest, context: Any) -> tokens_pb.TokenizeResponse:
        self._note(request)
        text = request.prompt or "".join(message.content for message in request.chat.messages)
        ids = ids_of(text)
        if request.HasField("prompt") and request.add_special_tokens:
            ids = [SPECIAL, *ids]
        texts = [text_of([id]).encode() if id == SPECIAL else bytes([id]) for id in ids]
        return tokens_pb.TokenizeResponse(
            token_ids=ids, texts=texts if request.include_texts else (), tokenizer=_used(request)
        )

    async def Detokenize(
        self, request: tokens_pb.DetokenizeRequest, context: Any
    ) -> tokens_pb.DetokenizeResponse:
        self._note(request)
        return tokens_pb.DetokenizeResponse(text=text_of(list(request.token_ids)), tokenizer=_used(request))

    async def CountTokens(
        self, request: tokens_pb.CountTokensRequest, context: Any
    ) -> tokens_pb.CountTokensResponse:
        self._note(request)
        return tokens_pb.CountTokensResponse(tokens=len(ids_of(request.prompt)), tokenizer=_used(request))

    async def GetTokenizer(
        self, request: tokens_pb.GetTokenizerRequest, context: Any
    ) -> tokens_pb.GetTokenizerResponse:
        self._note(request)
        return tokens_pb.GetTokenizerResponse(
            special_tokens={"eos_token": NAME}, chat_template="{{ messages }}", tokenizer=_used(request)
        )

    def _note(self, request: Any) -> None:
        self.calls.append(request)
        if self.tokenizer_refuses is not None:
            raise self.tokenizer_refuses
        choice = request.tokenizer
        if not (choice.tier or choice.model) and len(self.tiers) > 1:
            raise errors.InvalidRequest("tokenizer is not set, and there are several", field="tokenizer")


def _details(id: int, at: int, most: int) -> pb.TokenLogprobs:
    text = b"" if id == SPECIAL else bytes([id])
    if at == 0:
        return pb.TokenLogprobs(token=pb.TokenLogprob(id=id, text=text))
    own = pb.TokenLogprob(id=id, text=text, logprob=-at / 4)
    best = pb.TokenLogprob(id=64, text=b"@", logprob=-0.125)
    return pb.TokenLogprobs(token=own, top=[best][:most])


def _used(request: Any) -> tokens_pb.TokenizerUsed:
    return tokens_pb.TokenizerUsed(tier="small", model="tiny", context_length=2048)


@dataclass(frozen=True)
class TextEdge:
    """A gateway in front of a fake router, and clients of it."""

    router: TextRouter
    http: httpx.AsyncClient
    sdk: openai.AsyncOpenAI

    async def complete(self, *, headers: dict[str, str] | None = None, **parameters: Any) -> httpx.Response:
        """Request a text completion."""
        return await self.http.post("/v1/completions", json={"prompt": "Hi", **parameters}, headers=headers)

    @property
    def asked(self) -> pb.GenerateRequest:
        """The last request that the router received."""
        return self.router.requests[-1]


@asynccontextmanager
async def text_edge(**tiers: str) -> AsyncGenerator[TextEdge, None]:
    """Run a gateway in front of a fake router.

    tiers   names and models. A gateway remembers them, so that a test with others needs a gateway of its own
    """
    router = TextRouter()
    router.tiers = tiers or router.tiers

    def register(server: grpc.aio.Server) -> None:
        add_GenerationServiceServicer_to_server(router, server)
        add_RoutingServiceServicer_to_server(router, server)
        add_TokenizerServiceServicer_to_server(router, server)

    async with (
        serving(
            register,
            (),
            host="127.0.0.1",
            port=0,
            drain_seconds=0,
            untracked=frozenset({MULTIPLEX}),
            ready=lambda: True,
        ) as server,
        gateway(Settings(port=0, router=f"127.0.0.1:{server.port}")) as running,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.port}", timeout=60) as http,
        openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0
        ) as sdk,
    ):
        yield TextEdge(router, http, sdk)

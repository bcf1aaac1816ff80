"""Pass calls of the TokenizerService on to a batcher of the tier, or of the model, that they name.

A call changes nothing, so another batcher is tried if one cannot answer. It counts as a request in the limits
of its tenant, as `Explain` does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import grpc

from headrace import errors
from headrace.client import Client
from headrace.deadline import Deadline
from headrace.router.answering.attempts import batcher_error, next_batcher, none_left
from headrace.router.answering.pins import tiers_of
from headrace.router.quotas.admission import Quotas
from headrace.router.state.batcher_peer import BatcherPeer, hops_of
from headrace.router.state.tiers import Tier, Tiers
from headrace.runtime.security.identity import current
from headrace.v1 import generation_pb2
from headrace.v1 import tokenizer_service_pb2 as pb
from headrace.v1.tokenizer_service_pb2_grpc import TokenizerServiceServicer
from headrace.validation import check_detokenize, check_get_tokenizer, check_tokenize

SERVICES = tuple(pb.DESCRIPTOR.services_by_name.values())

MOST_SECONDS = 60.0  # for a call without a deadline, or with a later one

_Request: TypeAlias = (
    pb.TokenizeRequest | pb.DetokenizeRequest | pb.CountTokensRequest | pb.GetTokenizerRequest
)
_Response: TypeAlias = (
    pb.TokenizeResponse | pb.DetokenizeResponse | pb.CountTokensResponse | pb.GetTokenizerResponse
)
_Context = grpc.aio.ServicerContext[Any, Any]
Q = TypeVar("Q", bound=_Request)
R = TypeVar("R", bound=_Response)


class TokenizerServicer(TokenizerServiceServicer):
    """Serves the tokenizers of all tiers.

    quotas   the limits of tenants; None: there are none
    """

    def __init__(self, tiers: Tiers, *, quotas: Quotas | None = None) -> None:
        self._tiers = tiers
        self._quotas = quotas

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:
        """Return the token ids of a text or a conversation."""
        check_tokenize(request)
        return await self._pass_on(request, context, Client.tokenize)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: _Context) -> pb.DetokenizeResponse:
        """Return the text of token ids."""
        check_detokenize(request)
        return await self._pass_on(request, context, Client.detokenize)

    async def CountTokens(self, request: pb.CountTokensRequest, context: _Context) -> pb.CountTokensResponse:
        """Return how many tokens a text or a conversation has."""
        check_tokenize(request)
        return await self._pass_on(request, context, Client.count_tokens)

    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: _Context
    ) -> pb.GetTokenizerResponse:
        """Return the special tokens and the chat template."""
        check_get_tokenizer(request)
        return await self._pass_on(request, context, Client.get_tokenizer)

    async def _pass_on(self, request: Q, context: _Context, method: Callable[..., Awaitable[R]]) -> R:
        """Return the response of the first batcher that has one."""
        hops = hops_of(context.invocation_metadata() or ())
        left = context.time_remaining()
        seconds = MOST_SECONDS if left is None else min(left, MOST_SECONDS)
        deadline = Deadline.after(seconds, time.monotonic())
        if self._quotas is not None:
            await self._quotas.admit_dry_run(current(), generation_pb2.GenerateRequest())
        tiers = tiers_of(request.tokenizer, self._tiers.tiers)
        # The router has chosen the tier, and a router behind it has other names for its tiers.
        request.tokenizer.tier = ""
        try:
            async with asyncio.timeout_at(deadline.timeout_at):
                return await _first_response(
                    tiers,
                    lambda batcher: batcher.tokenizer_call(method, request, deadline=deadline, hops=hops),
                )
        except TimeoutError:
            raise errors.DeadlineExceeded("the deadline passed before a batcher replied") from None


async def _first_response(tiers: Sequence[Tier], ask: Callable[[BatcherPeer], Awaitable[R]]) -> R:
    """Return the response of the first batcher of *tiers* that has one, with the router's name of its tier.

    Raises the error about the request, or that of the first tier if no batcher can answer.
    """
    failure: errors.HeadraceError | None = None
    for tier in tiers:
        refused: dict[BatcherPeer, errors.HeadraceError] = {}
        while (batcher := await next_batcher(tier, refused)) is not None:
            try:
                response = await ask(batcher)
            except errors.UnknownModel as error:
                refused[batcher] = error  # while batchers are replaced, some have another model
            except errors.Unimplemented:
                # It is a service outside of the mesh, or an older batcher that is being replaced.
                refused[batcher] = errors.Unimplemented(
                    f"tier {tier.name!r} has no tokenizer in this mesh: name another tier or model"
                )
            except errors.HeadraceError as raised:
                refused[batcher] = batcher_error(raised, batcher)
                if type(raised) is errors.Unavailable:
                    batcher.mark_suspect()
            else:
                response.tokenizer.tier = tier.name
                return response
        failure = failure or none_left(tier, refused)
    assert failure is not None, "there is at least one tier"
    raise failure

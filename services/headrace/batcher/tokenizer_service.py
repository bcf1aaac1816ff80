"""Serve the tokenizer of one tier.

Calls are bounded in number and in bytes. They have threads of their own, so they neither hold places of the
queue nor delay the prompts that wait to be tokenised. `Encoder` tokenises.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import grpc

from headrace import errors
from headrace.batcher.intake.encoding import Encoder
from headrace.batcher.intake.intake import LONG_BYTES
from headrace.batcher.intake.lanes import Lane, Pending, outcome_after
from headrace.batcher.intake.limits import RequestLimits
from headrace.batcher.text.tokens import Tokenizer, token_texts
from headrace.deadline import Deadline
from headrace.v1 import tokenizer_service_pb2 as pb
from headrace.v1.tokenizer_service_pb2_grpc import TokenizerServiceServicer
from headrace.validation import MAX_TOKENIZER_IDS, check_detokenize, check_get_tokenizer, check_tokenize

SERVICES = tuple(pb.DESCRIPTOR.services_by_name.values())

MAX_WAITING = 256  # calls
_ID_BYTES = 4  # of text, about, that a token id stands for
_SIZES = (0, LONG_BYTES)  # the smallest call of each lane, in bytes; each has one thread

T = TypeVar("T")

_Context = grpc.aio.ServicerContext[Any, Any]
_Input = pb.TokenizeRequest | pb.CountTokensRequest


class TokenizerServicer(TokenizerServiceServicer):
    """Serves the tokenizer of one tier. Use as a context manager: it owns threads.

    lanes       where calls wait, by size

    limits      returns the current limits of the tier, or raises NoWorkers
    max_bytes   most bytes of calls of `LONG_BYTES` and more that wait; a single one may have more
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        encoder: Encoder,
        limits: Callable[[], RequestLimits],
        *,
        max_bytes: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._limits = limits
        self._max_bytes = max_bytes
        self.lanes = [Lane(smallest=size, threads=1, ageing=1.0) for size in _SIZES]
        self._threads = ExitStack()

    def __enter__(self) -> TokenizerServicer:
        for lane in self.lanes:
            self._threads.enter_context(lane)
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:
        """Return the token ids of a text or a conversation."""
        check_tokenize(request)
        limits = self._limits_for(request.tokenizer)

        def tokenize() -> pb.TokenizeResponse:
            ids = self._ids(request)
            if len(ids) > MAX_TOKENIZER_IDS:
                raise errors.InvalidRequest(
                    f"the input has {len(ids)} tokens, but Tokenize returns at most {MAX_TOKENIZER_IDS}: "
                    "send it in parts, or use CountTokens",
                    field="input",
                    tokens=len(ids),
                )
            texts = token_texts(self._tokenizer, ids) if request.include_texts else ()
            return pb.TokenizeResponse(token_ids=ids, texts=texts, tokenizer=_used(limits))

        return await self._run(tokenize, request.ByteSize(), context)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: _Context) -> pb.DetokenizeResponse:
        """Return the text of token ids."""
        check_detokenize(request)
        limits = self._limits_for(request.tokenizer)

        def detokenize() -> pb.DetokenizeResponse:
            ids = request.token_ids[:]
            limits.check_ids("token_ids", ids)
            return pb.DetokenizeResponse(text=self._tokenizer.decode(ids), tokenizer=_used(limits))

        return await self._run(detokenize, _ID_BYTES * len(request.token_ids), context)

    async def CountTokens(self, request: pb.CountTokensRequest, context: _Context) -> pb.CountTokensResponse:
        """Return how many tokens a text or a conversation has."""
        check_tokenize(request)
        limits = self._limits_for(request.tokenizer)

        def count() -> pb.CountTokensResponse:
            return pb.CountTokensResponse(tokens=len(self._ids(request)), tokenizer=_used(limits))

        return await self._run(count, request.ByteSize(), context)

    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: _Context
    ) -> pb.GetTokenizerResponse:
        """Return the special tokens and the chat template."""
        check_get_tokenizer(request)
        return pb.GetTokenizerResponse(
            special_tokens=self._tokenizer.roles,
            chat_template=self._tokenizer.chat_template,
            tokenizer=_used(self._limits_for(request.tokenizer)),
        )

    def _ids(self, request: _Input) -> list[int]:
        """Return the tokens of the input. Called on a lane's thread."""
        # Absent fields have the value that is true for both kinds of requests.
        special, start = True, True
        if isinstance(request, pb.TokenizeRequest):
            special = request.add_special_tokens or not request.HasField("add_special_tokens")
            start = request.add_generation_prompt or not request.HasField("add_generation_prompt")
        if request.HasField("chat"):
            return self._encoder.chat_ids(request.chat, generation_prompt=start)
        return self._encoder.text_ids(request.prompt, add_special_tokens=special)

    def _limits_for(self, choice: pb.TokenizerChoice) -> RequestLimits:
        """Return the limits of the tier. Raises UnknownTier, UnknownModel or NoWorkers."""
        limits = self._limits()
        limits.check_names(choice.tier, choice.model, within="tokenizer")
        return limits

    async def _run(self, work: Callable[[], T], size: int, context: _Context) -> T:
        """Return the result of *work*, which runs on a thread, for a call of *size* bytes.

        Raises what it raises, Overloaded if too many calls wait, and DeadlineExceeded.
        """
        now = time.monotonic()
        deadline = Deadline.after(context.time_remaining(), now)
        pending = Pending(work, size=size, tenant="", priority=5, arrived=now, deadline=deadline)
        lane = next(lane for lane in reversed(self.lanes) if size >= lane.smallest)
        self._check_room(lane, size)
        lane.put(pending)
        try:
            result = await pending.wait(
                errors.DeadlineExceeded("the deadline passed before the tokenizer was done")
            )
        except BaseException as error:
            lane.leave(pending, outcome_after(error))
            raise
        lane.leave(pending, "ok")
        return result

    def _check_room(self, lane: Lane, size: int) -> None:
        """Raise Overloaded if too many calls, or too many bytes of them, wait."""
        long = lane.smallest > 0
        if lane.waiting >= MAX_WAITING or (long and lane.bytes and lane.bytes + size > self._max_bytes):
            delay = max(lane.longest_wait_seconds, 0.1)
            raise errors.Overloaded(
                f"{lane.waiting} calls with {lane.bytes} bytes wait for the tokenizer; retry "
                f"after {delay:.1f} s",
                retry_after=delay,
            )


def _used(limits: RequestLimits) -> pb.TokenizerUsed:
    return pb.TokenizerUsed(tier=limits.tier, model=limits.model, context_length=limits.context_length)

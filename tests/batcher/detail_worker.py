"""A worker that sends made-up details of tokens over the real wire, and dies as a test says."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from headrace.batcher.text.tokens import ByteTokenizer
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.v1.worker_service_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from tests.harness import eventually
from tests.tier import Tier, running_tier

VOCABULARY = 258
FEATURES = ("logprobs", "top_logprobs", "prompt_logprobs")


def logprob_at(ids: Sequence[int], place: int) -> float:
    """Return the log-probability of the token at *place*: it depends on the place and the ids before."""
    return -((place + sum(id * at for at, id in enumerate(ids[max(place - 7, 0) : place + 1], 1))) % 128) / 8


def top_at(ids: Sequence[int], place: int, most: int) -> tuple[list[int], list[float]]:
    """Return the most likely tokens at *place*: the token itself, and the next ids."""
    mine = logprob_at(ids, place)
    return [(ids[place] + n) % 256 for n in range(most)], [mine - n / 4 for n in range(most)]


def top_tokens(ids: Sequence[int], place: int, most: int) -> wire.TopTokens:
    top, logprobs = top_at(ids, place, most)
    return wire.TopTokens(ids=top, logprobs=logprobs)


@dataclass
class DetailWorker(WorkerServiceServicer):
    """Echoes prompts, *piece* tokens of the prompt or of the answer per message.

    dies       after how many messages of the next sequences the stream breaks; workers may share the list
    damage     changes each delta before it is sent
    repeats    how many tokens each part of a prompt repeats of the one before
    submitted  the sequences that it received
    """

    piece: int = 3
    features: Sequence[str] = FEATURES
    dies: list[int] = field(default_factory=list)
    damage: Callable[[wire.SequenceDelta], None] = lambda delta: None
    repeats: int = 0
    submitted: list[wire.Sequence] = field(default_factory=list)

    async def GetModel(self, request: object, context: object) -> wire.GetModelResponse:
        raise NotImplementedError

    async def Run(
        self, requests: AsyncIterator[wire.RunRequest], context: Any
    ) -> AsyncIterator[wire.RunResponse]:
        hello = (await anext(aiter(requests))).hello
        model = wire.ModelDescription(
            name="details",
            tokenizer_fingerprint=ByteTokenizer.fingerprint,
            context_length=1 << 17,
            vocabulary_size=VOCABULARY,
            max_running=64,
            shared_block_tokens=16,
            features=self.features,
        )
        credit = wire.Credit(sequences=64)
        yield wire.RunResponse(welcome=wire.Welcome(epoch=hello.epoch, model=model, credit=credit))
        frame = 0
        async for request in requests:
            if request.HasField("ping"):
                yield wire.RunResponse(pong=wire.Pong(nonce=request.ping.nonce))
            for sequence in request.submit.sequences:
                self.submitted.append(sequence)
                dies = self.dies.pop(0) if self.dies else None
                for count, delta in enumerate(self._deltas(sequence)):
                    if count == dies:
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "died")
                    self.damage(delta)
                    frame += 1
                    yield wire.RunResponse(step=wire.Step(frame=frame, deltas=[delta]))

    def _deltas(self, sequence: wire.Sequence) -> Iterator[wire.SequenceDelta]:
        sampling, prompt = sequence.sampling, list(sequence.prompt_ids)
        handle, attempt, size = sequence.handle, sequence.attempt, self.piece
        had = at = len(sequence.resume_ids)
        if sampling.HasField("prompt_logprobs"):
            most = sampling.prompt_logprobs
            for first in range(1, len(prompt), size):
                first = max(first - self.repeats, 1)
                places = range(first, min(first + size + self.repeats, len(prompt)))
                yield wire.SequenceDelta(
                    handle=handle,
                    attempt=attempt,
                    offset=at,
                    prompt=wire.PromptLogprobs(
                        offset=first,
                        logprobs=[logprob_at(prompt, place) for place in places],
                        top=[top_tokens(prompt, place, most) for place in places] if most else [],
                    ),
                )
        end = min(len(prompt), sampling.max_tokens)
        ids = prompt + prompt
        while at < end:
            stop = min(at + size, end)
            places = range(len(prompt) + at, len(prompt) + stop)
            delta = wire.SequenceDelta(
                handle=handle, attempt=attempt, offset=at, token_ids=[ids[place] for place in places]
            )
            if at == had:
                delta.cached_tokens = 0
            if sampling.logprobs:
                delta.logprobs.extend(logprob_at(ids, place) for place in places)
            if sampling.top_logprobs:
                delta.top.extend(top_tokens(ids, place, sampling.top_logprobs) for place in places)
            yield delta
            at = stop
        yield wire.SequenceDelta(handle=handle, attempt=attempt, offset=at, finish=pb.FINISH_REASON_STOP)


@asynccontextmanager
async def detailed_tier(*workers: DetailWorker, **settings: Any) -> AsyncGenerator[Tier, None]:
    """Run a tier of these workers."""
    async with AsyncExitStack() as stack:
        targets = []
        for worker in workers:
            server = grpc.aio.server()
            add_WorkerServiceServicer_to_server(worker, server)
            targets.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            await server.start()
            stack.push_async_callback(server.stop, 0)
        tier = await stack.enter_async_context(running_tier([], extra_workers=targets, **settings))
        await eventually(lambda: len(tier.batcher.coalescer.pool.ready()) == len(workers))
        yield tier

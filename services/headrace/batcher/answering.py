"""Answer one request, from the intake to its last response event, and record its outcome.

The intake checks, tokenises and bounds requests. The coalescer queues, batches and runs them. `answer` turns
token ids back into text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from headrace import attributes, errors
from headrace.batcher.coalescer import Coalescer
from headrace.batcher.intake.intake import Intake
from headrace.batcher.job import Job
from headrace.batcher.text.answer import AnswerEvents, record_unanswered
from headrace.batcher.text.tokens import Tokenizer
from headrace.deadline import Deadline
from headrace.v1 import generation_pb2 as pb

Write = Callable[[pb.GenerateResponse], Awaitable[None]]


class Answering:
    """Answers the requests of one tier."""

    def __init__(self, coalescer: Coalescer, intake: Intake, tokenizer: Tokenizer, *, tier: str) -> None:
        self._coalescer = coalescer
        self._intake = intake
        self._tokenizer = tokenizer
        self._tier = tier
        self._labels = {attributes.TIER: tier}

    async def answer(self, request: pb.GenerateRequest, remaining: float | None, write: Write) -> None:
        """Answer *request* through *write*.

        remaining   seconds until the deadline, None for no deadline
        write       sends an event; it may block while the caller does not read, and is cancelled if the
                    answer ends

        Raises the error that ends the call.
        """
        job = await self._job(request, remaining)
        try:
            await self._run(job, request, write)
        finally:
            if job.release_place is not None:
                job.release_place()

    async def _job(self, request: pb.GenerateRequest, remaining: float | None) -> Job:
        arrived = time.monotonic()
        outcome = "cancelled"  # until it ends otherwise
        try:
            job = await self._intake.job(request, arrived, Deadline.after(remaining, arrived))
            outcome = ""
        except errors.HeadraceError as error:
            # A request that no tier can answer is not an outcome of this tier.
            outcome = "" if isinstance(error, errors.InvalidRequest) else error.reason.lower()
            raise
        finally:
            if outcome:
                record_unanswered(self._labels, outcome, time.monotonic() - arrived)
        return job

    async def _run(self, job: Job, request: pb.GenerateRequest, write: Write) -> None:
        answer = AnswerEvents(job, request, self._tokenizer, self._labels)
        outcome = "cancelled"  # until it ends otherwise
        try:
            async with asyncio.timeout(None) as job.reader_timeout:
                async with aclosing(self._events(job, answer)) as events:
                    async for event in events:
                        await write(event)
            outcome = answer.outcome
        except TimeoutError:
            outcome = errors.SlowReader.reason.lower()
            raise errors.SlowReader(
                f"{job.inbox.unread} tokens have waited too long to be read, and no more are kept: read "
                "faster, or continue with `resume` after the tokens received",
                unread=job.inbox.unread,
            ) from None
        except errors.HeadraceError as error:
            outcome = error.reason.lower()
            raise
        finally:
            # On a busy server gRPC may cancel the call for its deadline before the batcher has noticed it.
            if outcome == "cancelled" and job.response_deadline.passed(time.monotonic()):
                outcome = job.deadline_error().reason.lower()
            answer.record(outcome)

    async def _events(self, job: Job, answer: AnswerEvents) -> AsyncGenerator[pb.GenerateResponse, None]:
        if job.resume_ids:
            await asyncio.get_running_loop().run_in_executor(None, answer.replay)
        if answer.already_complete:
            yield self._accepted(job)
            for event in answer.final_events():
                yield event
            return
        async with aclosing(self._coalescer.arrivals(job)) as arrivals:
            await anext(arrivals)
            yield self._accepted(job)
            async for arrival in arrivals:
                for event in answer.events_for(arrival):
                    yield event
                if answer.done:
                    break  # after a stop text the worker is still generating: closing the arrivals cancels it

    def _accepted(self, job: Job) -> pb.GenerateResponse:
        model = next((link.model.name for link in self._coalescer.pool.ready() if link.model), "")
        return pb.GenerateResponse(
            accepted=pb.Accepted(
                request_id=job.request_id,
                model=model,
                tier=self._tier,
                prompt_tokens=len(job.prompt_ids),
                seed=job.sampling.seed,
            )
        )

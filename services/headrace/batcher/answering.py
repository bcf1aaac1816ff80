"""Answer one request, from the intake to its last response event, and record its outcome.

The intake checks, tokenises and bounds requests. The coalescer queues, batches and runs them. `answer` turns
token ids back into text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from headrace.batcher.coalescer import Coalescer
from headrace.batcher.inbox import Take
from headrace.batcher.intake.intake import Intake
from headrace.batcher.job import Job
from headrace.batcher.text.answer import AnswerEvents
from headrace.batcher.text.recorded_text import RecordedText
from headrace.batcher.text.token_texts import Spellings
from headrace.batcher.text.tokens import Tokenizer
from headrace.batcher.token_details import Score
from headrace.deadline import Deadline
from headrace.metrics.requests import CANCELLED, End, Timing, record
from headrace.multiplex.outbox import EventWriter
from headrace.multiplex.serving import Write
from headrace.v1 import generation_pb2 as pb


class Answering:
    """Answers the requests of one tier.

    trace_content   whether spans contain prompts and answers
    """

    def __init__(
        self,
        coalescer: Coalescer,
        intake: Intake,
        tokenizer: Tokenizer,
        *,
        tier: str,
        trace_content: bool = False,
    ) -> None:
        self._coalescer = coalescer
        self._intake = intake
        self._tokenizer = tokenizer
        self._tier = tier
        self._trace_content = trace_content
        self._spellings = Spellings(tokenizer)

    async def answer(
        self, request: pb.GenerateRequest, remaining: float | None, write: Write, *, framed: bool = False
    ) -> None:
        """Answer *request* through *write*.

        remaining   seconds until the deadline, None for no deadline
        write       sends an event; it may block while the caller does not read, and is cancelled if the
                    answer ends
        framed      whether events travel in frames shared by many answers, so that an event is not a message

        Raises the error that ends the call.
        """
        job = await self._job(request, remaining, framed)
        text: RecordedText | None = None
        if self._trace_content and job.span.is_recording():
            text = RecordedText(request, write)
            write = text.write
        try:
            await self._run(job, request, write)
        finally:
            if text is not None:
                job.span.set_attributes(text.attributes())
            if job.release_place is not None:
                job.release_place()

    async def _job(self, request: pb.GenerateRequest, remaining: float | None, framed: bool) -> Job:
        arrived = time.monotonic()
        end: End | None = CANCELLED  # until it ends otherwise
        try:
            deadline = Deadline.after(remaining, arrived)
            job = await self._intake.job(request, arrived, deadline, framed=framed)
            end = None
        except Exception as error:
            end = End.by(error)
            raise
        finally:
            if end is not None:
                record(
                    end,
                    Timing(arrived),
                    time.monotonic(),
                    tier=self._tier,
                    model="",
                    chat=request.HasField("chat"),
                )
        return job

    async def _run(self, job: Job, request: pb.GenerateRequest, write: Write) -> None:
        answer = AnswerEvents(job, request, self._tokenizer, tier=self._tier, spellings=self._spellings)
        end = CANCELLED  # until it ends otherwise
        try:
            # One timer for the whole call: a timeout around each wait would cost more than the token.
            async with asyncio.timeout_at(job.response_deadline.timeout_at) as job.timeout:
                await self._write_events(job, answer, write)
            end = End.complete(answer.finish)
        except TimeoutError:
            if job.timeout is None or not job.timeout.expired():
                raise
            failure = job.timeout_error()
            end = End.by(failure)
            raise failure from None
        except Exception as error:
            end = End.by(error)
            raise
        finally:
            # On a busy server gRPC may cancel the call for its deadline before the batcher has noticed it.
            if end is CANCELLED and job.response_deadline.passed(time.monotonic()):
                end = End.by(job.deadline_error())
            answer.record(end)

    async def _write_events(self, job: Job, answer: AnswerEvents, write: Write) -> None:
        if job.resume_ids:
            await asyncio.get_running_loop().run_in_executor(None, answer.replay)
        if answer.already_complete:
            await write(self._accepted(job))
            for event in answer.final_events():
                await write(event)
            return
        with self._coalescer.admitted(job):  # which cancels it if the worker is still generating at the end
            await write(self._accepted(job))
            if isinstance(write, EventWriter):
                job.inbox.offer(_taking(answer, write))
            while not answer.done:
                for event in answer.events_for(await self._coalescer.take(job)):
                    await write(event)

    def _accepted(self, job: Job) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        accepted = response.accepted
        accepted.request_id = job.request_id
        accepted.model = job.model
        accepted.tier = self._tier
        accepted.prompt_tokens = len(job.prompt_ids)
        accepted.seed = job.sampling.seed
        return response


def _taking(answer: AnswerEvents, writer: EventWriter) -> Take:
    """Return a function that writes tokens as they arrive, past the task of the request."""

    def take(ids: list[int], scores: Sequence[Score]) -> bool:
        if not writer.ready or not answer.takes_now(ids):
            return False
        writer.write_now(answer.delta_for(ids, scores))
        return True

    return take

"""Represent one request inside the batcher: its parameters, its answer so far and its attempts at workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from opentelemetry import trace

from headrace import errors
from headrace.batcher.inbox import Inbox
from headrace.batcher.tools.form import FREE, AnswerForm
from headrace.deadline import Deadline, response_deadline
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire


@dataclass(slots=True, eq=False)
class Job:
    """A request that passed all checks.

    resume_ids      tokens of the answer that came with the request
    sampling        with seed and max_tokens set
    arrived         time.monotonic() at the batcher
    tenant          whom the request is accounted to; "" is the anonymous tenant
    cost            tokens that serving it is expected to take, prompt included
    uncached        tokens that the worker has to compute before the next new one, as far as is known
    blocks          names of the prompt's blocks, to find workers that have them cached
    scope           the scope in which its prefixes are shared, see `prefixes.scope_of`
    prompt_offset   the next token of the prompt whose log-probability a worker sends; 0 if none follows
    attempt         number of the current attempt, over all batchers; deltas of other attempts are ignored
    queued          time.monotonic() when it last entered the queue
    submitted       time.monotonic() when it was first sent to a worker
    span            the request's server span: the parent of the workers' spans
    generated       tokens of the answer from workers of this batcher; with `resume_ids` and the seed they are
                    all that another worker needs to resume
    model           the name of the model that answers
    timeout         ends the call at its deadline, or earlier if its reader stays behind
    unread_until    while its answer is paused: until when its reader may stay behind, time.monotonic()
    form            what its tokens may be, and how its text is split into parts
    each_step       whether workers send its tokens after each step
    release_place   releases the place that the request has held since it arrived, for one in the queue or for
                    none; None: it holds no place yet
    """

    request_id: str
    prompt_ids: list[int]
    resume_ids: list[int]
    sampling: pb.Sampling
    arrived: float
    deadline: Deadline
    priority: int
    attempt: int
    inbox: Inbox
    span: trace.Span
    tenant: str = ""
    cost: int = 1
    uncached: int = 1
    blocks: tuple[int, ...] = ()
    scope: bytes = b""
    prompt_offset: int = 0
    wants_route_changes: bool = False
    each_step: bool = False
    queue_span: trace.Span = field(default=trace.INVALID_SPAN)
    queued: float = 0.0
    submitted: float | None = None
    generated: list[int] = field(default_factory=list)
    model: str = ""
    timeout: asyncio.Timeout | None = None
    unread_until: float | None = None
    release_place: Callable[[], None] | None = None
    form: AnswerForm = FREE
    history: History = field(default_factory=lambda: History())  # defined below

    @property
    def response_deadline(self) -> Deadline:
        """When a response must be sent at the latest."""
        return response_deadline(self.deadline)

    def pause_until(self, moment: float | None) -> None:
        """Record until when the paused answer may stay unread; None: it is not paused any more."""
        self.unread_until = moment
        if self.timeout is not None and not self.timeout.expired():
            deadline = self.response_deadline.timeout_at
            given = [time for time in (deadline, moment) if time is not None]
            self.timeout.reschedule(min(given, default=None))

    def timeout_error(self) -> errors.HeadraceError:
        """Return the error for a call that `timeout` ended."""
        if self.unread_until is None or self.response_deadline.at <= self.unread_until:
            return self.deadline_error()
        return errors.SlowReader(
            f"{self.inbox.unread} tokens have waited too long to be read, and no more are kept: read faster, "
            "or continue with `resume` after the tokens received",
            unread=self.inbox.unread,
        )

    def fail(self, error: errors.HeadraceError) -> None:
        """End the job with *error*."""
        self.inbox.fail(error)

    def deadline_error(self) -> errors.DeadlineExceeded:
        """Return the error for a missed deadline."""
        if self.submitted is None:
            return errors.DeadlineInQueue(
                "the deadline passed before a worker was free; nothing was generated"
            )
        return errors.DeadlineInDecode("the deadline passed before the answer was complete")

    @property
    def usable_blocks(self) -> tuple[int, ...]:
        """The blocks that a worker need not compute if it has them cached."""
        return () if self.prompt_offset else self.blocks

    def request_prompt_details(self) -> None:
        """Have workers send the details of the prompt's tokens, if the request asks for them.

        Not of an answer that is resumed: they came before its first token.
        """
        if not self.sampling.HasField("prompt_logprobs"):
            return
        if self.resume_ids:
            self.sampling.ClearField("prompt_logprobs")
            return
        self.prompt_offset = 1  # token 0 has no log-probability
        if len(self.prompt_ids) == 1:
            self.add_prompt_part(wire.PromptLogprobs(offset=1))

    def add_prompt_part(self, part: wire.PromptLogprobs) -> None:
        """Add the next part of the prompt. After the last one, another worker need not repeat them."""
        self.inbox.put_event(part)
        self.prompt_offset = part.offset + len(part.logprobs)
        if self.prompt_offset == len(self.prompt_ids):
            self.prompt_offset = 0
            self.sampling.ClearField("prompt_logprobs")

    @property
    def started(self) -> bool:
        """Whether the job has been sent to a worker before."""
        return self.submitted is not None

    @property
    def answer_ids(self) -> list[int]:
        """The answer so far."""
        return [*self.resume_ids, *self.generated]

    @property
    def answer_length(self) -> int:
        """Tokens of the answer so far."""
        return len(self.resume_ids) + len(self.generated)

    @property
    def prefill_tokens(self) -> int:
        """Tokens of a prefill without a cache: prompt and replayed answer."""
        return len(self.prompt_ids) + self.answer_length

    @property
    def min_answer_tokens(self) -> int:
        """The fewest tokens that the answer can have."""
        sampling = self.sampling
        runs_to_limit = sampling.ignore_eos and not sampling.stop_token_ids and not sampling.stop
        return max(sampling.max_tokens if runs_to_limit else min(sampling.min_tokens, sampling.max_tokens), 1)


@dataclass(slots=True)
class History:
    """The attempts of a job at workers.

    worker, address, incarnation   the latest worker
    kind               what the latest worker runs; an answer stays with equal weights where possible
    reason             why the latest attempt ended, as an error reason; empty while it runs
    losses             attempts that ended with the loss of their worker
    killed             workers, by address and incarnation, that the job may have killed: lost one after the
                       other before they returned a token of it
    lost_at            when the latest attempt failed, on the monotonic clock
    faults             attempts that ended in an engine fault
    length_at_start    tokens of the answer when the latest attempt started
    cached             prompt tokens that the latest worker to compute the prompt had cached
    replayed           answer tokens that attempts had to compute again
    wasted             tokens from attempts that had been abandoned
    waste_cause        why tokens that arrive after the end of the answer are wasted, for metrics
    """

    worker: str = ""
    address: str = ""
    incarnation: int = 0
    kind: str = ""
    reason: str = ""
    losses: int = 0
    killed: list[tuple[str, int]] = field(default_factory=list)
    lost_at: float = 0.0
    faults: int = 0
    length_at_start: int = 0
    cached: int = 0
    replayed: int = 0
    wasted: int = 0
    waste_cause: str = "cancel"

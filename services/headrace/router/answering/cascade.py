"""Let a smaller tier answer first, judge its draft before anything is released, and escalate if need be.

The caller sees one answer: `accepted` names the tier whose text is released, and released text is never
replaced. Which tiers there are, and which drafts are judged at all, is the caller's of this module;
`draft_check` judges; `attempts` carries each answer through. Beside a draft a sample may be drawn, a second
answer of the same tier for the judge to compare it with; whatever becomes of that, the draft goes on.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field

from headrace import errors
from headrace.progress import route_change
from headrace.router.answering import replies
from headrace.router.optional import optional
from headrace.v1 import generation_pb2 as pb

REJECTED = "DRAFT_REJECTED"
# What may be the request's own doing: no other tier shall lose its workers to it, too.
_LOST = (errors.WorkerLost, errors.BatcherLost, errors.PoisonRequest)
SAMPLE_TEMPERATURE = 0.7  # as the samples had that the check's weights were fitted with
_SENTENCE_END = re.compile(r"[.!?:;]['\")\]]*(?:\s|$)|\n")


@dataclass
class Draft:
    """An answer that is held back.

    held       its events so far, to be released as they are
    prompt_tokens, tokens   taken in, and generated
    logprobs   one per token, if the engine tells them
    finish     how it ended; None while it goes on
    samples    other answers of the same tier to compare it with
    sampled_tokens   generated for them, whole or not
    """

    tier: str
    held: list[pb.GenerateResponse] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    logprobs: list[float] = field(default_factory=list)
    finish: pb.Finish | None = None
    samples: Sequence[str] = ()
    sampled_tokens: int = 0

    def take(self, response: pb.GenerateResponse) -> None:
        """Hold an event back."""
        self.held.append(response)
        event = response.WhichOneof("event")
        if event == "accepted":
            self.prompt_tokens = response.accepted.prompt_tokens
        elif event == "delta":
            self.text += response.delta.text
            self.tokens += response.delta.token_count
            self.logprobs.extend(response.delta.logprobs)
        elif event == "finish":
            self.finish = response.finish

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, found computed already; 0 while it is not known."""
        return min(self.finish.usage.cached_tokens, self.prompt_tokens) if self.finish is not None else 0

    @property
    def complete(self) -> bool:
        """Whether the model ended its turn by itself."""
        return self.finish is not None and self.finish.reason != pb.FINISH_REASON_LENGTH

    def to_judge(self) -> tuple[str, bool]:
        """The text to judge, and whether it is to be taken as finished.

        A draft that goes on is judged by its whole sentences: that it breaks off is not its fault.
        """
        if self.finish is not None:
            return self.text, self.complete
        ends = [found.end() for found in _SENTENCE_END.finditer(self.text)]
        return (self.text[: ends[-1]], True) if ends else (self.text, False)


@dataclass(frozen=True)
class Sampler:
    """How a sample is drawn beside a draft.

    begin     streams it
    seconds   the longest that a draft which is there waits for it
    drawn     told of what was generated of it, whole or not, used or not
    """

    begin: Callable[[], AsyncGenerator[pb.GenerateResponse, None]]
    seconds: float
    drawn: Callable[[Draft], None]


@dataclass(frozen=True)
class Judge:
    """How the drafts of one tier are judged.

    good      whether a draft may be released
    tokens    a draft that is longer is judged when it has so many, and streamed from there if it is good
    sampler   draws what a draft is compared with; None: nothing
    """

    good: Callable[[Draft], bool]
    tokens: int
    sampler: Sampler | None = None


async def cascade(
    begin: Callable[[Sequence[str]], AsyncGenerator[pb.GenerateResponse, None]],
    judge_of: Callable[[], Judge | None],
    gave_up: Callable[[Draft, str], None],
    *,
    tier_of: Callable[[], str],
    tells_moves: bool,
    rejected: Sequence[str] = (),
) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Stream the first answer that is good enough, or the last one.

    begin        streams an answer by a tier larger than those that were *rejected*
    judge_of     how the answer that was just begun is judged; None: not at all
    gave_up      told of each draft that nobody gets, and of the tier that answers in its place: empty if none
    tier_of      the tier that gives the answer that was just begun
    tells_moves  whether the caller wants `route_change` events

    A draft that fails is escalated, too, unless it was lost with workers or batchers: then it ends as it
    would have without a judge, or in favour of a smaller tier's draft. Where no larger tier takes the
    request, the draft is released after all: it is better than nothing. Raises what the last tier says.
    """
    async with aclosing(begin(rejected)) as responses:
        draft = Draft("")
        draft.take(await anext(responses))
        draft.tier = tier_of()
        judge = judge_of()
        failure: errors.HeadraceError | None = None
        if judge is not None:
            booked = released = False
            try:
                async with _sampling(judge.sampler, draft) as samples:
                    failure = await _read(draft, responses, judge.tokens)
                    if failure is None:
                        draft.samples = await samples()
                        released = judge.good(draft)
                if not (released or isinstance(failure, _LOST)):
                    better = cascade(
                        begin,
                        judge_of,
                        gave_up,
                        tier_of=tier_of,
                        tells_moves=tells_moves,
                        rejected=[*rejected, draft.tier],
                    )
                    async with aclosing(better) as escalated:
                        first = await _first(escalated)
                        if first is not None:
                            await responses.aclose()  # what it still says is not wanted any more
                            gave_up(draft, first.accepted.tier)
                            booked = True
                            yield first
                            if tells_moves:
                                reason = REJECTED if failure is None else failure.reason
                                yield route_change(draft.tier, tier_of(), reason, len(rejected) + 1)
                            async for response in escalated:
                                _waste(response, draft.tokens + draft.sampled_tokens)
                                yield response
                            return
                if failure is not None and (rejected or not isinstance(failure, _LOST)):
                    raise failure  # where a smaller tier's draft waits, that is released
                booked = True  # from here on it is the caller's
            finally:
                if not booked:
                    gave_up(draft, "")
        for response in draft.held:
            _waste(response, draft.sampled_tokens)
            yield response
        if failure is not None:
            raise failure
        async for response in responses:
            _waste(response, draft.sampled_tokens)
            yield response


def _waste(response: pb.GenerateResponse, tokens: int) -> None:
    """Add *tokens* that nobody gets to the usage of an answer, if *response* is its end."""
    if response.HasField("finish"):
        usage = response.finish.usage
        usage.wasted_tokens = replies.total([usage.wasted_tokens, tokens])


@asynccontextmanager
async def _sampling(
    sampler: Sampler | None, draft: Draft
) -> AsyncGenerator[Callable[[], Awaitable[Sequence[str]]], None]:
    """Draw a sample while the block lasts; yields what waits for its end, a while, and returns it."""
    if sampler is None:
        yield _no_samples
        return
    sample = Draft(draft.tier)
    drawing = asyncio.create_task(_draw(sampler, sample))

    async def samples() -> Sequence[str]:
        await asyncio.wait([drawing], timeout=sampler.seconds)
        # One that ends at the length of a draft counts, too: there is as much of both.
        return (sample.text,) if sample.finish is not None and sample.text else ()

    try:
        yield samples
    finally:
        try:
            drawing.cancel()
            await asyncio.wait([drawing])
        finally:
            draft.sampled_tokens = sample.tokens
            with optional("bill"):
                sampler.drawn(sample)


async def _draw(sampler: Sampler, sample: Draft) -> None:
    with optional("sample"), suppress(errors.HeadraceError):  # the draft is judged without it
        async with aclosing(sampler.begin()) as responses:
            async for response in responses:
                sample.take(response)


async def _no_samples() -> Sequence[str]:
    return ()


def sample_request(request: pb.GenerateRequest, tokens: int) -> pb.GenerateRequest:
    """Ask for a second answer to *request*: another seed, no longer than *tokens*, and nothing else with it.

    A greedy request would get the same answer again: its sample has a temperature.
    """
    made = pb.GenerateRequest()
    made.CopyFrom(request)
    made.request_id = f"{request.request_id[:120]}-sample"
    made.ClearField("stream")
    sampling = made.sampling
    sampling.ClearField("logprobs")
    sampling.seed = request.sampling.seed ^ 1
    if sampling.HasField("temperature") and sampling.temperature == 0:
        sampling.temperature = SAMPLE_TEMPERATURE
    sampling.max_tokens = min(sampling.max_tokens, tokens) if sampling.HasField("max_tokens") else tokens
    if sampling.min_tokens > sampling.max_tokens:
        sampling.min_tokens = sampling.max_tokens
    return made


async def _read(
    draft: Draft, responses: AsyncGenerator[pb.GenerateResponse, None], tokens: int
) -> errors.HeadraceError | None:
    """Fill the draft until it ends or has so many tokens; the failure that ended it, if one did."""
    try:
        async for response in responses:
            draft.take(response)
            if draft.tokens >= tokens and draft.finish is None:
                return None
    except (errors.DeadlineExceeded, errors.RequestCancelled):
        raise  # no other tier has more time
    except errors.HeadraceError as error:
        return error
    return None


async def _first(
    responses: AsyncGenerator[pb.GenerateResponse, None],
) -> pb.GenerateResponse | None:
    """The first event; None if there is no tier for it, or none takes the request."""
    try:
        return await anext(responses)
    except errors.Unattainable:
        return None  # it would not be in time; the draft is
    except (errors.DeadlineExceeded, errors.RequestCancelled):
        raise
    except errors.HeadraceError:
        return None

"""Hold back the answer of a smaller tier as a draft, check it, and escalate to a larger tier if necessary.

The caller receives one answer: `accepted` names the tier whose text is released, and released text is never
replaced. `Cascaded` decides which answers are held back and which drafts are released, and `attempts`
forwards the request. A sample is a second answer of the same tier, to compare a draft with. If it fails, the
draft is checked without it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from headrace import errors
from headrace.progress import route_change
from headrace.router.answering.attempts import Outgoing, Routed, across_tiers, clear_details, on_tier
from headrace.router.answering.used_tokens import UsedTokens
from headrace.router.optional import optional
from headrace.router.state.peer_reports import total
from headrace.router.state.tiers import Tier
from headrace.routing.drafts.forms import fault
from headrace.v1 import generation_pb2 as pb

REJECTED = "DRAFT_REJECTED"
# The request itself may be the cause, so it must not be given to another tier's workers.
_LOST = (errors.WorkerLost, errors.BatcherLost, errors.PoisonRequest)
SAMPLE_TEMPERATURE = 0.7  # the same as in the samples that the weights of the check were fitted with
_SENTENCE_END = re.compile(r"[.!?:;]['\")\]]*(?:\s|$)|\n")


@dataclass
class Draft:
    """An answer that is held back, or a sample.

    structured whether its text has the form that the request asks for
    held       its events so far
    reasoning  what the model thought before its text
    calls      of tools, by index: the parts of the arguments
    used       its tokens
    logprobs   one per token, if the engine reports them
    finish     its last event; None before it
    samples    other answers of the same tier to compare it with
    sample_tokens   generated for the samples
    is_sample  whether it is a sample itself
    """

    tier: str = ""
    structured: bool = False
    held: list[pb.GenerateResponse] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    used: UsedTokens = field(default_factory=UsedTokens)
    logprobs: list[float] = field(default_factory=list)
    finish: pb.Finish | None = None
    samples: Sequence[str] = ()
    sample_tokens: int = 0
    is_sample: bool = False

    def take(self, response: pb.GenerateResponse) -> None:
        """Hold an event back."""
        self.held.append(response)
        event = response.WhichOneof("event")
        if event == "accepted":
            self.tier = response.accepted.tier
            self.used.accept(response.accepted)
        elif event == "delta":
            delta = response.delta
            self.text += delta.text
            self.reasoning += delta.reasoning
            self.used.completion += delta.token_count
            self.logprobs.extend(delta.logprobs)
            for part in delta.tool_calls:
                self.calls.setdefault(part.index, []).append(part.arguments)
        elif event == "finish":
            self.finish = response.finish
            self.used.finish(response.finish.usage)

    @property
    def tokens(self) -> int:
        """Tokens that were generated."""
        return self.used.completion

    @property
    def has_form(self) -> bool:
        """Whether it is judged by its form, which shows at its end only."""
        return self.structured or bool(self.calls)

    @property
    def cached_tokens(self) -> int:
        """Cached tokens of its prompt; 0 while unknown."""
        return min(self.finish.usage.cached_tokens, self.used.prompt) if self.finish is not None else 0

    @property
    def complete(self) -> bool:
        """Whether the model ended its turn by itself."""
        return self.finish is not None and self.finish.reason != pb.FINISH_REASON_LENGTH

    def form_fault(self, *, is_json: bool) -> str:
        """Return why its form makes it useless; see `forms.fault`."""
        arguments = ["".join(parts) for parts in self.calls.values()]
        return fault(self.text, arguments, complete=self.complete, is_json=is_json)

    def text_to_check(self) -> tuple[str, bool]:
        """Return the text to check, and whether it counts as complete.

        A draft that is still being generated is checked by its complete sentences, or those of its thoughts.
        """
        if self.finish is not None:
            return self.text, self.complete
        text = self.text or self.reasoning
        ends = [found.end() for found in _SENTENCE_END.finditer(text)]
        return (text[: ends[-1]], True) if ends else (text, False)


@dataclass(frozen=True, slots=True)
class HoldBack:
    """How an answer is held back.

    tier             that answers
    max_tokens       a longer draft is checked when it has this many tokens, and streamed from there if it is
                     released; one that has a form is checked at its end
    sample_seconds   the longest that a draft waits for its sample; 0: no sample
    """

    tier: Tier
    max_tokens: int
    sample_seconds: float


class Cascaded(Routed, Protocol):
    """A request whose answer may be held back."""

    def hold_back(self) -> HoldBack | None:
        """Decide how the answer that has just begun is held back; None: it is streamed."""
        ...

    def releases(self, draft: Draft) -> bool:
        """Check a draft; return whether it is released."""
        ...

    def discard(self, draft: Draft, replaced_by: str = "") -> None:
        """Record a draft or sample that the caller does not get, and the tier that answers in its place."""
        ...


async def cascade(
    routed: Cascaded, rejected: Sequence[str] = ()
) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Stream the first answer that is good enough, or the last one.

    rejected   tiers whose drafts were rejected: a larger tier answers

    A draft that fails is escalated too, unless it was lost with workers or batchers. A lost draft ends as it
    would without a cascade, or the draft of a smaller tier is released. If no larger tier accepts the
    request, the draft is released although it was rejected. Raises the error of the last tier.
    """
    async with aclosing(across_tiers(routed, rejected)) as responses:
        draft = Draft(structured=is_structured(routed.outgoing.request))
        draft.take(await anext(responses))
        failure: errors.HeadraceError | None = None
        plan = routed.hold_back()
        if plan is not None:
            settled = False
            try:
                released, failure = await _check(routed, plan, draft, responses)
                if not (released or isinstance(failure, _LOST)):
                    async with aclosing(cascade(routed, [*rejected, draft.tier])) as escalated:
                        if (first := await _first(escalated)) is not None:
                            await responses.aclose()  # the rest of the draft is not needed
                            routed.discard(draft, first.accepted.tier)
                            settled = True
                            yield first
                            if routed.outgoing.request.stream.include_route_changes:
                                reason = REJECTED if failure is None else failure.reason
                                yield route_change(draft.tier, first.accepted.tier, reason, len(rejected) + 1)
                            async for response in escalated:
                                _add_waste(response, draft.tokens + draft.sample_tokens)
                                yield response
                            return
                if failure is not None and (rejected or not isinstance(failure, _LOST)):
                    raise failure  # if a smaller tier's draft exists, that one is released
                settled = True  # the caller gets the draft
            finally:
                if not settled:
                    routed.discard(draft)
        for response in draft.held:
            _add_waste(response, draft.sample_tokens)
            yield response
        if failure is not None:
            raise failure
        async for response in responses:
            _add_waste(response, draft.sample_tokens)
            yield response


async def _check(
    routed: Cascaded, plan: HoldBack, draft: Draft, responses: AsyncGenerator[pb.GenerateResponse, None]
) -> tuple[bool, errors.HeadraceError | None]:
    """Complete the draft and check it; return whether it is released, and the failure that ended it."""
    async with _sampling(routed, plan, draft) as samples:
        failure = await _complete(draft, responses, plan.max_tokens)
        if failure is not None:
            return False, failure
        draft.samples = await samples()
        return routed.releases(draft), None


def _add_waste(response: pb.GenerateResponse, tokens: int) -> None:
    """Add *tokens* that the caller does not get to the answer's usage, if *response* is its last event."""
    if response.HasField("finish"):
        usage = response.finish.usage
        usage.wasted_tokens = total([usage.wasted_tokens, tokens])


@asynccontextmanager
async def _sampling(
    routed: Cascaded, plan: HoldBack, draft: Draft
) -> AsyncGenerator[Callable[[], Awaitable[Sequence[str]]], None]:
    """Draw a sample while the block runs; yield a function that waits for it and returns the samples."""
    if not plan.sample_seconds:
        yield _no_samples
        return
    sample = Draft(draft.tier, is_sample=True)
    drawing = asyncio.create_task(_draw(routed, plan, sample))

    async def samples() -> Sequence[str]:
        await asyncio.wait([drawing], timeout=plan.sample_seconds)
        # A sample that was cut at the length of a draft counts too: both have the same length.
        return (sample.text,) if sample.finish is not None and sample.text else ()

    try:
        yield samples
    finally:
        try:
            drawing.cancel()
            await asyncio.wait([drawing])
        finally:
            draft.sample_tokens = sample.tokens
            routed.discard(sample)


async def _draw(routed: Cascaded, plan: HoldBack, sample: Draft) -> None:
    with optional("sample"), suppress(errors.HeadraceError):  # the draft is checked without it
        outgoing: Outgoing = replace(
            routed.outgoing,
            request=sample_request(routed.outgoing.request, plan.max_tokens),
            failover_seconds=0.0,
        )
        async with aclosing(on_tier(plan.tier, routed, outgoing)) as responses:
            async for response in responses:
                sample.take(response)


async def _no_samples() -> Sequence[str]:
    return ()


def is_structured(request: pb.GenerateRequest) -> bool:
    """Whether a request asks for a form of its answer."""
    return request.sampling.WhichOneof("structured") is not None


def sample_request(request: pb.GenerateRequest, max_tokens: int) -> pb.GenerateRequest:
    """Return a request for a second answer to *request*, with another seed and at most *max_tokens* tokens.

    A greedy request would get the same answer again, so its sample has a temperature.
    """
    made = pb.GenerateRequest()
    made.CopyFrom(request)
    made.request_id = f"{request.request_id[:120]}-sample"
    made.ClearField("stream")
    sampling = made.sampling
    clear_details(sampling)
    sampling.seed = request.sampling.seed ^ 1
    if sampling.HasField("temperature") and sampling.temperature == 0:
        sampling.temperature = SAMPLE_TEMPERATURE
    requested = sampling.max_tokens if sampling.HasField("max_tokens") else max_tokens
    sampling.max_tokens = min(requested, max_tokens)
    if sampling.min_tokens > sampling.max_tokens:
        sampling.min_tokens = sampling.max_tokens
    return made


async def _complete(
    draft: Draft, responses: AsyncGenerator[pb.GenerateResponse, None], max_tokens: int
) -> errors.HeadraceError | None:
    """Read the draft as far as `HoldBack` says; return the failure that ended it, if any."""
    try:
        async for response in responses:
            draft.take(response)
            if draft.tokens >= max_tokens and draft.finish is None and not draft.has_form:
                return None
    except (errors.DeadlineExceeded, errors.RequestCancelled):
        raise  # no other tier has more time
    except errors.HeadraceError as error:
        return error
    return None


async def _first(
    responses: AsyncGenerator[pb.GenerateResponse, None],
) -> pb.GenerateResponse | None:
    """Return the first event; None if there is no larger tier, or none accepts the request."""
    try:
        return await anext(responses)
    except (errors.TtftUnattainable, errors.DeadlineUnattainable):
        return None  # it would not be in time; the draft is
    except (errors.DeadlineExceeded, errors.RequestCancelled):
        raise
    except errors.HeadraceError:
        return None

"""Translate between the contract and the runner: submitted sequences, and how they ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from opentelemetry import trace

from headrace import attributes, errors, statuses
from headrace.deadline import Deadline
from headrace.grammars.problems import MAX_GRAMMAR
from headrace.propagation import from_w3c
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.validation import check_sampling
from headrace.worker.runner import (
    FinishReason,
    ModelInfo,
    PromptLogprobs,
    SamplingParams,
    SequenceSpec,
    SequenceUpdate,
    TopTokens,
)

# Identifies a sequence to the runner: the number of its stream, and its handle there.
SequenceKey = tuple[int, int]

_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}

MAX_PREFIX_SCOPE = 64  # bytes
# Bytes of a message with a part of a prompt: a batcher handles it in a few milliseconds.
PART_BYTES = 32 << 10
_TOP_BYTES = 8  # of a TopTokens besides its tokens
_DEFAULT_PRIORITY = 5
MAX_PRIORITY = 9
# A W3C traceparent has 55 characters; a tracestate of more than 512 need not be propagated.
_MAX_TRACE = 4096

_tracer = trace.get_tracer("headrace.worker")


@dataclass(slots=True, eq=False)
class InFlightSequence:
    """A sequence that was submitted on a stream and whose last delta is unsent.

    answered   number of answer tokens so far, resumed ones included
    priority   as the batcher sent it, at most MAX_PRIORITY
    each_step  whether its tokens are sent after each step
    unsent     tokens of its unsent delta; the first one's position in the answer is `offset`
    rare       fields of its unsent delta that few deltas have; None if it has none of them
    parts      unsent parts of its prompt, all of which are sent before, or with, its tokens
    reserved   bytes that are reserved for such parts, see `prompt_bytes`; 0 once all are sent
    """

    spec: SequenceSpec[SequenceKey]
    request_id: str
    attempt: int
    parent: trace.SpanContext
    batch: trace.SpanContext
    submitted_ns: int
    answered: int = 0
    priority: int = 5
    each_step: bool = False
    cancelled_by: errors.HeadraceError | None = None
    first_token_ns: int = 0
    offset: int = 0
    unsent: list[int] = field(default_factory=list)
    rare: wire.SequenceDelta | None = None
    parts: deque[wire.PromptLogprobs] = field(default_factory=deque)
    reserved: int = 0

    def rare_fields(self) -> wire.SequenceDelta:
        """Return `rare`, to set a field of it."""
        if self.rare is None:
            self.rare = wire.SequenceDelta()
        return self.rare


def sequence_spec(
    key: SequenceKey,
    message: wire.Sequence,
    model: ModelInfo,
    now: float,
    *,
    priority: float = _DEFAULT_PRIORITY,
) -> SequenceSpec[SequenceKey]:
    """Translate a submitted sequence for the runner.

    now        time.monotonic()
    priority   the effective one, see `relative_priority`

    Checks everything, including what the batcher should have checked: a wrong, outdated or hostile batcher
    must not harm the sequences of others. Raises EmptyInput, ContextTooLong, InvalidRequest and
    InvalidSampling.
    """
    ids = _checked_ids(message, model)
    _check_sampling(message, model)
    ttl = message.ttl.ToNanoseconds() / 1e9 if message.HasField("ttl") else None
    return SequenceSpec(
        key=key,
        ids=ids,
        prompt=len(message.prompt_ids),
        params=_params(message.sampling, message.grammar),
        deadline=Deadline.after(ttl, now),
        submitted=now,
        priority=priority,
        scope=message.prefix_scope,
    )


def _checked_ids(message: wire.Sequence, model: ModelInfo) -> list[int]:
    """Return the ids of prompt and resumed answer, checked."""
    prompt, resume = message.prompt_ids, message.resume_ids
    if not prompt:
        raise errors.EmptyInput("the sequence has no prompt ids")
    if len(prompt) + len(resume) >= model.context_length:
        raise errors.ContextTooLong(
            f"{len(prompt)} prompt and {len(resume)} resumed tokens leave no room in a context of "
            f"{model.context_length}"
        )
    ids = [*prompt, *resume]
    if max(ids) >= model.vocabulary_size:
        raise errors.InvalidRequest(f"a token id is not below {model.vocabulary_size}")
    if len(message.prefix_scope) > MAX_PREFIX_SCOPE:
        raise errors.InvalidRequest(
            f"prefix_scope has {len(message.prefix_scope)} bytes; at most {MAX_PREFIX_SCOPE} are allowed",
            field="prefix_scope",
        )
    return ids


def _check_sampling(message: wire.Sequence, model: ModelInfo) -> None:
    """Check the sampling parameters; lowers min_tokens to max_tokens."""
    sampling, resume = message.sampling, message.resume_ids
    if not sampling.HasField("max_tokens") or sampling.max_tokens <= len(resume):
        raise errors.InvalidSampling("sampling.max_tokens must be set and above the resumed tokens")
    # A batcher lowers max_tokens to its tier's limit, which may be below the caller's min_tokens.
    if sampling.min_tokens > sampling.max_tokens:
        sampling.min_tokens = sampling.max_tokens
    check_sampling(sampling)
    for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        if (highest := max(ids, default=0)) >= model.vocabulary_size:
            raise errors.InvalidSampling(
                f"sampling.{name} contains token {highest}; the model's ids are below "
                f"{model.vocabulary_size}",
                field=f"sampling.{name}",
            )
    for feature in ("top_logprobs", "prompt_logprobs"):
        if sampling.HasField(feature) and feature not in model.features:
            raise errors.InvalidSampling(
                f"the engine of {model.name} does not support sampling.{feature}",
                field=f"sampling.{feature}",
            )
    if message.grammar:
        _check_grammar(message.grammar, ignore_eos=sampling.ignore_eos, model=model)


def _check_grammar(grammar: str, *, ignore_eos: bool, model: ModelInfo) -> None:
    """Check all that can be known of a grammar before it is compiled."""
    problem = ""
    if len(grammar) > MAX_GRAMMAR or len(grammar.encode()) > MAX_GRAMMAR:
        problem = f"the grammar has more than {MAX_GRAMMAR} bytes"
    elif "structured" not in model.features:
        problem = f"the engine of {model.name} does not support sampling.structured"
    elif ignore_eos:
        problem = "sampling.structured cannot be combined with sampling.ignore_eos: leave one of them out"
    if problem:
        raise errors.InvalidSampling(problem, field="sampling.structured")


def relative_priority(priority: int, others: int, priorities: int) -> float:
    """Return a sequence's effective priority among those of all streams, 0 to 9.

    priority     as the batcher sent it; above 9 counts as 9
    others       number of the stream's in-flight sequences
    priorities   sum of their priorities, each at most 9

    Priorities order the sequences of one batcher. A stream must not gain on others by calling everything
    urgent: the amount by which its mean exceeds the default priority is subtracted.
    """
    given = min(priority, MAX_PRIORITY)
    excess = max((given + priorities) / (1 + others) - _DEFAULT_PRIORITY, 0.0)
    return max(given - excess, 0.0)


def conclude(
    delta: wire.SequenceDelta,
    update: SequenceUpdate[SequenceKey],
    sequence: InFlightSequence,
    ended_ns: int,
) -> None:
    """Fill in a sequence's last delta, and record its spans."""
    spec, times, finish = sequence.spec, update.times, update.finish
    assert finish is not None
    if finish is FinishReason.FAULT:
        delta.error.CopyFrom(statuses.to_status(errors.SequenceFault(update.fault)))
    elif finish is FinishReason.INVALID:
        invalid = errors.InvalidSampling(update.fault, field="sampling.structured")
        delta.error.CopyFrom(statuses.to_status(invalid))
    elif finish is FinishReason.CANCELLED and sequence.cancelled_by is not None:
        delta.error.CopyFrom(statuses.to_status(sequence.cancelled_by))
    else:
        delta.finish = _FINISH[finish]
    delta.usage.prompt_tokens = spec.prompt
    delta.usage.cached_tokens = min(update.cached, spec.prompt)
    delta.usage.completion_tokens = update.offset + len(update.token_ids)
    delta.usage.replayed_tokens = spec.resumed
    queue = (times.started if times.started is not None else time.monotonic()) - spec.submitted
    delta.timing.queue.FromNanoseconds(int(queue * 1e9))
    if times.started is not None and times.first_token is not None:
        delta.timing.prefill.FromNanoseconds(int((times.first_token - times.started) * 1e9))
    if times.first_token is not None and times.last_token is not None:
        delta.timing.decode.FromNanoseconds(int((times.last_token - times.first_token) * 1e9))
    if times.started is not None:
        _record_spans(sequence, update, sequence.submitted_ns + int(queue * 1e9), ended_ns)


def _record_spans(
    sequence: InFlightSequence, update: SequenceUpdate[SequenceKey], started_ns: int, ended_ns: int
) -> None:
    """Record the sequence's prefill, linked to the batch, and its decode: children of the request."""
    spec, parent = sequence.spec, sequence.parent
    if not parent.is_valid:
        return  # a trace of these spans alone would not be a request's
    context = trace.set_span_in_context(trace.NonRecordingSpan(parent))
    links = [trace.Link(sequence.batch)] if sequence.batch.is_valid else []
    prefill = _tracer.start_span(attributes.SPAN_PREFILL, context, links=links, start_time=started_ns)
    if not prefill.is_recording():
        return
    prefill.set_attribute(attributes.GEN_AI_INPUT_TOKENS, len(spec.ids))
    prefill.set_attribute(attributes.GEN_AI_CACHE_READ_TOKENS, update.cached)
    last = prefill
    if sequence.first_token_ns:
        prefill.end(sequence.first_token_ns)
        last = _tracer.start_span(attributes.SPAN_DECODE, context, start_time=sequence.first_token_ns)
        generated = update.offset + len(update.token_ids) - spec.resumed
        last.set_attribute(attributes.GEN_AI_OUTPUT_TOKENS, generated)
    last.set_attribute(attributes.OUTCOME, update.finish.value if update.finish else "")
    last.end(ended_ns)


def _params(sampling: pb.Sampling, grammar: str) -> SamplingParams:
    """Translate sampling; absent fields get the contract's defaults."""
    given = {
        name: getattr(sampling, name)
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "min_tokens",
            "ignore_eos",
            "logprobs",
            "top_logprobs",
            "prompt_logprobs",
        )
        if sampling.HasField(name)
    }
    if sampling.HasField("top_logprobs"):
        given["logprobs"] = True  # 0 of the most likely tokens are the token alone
    return SamplingParams(
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        logit_bias=dict(sampling.logit_bias),
        stop_ids=frozenset(sampling.stop_token_ids),
        grammar=grammar,
        **given,
    )


def prompt_bytes(spec: SequenceSpec[SequenceKey]) -> int:
    """Return about how many bytes the log-probabilities of a prompt take on the wire; 0 without."""
    most = spec.params.prompt_logprobs
    return 0 if most is None else spec.prompt * (4 + top_bytes(most))


def top_bytes(most: int) -> int:
    """Return about how many bytes the *most* likely tokens at one place take on the wire."""
    return _TOP_BYTES + 8 * most if most else 0


def wire_parts(part: PromptLogprobs) -> Iterator[wire.PromptLogprobs]:
    """Split a part of a prompt into messages of about PART_BYTES."""
    most = len(part.top[0].ids) if part.top else 0
    tokens = max(PART_BYTES // (4 + top_bytes(most)), 1)
    for begin in range(0, len(part.logprobs), tokens):
        own = part.logprobs[begin : begin + tokens]
        message = wire.PromptLogprobs(offset=part.offset + begin, logprobs=own)
        append_top(message.top.add, part.top[begin : begin + tokens])
        yield message


def append_top(add: Callable[[], wire.TopTokens], tops: Sequence[TopTokens]) -> None:
    """Write the most likely tokens at some places into messages that *add* makes."""
    for top in tops:
        message = add()
        message.ids.extend(top.ids)
        message.logprobs.extend(top.logprobs)


def span_context(carried: wire.TraceContext) -> trace.SpanContext:
    """Return the span that a message belongs to; an invalid one without a trace or with a malformed one."""
    parent, state = carried.traceparent, carried.tracestate
    if not parent or len(parent) + len(state) > _MAX_TRACE:
        return trace.INVALID_SPAN_CONTEXT
    return from_w3c(parent, state)

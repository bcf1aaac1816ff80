"""Between contract and engine: a submitted sequence in the engine's form, its end in the contract's."""

from __future__ import annotations

import time
from collections.abc import Collection

from opentelemetry import trace

from headrace import attributes, errors
from headrace.propagation import from_w3c
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.validation import check_sampling
from headrace.worker.engine.interface import ModelInfo, SamplingParams
from headrace.worker.engine.plan.scheduler import Ending, LiveSequence, Update
from headrace.worker.stream import Flight, Key

_FINISH = {
    Ending.STOP: pb.FINISH_REASON_STOP,
    Ending.LENGTH: pb.FINISH_REASON_LENGTH,
    Ending.CANCELLED: pb.FINISH_REASON_CANCELLED,
    Ending.DEADLINE: pb.FINISH_REASON_DEADLINE,
}

MAX_PREFIX_SCOPE = 64  # bytes
_USUAL_PRIORITY = 5
MAX_PRIORITY = 9
# The W3C's own form of a traceparent has 55 characters; a tracestate of more than 512 need not be passed on.
_MAX_TRACE = 4096

_tracer = trace.get_tracer("headrace.worker")


def live_sequence(
    key: Key, message: wire.Sequence, model: ModelInfo, now: float, *, priority: float = _USUAL_PRIORITY
) -> LiveSequence[Key]:
    """A submitted sequence as the engine takes it.

    now        time.monotonic()
    priority   as the worker counts it, see `relative_priority`

    Checks everything, whatever the batcher should have checked: one that is wrong, old or hostile must not
    harm the sequences of others. Raises EmptyInput, ContextTooLong, InvalidRequest and InvalidSampling.
    """
    prompt, resume, sampling = message.prompt_ids, message.resume_ids, message.sampling
    if not prompt:
        raise errors.EmptyInput("the sequence has no prompt ids")
    if len(prompt) + len(resume) >= model.context_length:
        raise errors.ContextTooLong(
            f"{len(prompt)} prompt and {len(resume)} resumed tokens leave no room in a context of "
            f"{model.context_length}"
        )
    if max(prompt) >= model.vocabulary_size or max(resume, default=0) >= model.vocabulary_size:
        raise errors.InvalidRequest(f"a token id is not below {model.vocabulary_size}")
    if not sampling.HasField("max_tokens") or sampling.max_tokens <= len(resume):
        raise errors.InvalidSampling("sampling.max_tokens must be set and above the resumed tokens")
    # A batcher lowers max_tokens to what its tier allows, below what a caller may have asked for at least.
    sampling.min_tokens = min(sampling.min_tokens, sampling.max_tokens)
    check_sampling(sampling)
    _check_vocabulary(sampling, model.vocabulary_size)
    if len(message.prefix_scope) > MAX_PREFIX_SCOPE:
        raise errors.InvalidRequest(
            f"prefix_scope has {len(message.prefix_scope)} bytes, at most {MAX_PREFIX_SCOPE} are taken",
            field="prefix_scope",
        )
    return LiveSequence(
        key=key,
        ids=[*prompt, *resume],
        prompt=len(prompt),
        params=_params(sampling),
        expires=now + message.ttl.ToNanoseconds() / 1e9 if message.HasField("ttl") else None,
        submitted=now,
        resumed=len(resume),
        priority=priority,
        scope=message.prefix_scope,
    )


def _check_vocabulary(sampling: pb.Sampling, vocabulary: int) -> None:
    """Raise InvalidSampling for ids that no token has."""
    for field, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        if (highest := max(ids, default=0)) >= vocabulary:
            raise errors.InvalidSampling(
                f"sampling.{field} names token {highest}, the model's ids are below {vocabulary}",
                field=f"sampling.{field}",
            )


def relative_priority(priority: int, others: Collection[int]) -> float:
    """A sequence's priority as it counts against those of other streams, 0 to 9.

    priority   as the batcher gave it; above 9 counts as 9
    others     the priorities of what its stream has here already, as the batcher gave them

    Priorities order what one batcher sends. A stream on which everything is urgent is no more urgent than
    others: as far as its mean is above the usual priority, it is taken off.
    """
    given = [min(one, MAX_PRIORITY) for one in (priority, *others)]
    excess = max(sum(given) / len(given) - _USUAL_PRIORITY, 0.0)
    return max(given[0] - excess, 0.0)


def conclude(delta: wire.SequenceDelta, update: Update[Key], flight: Flight, ended_ns: int) -> None:
    """Fill in a sequence's last delta, and tell its story as spans."""
    sequence, ending = update.sequence, update.ending
    assert ending is not None
    if ending is Ending.FAULT:
        delta.error.CopyFrom(errors.to_status(errors.SequenceFault(update.fault)))
    elif ending is Ending.CANCELLED and flight.cancelled_by is not None:
        delta.error.CopyFrom(errors.to_status(flight.cancelled_by))
    else:
        delta.finish = _FINISH[ending]
    delta.usage.prompt_tokens = sequence.prompt
    delta.usage.cached_tokens = min(sequence.cached, sequence.prompt)
    delta.usage.completion_tokens = sequence.answered
    delta.usage.replayed_tokens = sequence.resumed
    queue = (sequence.started if sequence.started is not None else time.monotonic()) - sequence.submitted
    delta.timing.queue.FromNanoseconds(int(queue * 1e9))
    if sequence.started is not None and sequence.first_token is not None:
        delta.timing.prefill.FromNanoseconds(int((sequence.first_token - sequence.started) * 1e9))
    if sequence.first_token is not None and sequence.last_token is not None:
        delta.timing.decode.FromNanoseconds(int((sequence.last_token - sequence.first_token) * 1e9))
    _tell(flight, sequence, ending, int(queue * 1e9), ended_ns)


def _tell(flight: Flight, sequence: LiveSequence[Key], ending: Ending, queue_ns: int, ended_ns: int) -> None:
    """The sequence's prefill and decode as spans: children of the request, linked to the batch."""
    context = trace.set_span_in_context(trace.NonRecordingSpan(flight.parent))
    links = [trace.Link(flight.batch)] if flight.batch.is_valid else []
    began = flight.submitted_ns + queue_ns
    if sequence.started is None:
        return
    prefill = _tracer.start_span(attributes.SPAN_PREFILL, context=context, links=links, start_time=began)
    prefill.set_attribute(attributes.GEN_AI_INPUT_TOKENS, sequence.prompt + sequence.resumed)
    prefill.set_attribute(attributes.GEN_AI_CACHE_READ_TOKENS, sequence.cached)
    if not flight.first_token_ns:
        prefill.add_event(attributes.EVENT_FINISH, {attributes.OUTCOME: ending.value}, timestamp=ended_ns)
        prefill.end(ended_ns)
        return
    prefill.add_event(attributes.EVENT_FIRST_TOKEN, timestamp=flight.first_token_ns)
    prefill.end(flight.first_token_ns)
    decode = _tracer.start_span(
        attributes.SPAN_DECODE, context=context, links=links, start_time=flight.first_token_ns
    )
    decode.set_attribute(attributes.GEN_AI_OUTPUT_TOKENS, sequence.answered - sequence.resumed)
    decode.add_event(attributes.EVENT_FINISH, {attributes.OUTCOME: ending.value}, timestamp=ended_ns)
    decode.end(ended_ns)


def _params(sampling: pb.Sampling) -> SamplingParams:
    """The engine's own form; what the contract calls the default where a field is absent."""
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
        )
        if sampling.HasField(name)
    }
    return SamplingParams(
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        logit_bias=dict(sampling.logit_bias),
        stop_ids=frozenset(sampling.stop_token_ids),
        **given,
    )


def span_context(carried: wire.TraceContext) -> trace.SpanContext:
    """The span that a message was sent for; invalid if it is not traced, or by something that is no trace."""
    if not carried.traceparent or len(carried.traceparent) + len(carried.tracestate) > _MAX_TRACE:
        return trace.INVALID_SPAN_CONTEXT
    return from_w3c(carried.traceparent, carried.tracestate)

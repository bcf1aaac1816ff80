"""Check a request as far as it can be judged from itself, at whichever hop sees it first.

Router and batcher both call `check_request`, so a caller hears the same words from either. What needs a
model (context length, vocabulary) or the tiers (pins, hints) is checked where they are known.
"""

from __future__ import annotations

import math

from headrace import errors
from headrace.v1 import generation_pb2 as pb

ROLES = ("system", "user", "assistant")
MAX_STOPS = 16
MAX_STOP_IDS = 64
MAX_STOP_CHARACTERS = 256
MAX_REQUEST_ID = 128
MAX_NAME = 256
MAX_FLUSH_TOKENS = 1024
MAX_FLUSH_SECONDS = 10.0
MAX_ATTEMPT = 1_000_000  # every loss adds one, and it must not outgrow its field

# Inclusive ranges of the optional fields of Sampling; an open end is marked by the smallest value above.
_ABOVE_ZERO = math.ulp(0.0)
_RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("temperature", 0, 10, "0 to 10"),
    ("top_p", _ABOVE_ZERO, 1, "above 0, at most 1"),
    ("min_p", 0, 1, "0 to 1"),
    ("repetition_penalty", _ABOVE_ZERO, 10, "above 0, at most 10"),
    ("presence_penalty", -2, 2, "-2 to 2"),
    ("frequency_penalty", -2, 2, "-2 to 2"),
    ("max_tokens", 1, 2**32, "at least 1"),
)


def check_request(request: pb.GenerateRequest) -> None:
    """Raise the InvalidRequest that says what to mend, if anything."""
    _check_input(request)
    check_sampling(request.sampling)
    if len(request.request_id) > MAX_REQUEST_ID:
        raise errors.InvalidRequest(
            f"request_id has {len(request.request_id)} characters, at most {MAX_REQUEST_ID} are taken",
            field="request_id",
        )
    routing = request.routing
    for name in ("session_id", "tenant"):
        if len(value := getattr(routing, name)) > MAX_NAME:
            raise errors.InvalidRequest(
                f"routing.{name} has {len(value)} characters, at most {MAX_NAME} are taken",
                field=f"routing.{name}",
            )
    if routing.HasField("priority") and routing.priority > 9:
        raise errors.InvalidRequest(
            f"routing.priority is {routing.priority}, must be 0 to 9", field="routing.priority"
        )
    if routing.HasField("quality_preference") and not 0 <= routing.quality_preference <= 1:
        raise errors.InvalidRequest(
            f"routing.quality_preference is {routing.quality_preference:g}, must be 0 to 1",
            field="routing.quality_preference",
        )
    if request.resume.attempt > MAX_ATTEMPT:
        raise errors.InvalidRequest(
            f"resume.attempt is {request.resume.attempt}, must be at most {MAX_ATTEMPT}: it counts the "
            "streams of this request",
            field="resume.attempt",
        )
    stream = request.stream
    if stream.HasField("flush_tokens") and not 1 <= stream.flush_tokens <= MAX_FLUSH_TOKENS:
        raise errors.InvalidRequest(
            f"stream.flush_tokens is {stream.flush_tokens}, must be 1 to {MAX_FLUSH_TOKENS}",
            field="stream.flush_tokens",
        )
    if stream.HasField("flush_interval"):
        seconds = stream.flush_interval.ToNanoseconds() / 1e9
        if not 0 <= seconds <= MAX_FLUSH_SECONDS:
            raise errors.InvalidRequest(
                f"stream.flush_interval is {seconds:g} s, must be 0 to {MAX_FLUSH_SECONDS:g} s",
                field="stream.flush_interval",
            )


def check_sampling(sampling: pb.Sampling) -> None:
    """Raise InvalidSampling for the first field out of its range."""
    for name, low, high, wanted in _RANGES:
        if sampling.HasField(name):  # type: ignore[arg-type]
            value = getattr(sampling, name)
            if not low <= value <= high:  # also refuses NaN
                raise _bad_sampling(name, f"is {value:g}, must be {wanted}")
    if sampling.HasField("max_tokens") and sampling.min_tokens > sampling.max_tokens:
        raise _bad_sampling(
            "min_tokens", f"is {sampling.min_tokens}, must be at most max_tokens ({sampling.max_tokens})"
        )
    if len(sampling.stop) > MAX_STOPS:
        raise _bad_sampling("stop", f"has {len(sampling.stop)} texts, at most {MAX_STOPS} are taken")
    for stop in sampling.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise _bad_sampling(
                "stop", f"holds a text of {len(stop)} characters, must be 1 to {MAX_STOP_CHARACTERS}"
            )
    if len(sampling.stop_token_ids) > MAX_STOP_IDS:
        raise _bad_sampling(
            "stop_token_ids", f"has {len(sampling.stop_token_ids)} ids, at most {MAX_STOP_IDS} are taken"
        )
    for token, bias in sampling.logit_bias.items():
        if not -100 <= bias <= 100:
            raise _bad_sampling("logit_bias", f"of token {token} is {bias:g}, must be -100 to 100")


def _check_input(request: pb.GenerateRequest) -> None:
    kind = request.WhichOneof("input")
    if kind is None:
        raise errors.EmptyInput("the request has no input: set chat or prompt", field="input")
    if kind == "prompt":
        if not request.prompt:
            raise errors.EmptyInput("prompt is empty: give it text to continue", field="prompt")
        return
    if not request.chat.messages:
        raise errors.EmptyInput("chat has no messages: give it at least one", field="chat.messages")
    for place, turn in enumerate(request.chat.messages):
        if turn.role not in ROLES:
            raise errors.InvalidRequest(
                f"chat.messages[{place}].role is {turn.role!r}, must be one of {', '.join(ROLES)}",
                field=f"chat.messages[{place}].role",
            )
        if turn.role != "assistant" and not turn.content.strip():
            raise errors.EmptyInput(
                f"chat.messages[{place}].content is empty: give it text",
                field=f"chat.messages[{place}].content",
            )
    _check_last_role(request.chat)


def _check_last_role(chat: pb.Chat) -> None:
    """Refuse a last message that would be answered where it is to be continued, or the other way round."""
    last = len(chat.messages) - 1
    role = chat.messages[last].role
    if role == "assistant" and not chat.continue_final_message:
        raise errors.InvalidRequest(
            f"chat.messages[{last}], the last one, is of role 'assistant': set chat.continue_final_message "
            "to have it continued, or end with a message of the user",
            field=f"chat.messages[{last}].role",
        )
    if role != "assistant" and chat.continue_final_message:
        raise errors.InvalidRequest(
            f"chat.continue_final_message is set, but the last message is of role {role!r}: only one of role "
            "'assistant' can be continued",
            field="chat.continue_final_message",
        )


def _bad_sampling(field: str, complaint: str) -> errors.InvalidSampling:
    return errors.InvalidSampling(f"sampling.{field} {complaint}", field=f"sampling.{field}")

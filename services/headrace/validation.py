"""Check the fields of a request that need neither a model nor the tiers.

Router and batcher both call `check_request`, so a caller receives the same message from either. What depends
on a model (context length, vocabulary) or on the tiers (pins, hints) is checked elsewhere. The checks run on
the event loop: the size of a field is checked before its content, and messages quote text by
`quoting.quoted`.
"""

from __future__ import annotations

import struct

from google.protobuf import duration_pb2

from headrace import errors
from headrace.checks.conversations import ToolChecks
from headrace.checks.structured import check_structured
from headrace.quoting import quoted
from headrace.template_arguments import check_arguments
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing_pb
from headrace.v1 import tokenizer_service_pb2 as tokenizer_pb

ROLES = ("system", "developer", "user", "assistant", "tool")
# A model may answer with no text, and a tool may return none.
_MAY_BE_EMPTY = ("assistant", "tool")
MAX_MESSAGES = 4096
MAX_BIASES = 300
MAX_STOPS = 16
MAX_STOP_IDS = 64
MAX_TOP_LOGPROBS = 20
MAX_STOP_CHARACTERS = 256
MAX_REQUEST_ID = 128
MAX_NAME = 256
MAX_FLUSH_TOKENS = 1024
MAX_FLUSH_SECONDS = 10.0
MAX_RESUME_TOKENS = 131_072  # no answer is longer; the batcher checks the context length of its tier
MAX_PROMPT_TOKENS = 1_048_576  # as token ids; the batcher checks the context length of its tier
# Of a call of the TokenizerService, in its request or its response; more take too much of the event loop.
MAX_TOKENIZER_IDS = 131_072
MAX_ATTEMPT = 1_000_000  # each lost stream adds one, and the value must fit its field

_MAX_NANOS = 999_999_999


def _float32(value: float) -> float:
    """Return *value* as a protobuf float stores it: 0.01 becomes slightly smaller."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


_SMALLEST = _float32(1e-45)  # above zero, for open intervals

# Inclusive ranges of the optional fields of Sampling. Logits below 1e30 stay finite in float32 when they are
# divided or multiplied by any of these values.
_RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("temperature", 0, 10, "0 to 10"),
    ("top_p", _SMALLEST, 1, "above 0, at most 1"),
    ("min_p", 0, 1, "0 to 1"),
    ("repetition_penalty", _float32(0.01), 10, "0.01 to 10"),
    ("presence_penalty", -2, 2, "-2 to 2"),
    ("frequency_penalty", -2, 2, "-2 to 2"),
    ("max_tokens", 1, 2**32, "at least 1"),
    ("top_logprobs", 0, MAX_TOP_LOGPROBS, f"0 to {MAX_TOP_LOGPROBS}"),
    ("prompt_logprobs", 0, MAX_TOP_LOGPROBS, f"0 to {MAX_TOP_LOGPROBS}"),
)
# The text fields of Routing, and the error for a value that is too long.
_NAMES: tuple[tuple[str, type[errors.InvalidRequest]], ...] = (
    ("tier", errors.UnknownTier),
    ("model", errors.UnknownModel),
    ("min_tier", errors.UnknownTier),
    ("max_tier", errors.UnknownTier),
    ("session_id", errors.InvalidRequest),
    ("tenant", errors.InvalidRequest),
)


def check_request(request: pb.GenerateRequest) -> dict[int, str]:
    """Raise InvalidRequest for the first invalid field, with its range.

    Returns the texts that were read, by the place of their message; a raw prompt has place 0. Each access to
    a text of protobuf decodes it, which takes up to 18 ms for 16 MiB, so a caller may use these.
    """
    texts = _check_input(request)
    if request.HasField("sampling"):
        check_sampling(request.sampling)
    _check_length("request_id", request.request_id, MAX_REQUEST_ID)
    if request.HasField("routing"):
        _check_routing(request.routing)
    if request.HasField("resume"):
        _check_resume(request.resume)
    if request.HasField("stream"):
        _check_stream(request.stream)
    return texts


def check_feedback(request: routing_pb.FeedbackRequest) -> None:
    """Raise InvalidRequest for the first invalid field."""
    _check_length("request_id", request.request_id, MAX_REQUEST_ID)
    _check_length("answer_id", request.answer_id, MAX_REQUEST_ID)
    _check_length("tier", request.tier, MAX_NAME, errors.UnknownTier)
    _check_length("tenant", request.tenant, MAX_NAME)
    if not (request.answer_id or request.request_id):
        raise errors.InvalidRequest(
            "the feedback names no answer: set answer_id, as in `accepted`", field="answer_id"
        )
    outcome = request.WhichOneof("outcome")
    if outcome is None:
        raise errors.InvalidRequest("the feedback has no outcome: set ok or quality", field="outcome")
    if outcome == "quality" and not 0 <= request.quality <= 1:  # also refuses NaN
        raise errors.InvalidRequest(f"quality is {request.quality:g}, must be 0 to 1", field="quality")


def check_tokenize(request: tokenizer_pb.TokenizeRequest | tokenizer_pb.CountTokensRequest) -> None:
    """Raise InvalidRequest for the first invalid field."""
    _check_choice(request.tokenizer)
    kind = request.WhichOneof("input")
    if kind is None:
        raise errors.EmptyInput("the request has no input: set chat or prompt", field="input")
    if kind == "prompt":
        _check_prompt(request.prompt)
        return
    without_answer = (
        isinstance(request, tokenizer_pb.TokenizeRequest)
        and request.HasField("add_generation_prompt")
        and not request.add_generation_prompt
    )
    _check_chat(request.chat, answered=not without_answer)


def check_detokenize(request: tokenizer_pb.DetokenizeRequest) -> None:
    """Raise InvalidRequest for the first invalid field."""
    _check_choice(request.tokenizer)
    _check_ids("token_ids", len(request.token_ids), MAX_TOKENIZER_IDS)


def check_get_tokenizer(request: tokenizer_pb.GetTokenizerRequest) -> None:
    """Raise InvalidRequest for the first invalid field."""
    _check_choice(request.tokenizer)


def check_sampling(sampling: pb.Sampling) -> None:
    """Raise InvalidSampling for the first field out of range."""
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
        raise _bad_sampling("stop", f"has {len(sampling.stop)} texts, must be at most {MAX_STOPS}")
    for stop in sampling.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise _bad_sampling(
                "stop", f"has a text of {len(stop)} characters, must be 1 to {MAX_STOP_CHARACTERS}"
            )
    if len(sampling.stop_token_ids) > MAX_STOP_IDS:
        raise _bad_sampling(
            "stop_token_ids", f"has {len(sampling.stop_token_ids)} ids, must be at most {MAX_STOP_IDS}"
        )
    biases = sampling.logit_bias
    if len(biases) > MAX_BIASES:
        raise _bad_sampling("logit_bias", f"has {len(biases)} token ids, must be at most {MAX_BIASES}")
    for token in biases:
        if not -100 <= (bias := biases[token]) <= 100:
            raise _bad_sampling("logit_bias", f"of token {token} is {bias:g}, must be -100 to 100")
    if sampling.WhichOneof("structured") is not None:
        check_structured(sampling)


def seconds_of(duration: duration_pb2.Duration, field: str) -> float:
    """Return the seconds of a Duration. Raises InvalidRequest if its two fields contradict each other.

    field   the name of the Duration for the error
    """
    seconds, nanos = duration.seconds, duration.nanos
    if abs(nanos) > _MAX_NANOS or seconds * nanos < 0:
        raise errors.InvalidRequest(
            f"{field} is not a valid duration: {seconds} seconds, {nanos} nanos; nanos must be 0 to "
            f"{_MAX_NANOS}, with the same sign as seconds",
            field=field,
        )
    return seconds + nanos / 1e9


def _check_input(request: pb.GenerateRequest) -> dict[int, str]:
    kind = request.WhichOneof("input")
    if kind is None:
        raise errors.EmptyInput("the request has no input: set chat, prompt or token_ids", field="input")
    if kind == "prompt":
        return {0: _check_prompt(request.prompt)}
    if kind == "token_ids":
        _check_ids("token_ids.ids", len(request.token_ids.ids), MAX_PROMPT_TOKENS)
        return {}
    return _check_chat(request.chat)


def _check_prompt(text: str) -> str:
    if not text:
        raise errors.EmptyInput("prompt is empty: set the text to continue", field="prompt")
    return text


def _check_ids(field: str, count: int, most: int) -> None:
    if not count:
        raise errors.EmptyInput(f"{field} is empty: set at least one token id", field=field)
    if count > most:
        raise errors.InvalidRequest(f"{field} has {count} ids, must be at most {most}", field=field)


def _check_choice(choice: tokenizer_pb.TokenizerChoice) -> None:
    _check_length("tokenizer.tier", choice.tier, MAX_NAME, errors.UnknownTier)
    _check_length("tokenizer.model", choice.model, MAX_NAME, errors.UnknownModel)


def _check_chat(chat: pb.Chat, *, answered: bool = True) -> dict[int, str]:
    """Check a conversation; return the texts that were read, by the place of their message.

    answered   whether it is to be continued by an answer
    """
    texts: dict[int, str] = {}
    messages = chat.messages
    if not messages:
        raise errors.EmptyInput("chat has no messages: add at least one", field="chat.messages")
    if len(messages) > MAX_MESSAGES:
        raise errors.InvalidRequest(
            f"chat has {len(messages)} messages, must be at most {MAX_MESSAGES}: join or remove the oldest",
            field="chat.messages",
        )
    tools = ToolChecks(chat)
    for place, turn in enumerate(messages):
        if (role := turn.role) not in ROLES:
            raise errors.InvalidRequest(
                f"chat.messages[{place}].role is {quoted(role)}, must be one of {', '.join(ROLES)}",
                field=f"chat.messages[{place}].role",
            )
        tools.message(place, turn, role)
        if role in _MAY_BE_EMPTY:
            continue
        texts[place] = content = turn.content
        if not content or content.isspace():
            raise errors.EmptyInput(
                f"chat.messages[{place}].content is empty: set its text",
                field=f"chat.messages[{place}].content",
            )
    tools.finish()
    if answered or chat.continue_final_message:
        _check_last_role(chat)
    if chat.HasField("template_arguments"):
        check_arguments(chat.template_arguments)
    return texts


def _check_last_role(chat: pb.Chat) -> None:
    """Check that the role of the last message fits `continue_final_message`."""
    last = len(chat.messages) - 1
    role = chat.messages[last].role
    if role == "assistant" and not chat.continue_final_message:
        raise errors.InvalidRequest(
            f"chat.messages[{last}], the last one, has role 'assistant': set chat.continue_final_message to "
            "continue it, or end with a message of the user or a tool",
            field=f"chat.messages[{last}].role",
        )
    if role != "assistant" and chat.continue_final_message:
        raise errors.InvalidRequest(
            f"chat.continue_final_message is set, but the last message has role {role!r}: it must be "
            "'assistant'",
            field="chat.continue_final_message",
        )
    if chat.continue_final_message and chat.messages[last].tool_calls:
        raise errors.InvalidRequest(
            "chat.continue_final_message is set, but the last message ends with calls of tools: leave them "
            "out, or send their results",
            field="chat.continue_final_message",
        )


def _check_routing(routing: pb.Routing) -> None:
    for name, error in _NAMES:
        if text := getattr(routing, name):
            _check_length(f"routing.{name}", text, MAX_NAME, error)
    if routing.HasField("priority") and routing.priority > 9:
        raise errors.InvalidRequest(
            f"routing.priority is {routing.priority}, must be 0 to 9", field="routing.priority"
        )
    if routing.HasField("quality_preference") and not 0 <= routing.quality_preference <= 1:
        raise errors.InvalidRequest(
            f"routing.quality_preference is {routing.quality_preference:g}, must be 0 to 1",
            field="routing.quality_preference",
        )


def _check_resume(resume: pb.Resume) -> None:
    if len(resume.token_ids) > MAX_RESUME_TOKENS:
        raise errors.InvalidRequest(
            f"resume.token_ids has {len(resume.token_ids)} ids, must be at most {MAX_RESUME_TOKENS}: resume "
            "with the tokens that this tier generated",
            field="resume.token_ids",
        )
    if resume.attempt > MAX_ATTEMPT:
        raise errors.InvalidRequest(
            f"resume.attempt is {resume.attempt}, must be at most {MAX_ATTEMPT}: it counts the "
            "streams of this request from 0",
            field="resume.attempt",
        )


def _check_stream(stream: pb.StreamOptions) -> None:
    if stream.HasField("flush_tokens") and not 1 <= stream.flush_tokens <= MAX_FLUSH_TOKENS:
        raise errors.InvalidRequest(
            f"stream.flush_tokens is {stream.flush_tokens}, must be 1 to {MAX_FLUSH_TOKENS}",
            field="stream.flush_tokens",
        )
    if stream.HasField("flush_interval"):
        seconds = seconds_of(stream.flush_interval, "stream.flush_interval")
        if not 0 <= seconds <= MAX_FLUSH_SECONDS:
            raise errors.InvalidRequest(
                f"stream.flush_interval is {seconds:g} s, must be 0 to {MAX_FLUSH_SECONDS:g} s",
                field="stream.flush_interval",
            )


def _check_length(
    field: str, text: str, most: int, error: type[errors.InvalidRequest] = errors.InvalidRequest
) -> None:
    if len(text) > most:
        raise error(f"{field} has {len(text)} characters, must be at most {most}", field=field)


def _bad_sampling(field: str, complaint: str) -> errors.InvalidSampling:
    return errors.InvalidSampling(f"sampling.{field} {complaint}", field=f"sampling.{field}")

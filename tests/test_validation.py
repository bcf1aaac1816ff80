"""Bounds of a request are checked before its fields are iterated, and messages quote little."""

from __future__ import annotations

import math

import pytest
from google.protobuf import duration_pb2
from hypothesis import given
from hypothesis import strategies as st

from headrace import errors, validation
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing
from headrace.validation import check_feedback, check_request, seconds_of

# No sampling field accepts a float32 outside of these.
EXTREMES = (0.0, -0.0, 1e-45, 1e-39, 1.2e-38, 1e-10, 3.4e38, -1e-45, -3.4e38, math.inf, -math.inf, math.nan)
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def asked(**sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="x", sampling=pb.Sampling(**sampling))  # type: ignore[arg-type]


def routed(name: str, value: str) -> pb.GenerateRequest:
    request = pb.GenerateRequest(prompt="x")
    setattr(request.routing, name, value)
    return request


def complaint(request: pb.GenerateRequest) -> errors.InvalidRequest | None:
    try:
        check_request(request)
    except errors.InvalidRequest as error:
        return error
    return None


def refused(request: pb.GenerateRequest) -> errors.InvalidRequest:
    with pytest.raises(errors.InvalidRequest) as caught:
        check_request(request)
    return caught.value


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.Message(role="user", content="a")] * 4097)),
            "chat.messages",
        ),
        (asked(logit_bias=dict.fromkeys(range(301), 1.0)), "sampling.logit_bias"),
        (asked(stop=["s" * 257]), "sampling.stop"),
        (asked(top_logprobs=21), "sampling.top_logprobs"),
        (asked(prompt_logprobs=21), "sampling.prompt_logprobs"),
        (
            pb.GenerateRequest(prompt="x", resume=pb.Resume(token_ids=[1] * 131_073)),
            "resume.token_ids",
        ),
        *(
            (routed(name, "n" * 257), f"routing.{name}")
            for name in ("tier", "model", "min_tier", "max_tier", "session_id", "tenant")
        ),
    ],
)
def test_a_field_that_is_too_long_is_named(request_: pb.GenerateRequest, field: str) -> None:
    assert refused(request_).field == field


def test_the_bounds_themselves_are_allowed() -> None:
    request = asked(logit_bias=dict.fromkeys(range(300), 1.0), stop=["s" * 256] * 16)
    request.chat.messages.extend([pb.Message(role="user", content="a")] * 4096)
    request.resume.token_ids.extend([1] * 131_072)
    for name in ("tier", "model", "min_tier", "max_tier", "session_id", "tenant"):
        setattr(request.routing, name, "n" * 256)

    check_request(request)


def test_only_an_assistants_turn_may_be_empty() -> None:
    turns = [pb.Message(role="user", content="a"), pb.Message(role="assistant"), pb.Message(role="user")]
    check_request(pb.GenerateRequest(chat=pb.Chat(messages=[*turns[:2], turns[0]])))

    assert refused(pb.GenerateRequest(chat=pb.Chat(messages=turns))).field == "chat.messages[2].content"


def test_the_texts_that_were_read_are_returned_by_place() -> None:
    messages = [
        pb.Message(role="user", content="a"),
        pb.Message(role="assistant", content="b"),
        pb.Message(role="user", content="c"),
    ]
    assert check_request(pb.GenerateRequest(chat=pb.Chat(messages=messages))) == {0: "a", 2: "c"}
    assert check_request(pb.GenerateRequest(prompt="d")) == {0: "d"}


class _Counted(list[int]):
    """A fake repeated field that counts how many of its items were read."""

    read = 0

    def __iter__(self):  # type: ignore[no-untyped-def]
        for item in super().__iter__():
            self.read += 1
            yield item

    def items(self):  # type: ignore[no-untyped-def]
        return ((item, 1.0) for item in self)


@pytest.mark.parametrize(
    ("check", "holder"),
    [
        (validation._check_input, ("chat", "messages")),
        (validation.check_sampling, ("logit_bias",)),
        (validation._check_resume, ("token_ids",)),
    ],
)
def test_a_long_field_is_not_iterated(check, holder) -> None:  # type: ignore[no-untyped-def]
    """A long list must not occupy the event loop."""
    long = _Counted(range(400_000))

    class Message:
        stop = stop_token_ids = ()
        min_tokens = 0

        def HasField(self, name: str) -> bool:
            return False

        def WhichOneof(self, name: str) -> str:
            return "chat"

    message: object = Message()
    inner = message
    for name in holder[:-1]:
        inner = Message()
        setattr(message, name, inner)
    setattr(inner, holder[-1], long)

    with pytest.raises(errors.InvalidRequest):
        check(message)
    assert long.read == 0


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", EXTREMES)
def test_a_number_must_be_finite_and_in_range(name: str, value: float) -> None:
    request = asked(**{name: value})
    number = getattr(request.sampling, name)
    if (error := complaint(request)) is not None:
        assert error.field == f"sampling.{name}"
        return
    assert math.isfinite(number)
    assert abs(number) <= 10
    assert name != "repetition_penalty" or number >= 0.009


@pytest.mark.parametrize(
    ("name", "bounds"), [("repetition_penalty", (0.01, 10)), ("temperature", (0, 10)), ("top_p", (1e-9, 1))]
)
def test_the_ends_of_a_range_belong_to_it(name: str, bounds: tuple[float, float]) -> None:
    """Also where float32 cannot represent the end and holds a little less."""
    for bound in bounds:
        check_request(asked(**{name: bound}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 100.1, -1e38])
def test_a_bias_out_of_range_is_rejected(value: float) -> None:
    assert refused(asked(logit_bias={3: value})).field == "sampling.logit_bias"


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.001, 1.001])
def test_a_preference_or_quality_outside_0_to_1_is_rejected(value: float) -> None:
    request = pb.GenerateRequest(prompt="x", routing=pb.Routing(quality_preference=value))
    assert refused(request).field == "routing.quality_preference"
    with pytest.raises(errors.InvalidRequest) as caught:
        check_feedback(routing.FeedbackRequest(request_id="r", quality=value))
    assert caught.value.field == "quality"


def test_integers_at_the_ends_of_their_ranges_are_accepted() -> None:
    check_request(asked(top_k=2**32 - 1, max_tokens=2**32 - 1, min_tokens=2**32 - 1, seed=2**64 - 1))
    check_request(asked(stop_token_ids=[2**32 - 1], logit_bias={2**32 - 1: 1.0}))  # the batcher checks it


@given(seconds=st.integers(-(2**63), 2**63 - 1), nanos=st.integers(-(2**31), 2**31 - 1))
def test_a_duration_is_within_its_bounds_or_refused(seconds: int, nanos: int) -> None:
    request = pb.GenerateRequest(prompt="x")
    request.stream.flush_interval.seconds, request.stream.flush_interval.nanos = seconds, nanos
    if (error := complaint(request)) is not None:
        assert error.field == "stream.flush_interval"
        assert not (0 <= seconds <= 9 and 0 <= nanos <= 999_999_999)
        return
    assert 0 <= seconds + nanos / 1e9 <= 10
    assert 0 <= nanos <= 999_999_999


def test_a_duration_of_mixed_signs_is_rejected() -> None:
    with pytest.raises(errors.InvalidRequest):
        seconds_of(duration_pb2.Duration(seconds=1, nanos=-1), "x")
    assert seconds_of(duration_pb2.Duration(seconds=-1, nanos=-500_000_000), "x") == -1.5


LONG = "😀\n" * 500_000


@pytest.mark.parametrize(
    "request_",
    [
        pb.GenerateRequest(prompt="x", request_id=LONG),
        pb.GenerateRequest(chat=pb.Chat(messages=[pb.Message(role=LONG, content="x")])),
        routed("tier", LONG),
        routed("model", LONG),
        routed("min_tier", LONG),
        routed("max_tier", LONG),
        routed("session_id", LONG),
        routed("tenant", LONG),
        asked(stop=[LONG]),
    ],
)
def test_a_message_quotes_little_of_a_long_text(request_: pb.GenerateRequest) -> None:
    message = refused(request_).message

    assert len(message) < 400
    assert "\n" not in message


def test_feedback_of_long_names_is_refused_by_its_field() -> None:
    for field in ("request_id", "answer_id", "tier"):
        request = routing.FeedbackRequest(ok=True)
        setattr(request, field, LONG)
        with pytest.raises(errors.InvalidRequest) as caught:
            check_feedback(request)
        assert caught.value.field == field
        assert len(caught.value.message) < 400
    with pytest.raises(errors.InvalidRequest):
        check_feedback(routing.FeedbackRequest(request_id="r"))
    with pytest.raises(errors.InvalidRequest, match="names no answer"):
        check_feedback(routing.FeedbackRequest(ok=True))
    check_feedback(routing.FeedbackRequest(request_id="r" * 128, tier="t", quality=0.5))

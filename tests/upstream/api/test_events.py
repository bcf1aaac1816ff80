"""The events of an upstream become deltas that obey the contract."""

from __future__ import annotations

from typing import Any

import pytest

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from tests.upstream.api.answering import chunk, read, reader, reasoning_of, text_of, usage

END = chunk(finish="stop")
LIKELY = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": "b", "logprob": -1.0}]}


def logprobs(*tokens: dict[str, Any]) -> dict[str, Any]:
    return {"choice": {"logprobs": {"content": list(tokens)}}}


def test_an_answer_of_openai() -> None:
    events = [
        chunk(role="assistant", content="", refusal=None),
        chunk(content="Hello"),
        chunk(content=" you"),
        END,
        {"choices": [], "usage": usage(9, 2, cached=4)},
    ]

    reading, deltas, finish = read(events)

    assert [(delta.offset, delta.token_count, delta.text) for delta in deltas] == [
        (0, 1, "Hello"),
        (1, 1, " you"),
    ]
    assert finish == pb.Finish(
        reason=pb.FINISH_REASON_STOP,
        usage=pb.Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=4),
    )
    assert reading.usage_known


def test_an_answer_begins_with_its_first_part() -> None:
    """Before that, another batcher or tier can still answer."""
    reading = reader()

    reading.read(chunk(role="assistant", content=""))
    reading.read({"choices": [], "prompt_filter_results": []})
    assert not reading.begun

    reading.read(chunk(content="Hello"))
    assert reading.begun
    assert not reading.finished


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_an_empty_answer_begins_with_its_end(finish: str) -> None:
    reading = reader()

    assert reading.read(chunk(finish=finish)) == []

    assert reading.begun
    assert reading.finished


def test_without_usage_the_parts_are_counted() -> None:
    reading, _, finish = read([chunk(content="a"), chunk(reasoning="b"), chunk(content=""), END])

    assert finish.usage == pb.Usage(completion_tokens=2)
    assert not reading.usage_known


def test_a_final_usage_with_more_tokens_than_parts_adds_no_deltas() -> None:
    reading, deltas, finish = read([chunk(content="abc"), END, {"choices": [], "usage": usage(1, 50)}])

    assert (len(deltas), reading.tokens) == (1, 1)
    assert finish.usage.completion_tokens == 50


def test_continuous_usage_counts_the_tokens_of_each_event() -> None:
    events = [
        {**chunk(role="assistant", content=""), "usage": usage(5, 0)},
        {**chunk(content="a"), "usage": usage(5, 1)},
        {**chunk(content="bcd"), "usage": usage(5, 4)},
        {**chunk(), "usage": usage(5, 6)},  # tokens of an incomplete character
        {**chunk(content="e"), "usage": usage(5, 7)},
        {**END, "usage": usage(5, 8)},
    ]

    _, deltas, finish = read(events, "vllm")

    assert [delta.token_count for delta in deltas] == [1, 3, 3]
    assert finish.usage.completion_tokens == 8


def test_counts_stay_within_the_limit_of_the_request() -> None:
    _, deltas, _ = read([*[chunk(content="a")] * 5, chunk(finish="length")], sampling={"max_tokens": 3})

    assert [delta.token_count for delta in deltas] == [1, 1, 1, 0, 0]
    assert text_of(deltas) == "aaaaa"


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        [],
        {"prompt_tokens": 1},
        usage(-1, 2),
        usage(2**40, 2),
        {"prompt_tokens": 1.5, "completion_tokens": 2},
        {"prompt_tokens": True, "completion_tokens": 2},
    ],
)
def test_implausible_usage_counts_as_none(value: object) -> None:
    reading, _, finish = read([{**chunk(content="a"), "usage": value}, END])

    assert not reading.usage_known
    assert finish.usage == pb.Usage(completion_tokens=1)


def test_more_cached_tokens_than_a_prompt_has_are_cut() -> None:
    _, _, finish = read([END, {"choices": [], "usage": usage(3, 1, cached=9)}])

    assert finish.usage.cached_tokens == 3


@pytest.mark.parametrize(
    ("finish", "choice", "stop", "reason", "text"),
    [
        ("stop", {}, ["x"], pb.FINISH_REASON_STOP, ""),
        ("stop", {"stop_reason": "x"}, ["x", "y"], pb.FINISH_REASON_STOP_SEQUENCE, "x"),
        ("stop", {"stop_reason": None}, ["x"], pb.FINISH_REASON_STOP, ""),
        ("stop", {"stop_reason": 151645}, ["x"], pb.FINISH_REASON_STOP, ""),
        ("stop", {"stop_reason": "z"}, ["x"], pb.FINISH_REASON_STOP, ""),  # a stop text of the operator
        ("stop", {"stop_reason": "x"}, [], pb.FINISH_REASON_STOP, ""),
        ("stop", {"matched_stop": "x"}, ["x"], pb.FINISH_REASON_STOP_SEQUENCE, "x"),
        ("stop", {"matched_stop": 2}, ["x"], pb.FINISH_REASON_STOP, ""),
        ("stop_sequence", {}, ["x"], pb.FINISH_REASON_STOP_SEQUENCE, "x"),
        ("stop_sequence", {}, ["x", "y"], pb.FINISH_REASON_STOP, ""),
        ("length", {"stop_reason": "x"}, ["x"], pb.FINISH_REASON_LENGTH, ""),
        ("max_tokens", {}, [], pb.FINISH_REASON_LENGTH, ""),
        ("tool_calls", {}, [], pb.FINISH_REASON_STOP, ""),
        ("function_call", {}, [], pb.FINISH_REASON_STOP, ""),
        ("eos_token", {}, [], pb.FINISH_REASON_STOP, ""),
    ],
)
def test_the_reason_of_the_end(
    finish: str, choice: dict[str, Any], stop: list[str], reason: int, text: str
) -> None:
    _, _, end = read([chunk(content="a"), chunk(finish=finish, choice=choice)], sampling={"stop": stop})

    assert (end.reason, end.stop_sequence) == (reason, text)


def test_a_filter_that_withholds_an_answer_rejects_the_request() -> None:
    with pytest.raises(errors.InvalidRequest, match="filter") as raised:
        reader().read(chunk(finish="content_filter"))

    assert errors.FEATURE not in raised.value.fields


def test_a_filter_that_cuts_an_answer_off_loses_it() -> None:
    """The contract has no end for it: what was delivered would look complete."""
    reading = reader()
    reading.read(chunk(content="a"))

    with pytest.raises(errors.UpstreamLost, match="filter"):
        reading.read(chunk(finish="content_filter"))


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning_content": "Hm."},
        {"reasoning": "Hm."},
        {"reasoning": "Hm.", "reasoning_content": "Hm."},
        {"reasoning": None, "reasoning_content": "Hm."},
        {"content": [{"type": "thinking", "thinking": "Hm."}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]},
    ],
)
def test_thoughts_are_kept_apart(delta: dict[str, Any]) -> None:
    _, deltas, _ = read([chunk(**delta), chunk(content="Hi"), END])

    assert (reasoning_of(deltas), text_of(deltas)) == ("Hm.", "Hi")


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "Hi"},
        {"content": None, "refusal": "Hi"},
        {"content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
        {"content": [{"type": "refusal", "refusal": "Hi"}]},
    ],
)
def test_all_forms_of_text(delta: dict[str, Any]) -> None:
    _, deltas, _ = read([chunk(**delta), END])

    assert text_of(deltas) == "Hi"


def test_halves_of_surrogate_pairs_become_valid_text() -> None:
    _, deltas, _ = read(
        [chunk(content="\ud83d\ude00"), chunk(content="\ud83d"), chunk(content="\ude00"), END]
    )

    assert text_of(deltas) == "\U0001f600\ufffd\ufffd"


def test_logprobs_of_a_conversation() -> None:
    events = [chunk(content="a", **logprobs(LIKELY)), chunk(content="aa", **logprobs(LIKELY, LIKELY)), END]

    _, deltas, _ = read(events, sampling={"logprobs": True, "top_logprobs": 1})

    assert [delta.token_count for delta in deltas] == [1, 2]
    assert list(deltas[0].logprobs) == [-0.5]
    assert deltas[1].tokens[1] == pb.TokenLogprobs(
        token=pb.TokenLogprob(logprob=-0.5, text=b"a"), top=[pb.TokenLogprob(logprob=-1.0, text=b"b")]
    )


def test_logprobs_of_a_raw_prompt() -> None:
    found = {
        "tokens": ["a", "bytes:\\xf0\\x9f"],
        "token_logprobs": [-0.25, -1],
        "top_logprobs": [{"b": -2.0, "a": -0.25, "c": -3.0}, None],
        "text_offset": [0, 1],
    }
    event = {"choices": [{"index": 0, "text": "a", "logprobs": found, "finish_reason": None}]}

    _, (delta,), _ = read([event, END], prompt="Hi", sampling={"top_logprobs": 2})

    assert [token.token.text for token in delta.tokens] == [b"a", b"\xf0\x9f"]
    assert [(other.text, other.logprob) for other in delta.tokens[0].top] == [(b"a", -0.25), (b"b", -2.0)]


def test_tokens_without_text_yet_are_delivered() -> None:
    """A character may have several tokens."""
    events = [chunk(content="", **logprobs(LIKELY)), chunk(content="ä", **logprobs(LIKELY)), END]

    _, deltas, _ = read(events, sampling={"logprobs": True})

    assert [(delta.text, delta.token_count) for delta in deltas] == [("", 1), ("ä", 1)]


@pytest.mark.parametrize("value", [-9999.0, -1e300, -(10**400), float("-inf")])
def test_the_lowest_logprob_is_finite(value: float) -> None:
    event = chunk(content="a", **logprobs({**LIKELY, "logprob": value}))

    _, (delta,), _ = read([event, END], sampling={"logprobs": True})

    assert list(delta.logprobs) == [-9999.0]


def test_logprobs_that_were_not_requested_only_count() -> None:
    _, (delta,), _ = read([chunk(content="aa", **logprobs(LIKELY, LIKELY)), END])

    assert (delta.token_count, len(delta.logprobs), len(delta.tokens)) == (2, 0, 0)


@pytest.mark.parametrize("sampling", [{"logprobs": True}, {"top_logprobs": 2}])
def test_an_upstream_that_ignores_logprobs_is_left_to_another_tier(sampling: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidSampling) as raised:
        reader(sampling=sampling).read(chunk(content="a"))

    assert errors.FEATURE in raised.value.fields


@pytest.mark.parametrize(("sampling", "complete"), [({"logprobs": True}, True), ({"top_logprobs": 2}, False)])
def test_logprobs_that_are_missing_after_thoughts(sampling: dict[str, Any], complete: bool) -> None:
    """Routers ask for log-probabilities to judge drafts, which must not lose the answer of a caller."""
    reading = reader(sampling=sampling)
    reading.read(chunk(reasoning="Hm."))

    if complete:
        (delta,) = reading.read(chunk(content="a"))
        assert (delta.text, delta.token_count, list(delta.logprobs)) == ("a", 1, [])
        return
    with pytest.raises(errors.UpstreamLost, match="log-probabilities"):
        reading.read(chunk(content="a"))


def test_text_that_was_held_back_may_come_without_logprobs() -> None:
    events = [chunk(content="a", **logprobs(LIKELY)), chunk(content="b"), END]

    _, deltas, _ = read(events, sampling={"logprobs": True})

    assert [delta.token_count for delta in deltas] == [1, 0]


def test_a_whole_response_is_one_event() -> None:
    body = {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "reasoning_content": "Hm."},
                "finish_reason": "stop",
            }
        ],
        "usage": usage(3, 7),
    }

    reading, (delta,), finish = read([body])

    assert (delta.text, delta.reasoning, delta.token_count) == ("Hello", "Hm.", 7)
    assert finish.usage.completion_tokens == 7
    assert reading.begun


def test_a_large_response_becomes_several_deltas() -> None:
    text, count = "ä" * 200_000, 3000
    choice = {
        "message": {"content": text},
        "finish_reason": "length",
        "logprobs": {"content": [LIKELY] * count},
    }

    _, deltas, _ = read(
        [{"choices": [choice]}], sampling={"top_logprobs": 1, "max_tokens": 100_000}, most=100_000
    )

    assert text_of(deltas) == text
    assert sum(delta.token_count for delta in deltas) == count
    assert max(delta.ByteSize() for delta in deltas) < 256 * 1024


REJECTED: list[Any] = [
    None,
    [],
    "text",
    3,
    {"choices": {}},
    {"choices": [3]},
    {"choices": [{"index": 1, "delta": {"content": "a"}}]},
    {"choices": [{"delta": "a"}]},
    {"choices": [{"message": []}]},
    {"choices": [{"text": 3}]},
    chunk(content=3),
    chunk(content={"type": "text"}),
    chunk(content=["a"]),
    chunk(content=[{"type": "image_url"}]),
    chunk(content=[{"type": "text", "text": 3}]),
    chunk(reasoning={}),
    chunk(refusal=[]),
    chunk(tool_calls={}),
    chunk(tool_calls=["x"]),
    chunk(content="a", choice={"logprobs": 3}),
    chunk(content="a", choice={"logprobs": {"content": [3]}}),
    chunk(content="a", **logprobs({"token": "a"})),
    chunk(content="a", **logprobs({"token": "a", "logprob": "x"})),
    chunk(content="a", **logprobs({"token": "a", "logprob": True})),
    chunk(content="a", **logprobs({"token": "a", "logprob": 0.5})),
    chunk(content="a", **logprobs({"token": "a", "logprob": 10**400})),
    chunk(content="a", **logprobs({"token": "a", "logprob": float("nan")})),
    chunk(content="a", **logprobs({**LIKELY, "bytes": [300]})),
    chunk(content="a", **logprobs({**LIKELY, "bytes": ["a"]})),
    chunk(content="a", **logprobs(*[LIKELY] * 101)),
    chunk(content="a", choice={"logprobs": {"tokens": ["a"], "token_logprobs": []}}),
    chunk(finish="abort"),
    chunk(finish="nonesuch"),
    chunk(finish=3),
    chunk(finish=["stop"]),
]


@pytest.mark.parametrize("event", REJECTED)
def test_an_invalid_event_before_the_answer_is_left_to_another_server(event: object) -> None:
    with pytest.raises(errors.NoWorkers) as raised:
        reader(sampling={"logprobs": True, "top_logprobs": 1}).read(event)

    assert raised.value.retry_after == 0.0


@pytest.mark.parametrize("event", REJECTED)
def test_an_invalid_event_within_the_answer_loses_it(event: object) -> None:
    reading = reader(sampling={"logprobs": True, "top_logprobs": 1})
    reading.read(chunk(content="a", **logprobs(LIKELY)))

    with pytest.raises(errors.UpstreamLost, match="incomplete"):
        reading.read(event)


def test_more_of_an_answer_after_its_end_is_invalid() -> None:
    reading = reader()
    reading.read(END)

    assert reading.read(chunk(content="")) == []
    assert reading.read(END) == []
    with pytest.raises(errors.UpstreamLost, match="after its end"):
        reading.read(chunk(content="a"))


def test_an_answer_without_an_end_is_lost() -> None:
    reading = reader()
    reading.read(chunk(content="a"))

    with pytest.raises(errors.UpstreamLost):
        reading.finish()


def test_a_stream_without_an_answer_is_left_to_another_server() -> None:
    reading = reader()
    reading.read(chunk(role="assistant", content=""))
    reading.read({"detail": "Not Found", "choices": None})

    with pytest.raises(errors.NoWorkers):
        reading.finish()


def test_an_error_before_the_answer_is_that_of_the_request() -> None:
    with pytest.raises(errors.ContextTooLong):
        reader().read({"error": {"message": "maximum context length", "code": 400}})


@pytest.mark.parametrize(
    "event",
    [{"error": {"message": "sk-0123456789 broke"}}, {"object": "error", "message": "sk-0123456789 broke"}],
)
def test_an_error_within_the_answer_loses_it(event: dict[str, Any]) -> None:
    reading = reader(key="sk-0123456789")
    reading.read(chunk(content="a"))

    with pytest.raises(errors.UpstreamLost, match="an error 500; the answer is incomplete") as raised:
        reading.read(event)

    assert "broke" not in raised.value.message, "it may quote the prompt, and is logged"


def test_an_endless_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.upstream.api.events.MAX_CHARACTERS", 100)
    reading = reader()
    reading.read(chunk(content="a" * 100))

    with pytest.raises(errors.UpstreamLost, match="more than 100 characters"):
        reading.read(chunk(reasoning="a"))

"""Events are read as they come: split anywhere, with comments, by any server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cli.bench.backends.events import MAX_EVENT_BYTES, EventReader, text_in
from headrace.cli.bench.records import EMPTY, ENDED_EARLY, ERROR_EVENT, MALFORMED, Failed, Record
from tests.cli.bench.servers import DONE, chunk, event, usage

ROLE = event(
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
)


def read(*pieces: bytes, keep: bool = False) -> Record:
    """Read pieces that arrive at 1, 2, 3, ..."""
    record = Record(parts=[] if keep else None)
    reader = EventReader(record)
    for place, piece in enumerate(pieces, start=1):
        reader.feed(piece, float(place))
    reader.end()
    return record


def test_tokens_are_the_events_with_text() -> None:
    record = read(ROLE, chunk("a"), chunk("b"), chunk(finish="stop"), usage(12, 5), DONE)

    assert list(record.times) == [2.0, 3.0], "the role is no token"
    assert (record.input_tokens, record.output_tokens, record.finish) == (12, 5, "stop")
    assert record.complete
    assert record.model == "m"


@given(cuts=st.lists(st.integers(0, 400), max_size=12), lines=st.sampled_from([b"\n", b"\r\n"]))
def test_events_may_be_split_anywhere(cuts: list[int], lines: bytes) -> None:
    texts = ["a", 'say "content":"x"', "\n\ndata: no", "é\\", '"usage": {']
    whole = ROLE + b": ping\n\n" + b"".join(chunk(text) for text in texts) + chunk(finish="length")
    whole = (whole + usage(3, 4) + DONE).replace(b"\n", lines)
    ends = sorted({min(cut, len(whole)) for cut in cuts} | {len(whole)})

    record = read(*(whole[begin:end] for begin, end in zip([0, *ends], ends, strict=False)), keep=True)

    assert len(record.times) == len(texts)
    assert "".join(map(text_in, record.parts or ())) == "".join(texts)
    assert (record.finish, record.output_tokens) == ("length", 4)


def test_without_usage_each_event_with_text_is_a_token() -> None:
    record = read(chunk("a") + chunk("b"), chunk("c", finish="stop"), DONE)

    assert record.output_tokens is None
    assert record.tokens == 3
    assert record.finish == "stop", "a reason may come with the last text"


def test_usage_may_be_null_or_come_with_each_event() -> None:
    null = read(chunk("a", usage=None), chunk(finish="stop", usage=None), DONE)
    each = read(
        chunk("a", usage={"prompt_tokens": 3, "completion_tokens": 1}),
        chunk("b", finish="stop", usage={"prompt_tokens": 3, "completion_tokens": 2}),
        DONE,
    )

    assert (null.output_tokens, null.input_tokens) == (None, None)
    assert (each.output_tokens, each.input_tokens, len(each.times)) == (2, 3, 2)


@pytest.mark.parametrize(
    "counts",
    [{"prompt_tokens": -1, "completion_tokens": "3"}, {"prompt_tokens": True}, {"prompt_tokens": 1.5}, {}],
)
def test_nonsense_in_usage_is_not_a_count(counts: dict[str, object]) -> None:
    record = read(chunk("a"), event({"choices": [], "usage": {"prompt_tokens_details": 3, **counts}}), DONE)

    assert (record.input_tokens, record.output_tokens, record.cached_tokens) == (None, None, None)


def test_a_headrace_gateway_reports_tier_cost_and_cached_tokens() -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 7}}
    last = usage(12, 1, details=details, headrace={"tier": "small", "score": 0.2, "cost": 0.5})

    record = read(chunk("a"), chunk(finish="stop"), last, DONE)

    assert (record.tier, record.cost, record.cached_tokens) == ("small", 0.5, 7)


@pytest.mark.parametrize("wrong", [10**400, float("inf"), float("nan"), -1, True, "7"])
def test_numbers_that_cannot_be_right_are_unknown(wrong: object) -> None:
    details = {"prompt_tokens_details": {"cached_tokens": wrong}}
    last = event({"usage": {"prompt_tokens": wrong, "completion_tokens": wrong, **details}} | ours(wrong))

    record = read(chunk("a"), chunk(finish="stop"), last, DONE)

    assert (record.input_tokens, record.output_tokens, record.cached_tokens) == (None, None, None)
    assert (record.tier, record.cost) == ("small", None)


def ours(cost: object) -> dict[str, object]:
    return {"headrace": {"tier": "small", "cost": cost}}


def test_completions_and_reasoning_are_text_as_well() -> None:
    record = read(
        event({"choices": [{"text": "a", "finish_reason": None}]}),
        event({"choices": [{"delta": {"reasoning_content": "b"}}]}),
        event({"choices": [{"text": "", "finish_reason": "stop"}]}),
        DONE,
        keep=True,
    )

    assert list(record.times) == [1.0, 2.0]
    assert "".join(map(text_in, record.parts or ())) == "ab"


def test_an_event_may_have_other_fields_and_lines() -> None:
    record = read(
        b"event: delta\nid: 7\n" + chunk("a"),
        b'data: {"choices": [{"index": 0,\ndata:  "delta": {"content": "b"}}]}\n\n',
        b": comment\n\n",
        b"retry: 3\n\n",
        chunk(finish="stop"),
        keep=True,
    )

    assert len(record.times) == 2
    assert "".join(map(text_in, record.parts or ())) == "ab"


def test_the_last_event_may_lack_its_empty_line() -> None:
    assert read(chunk("a"), chunk("b", finish="stop").rstrip()).tokens == 2
    assert read(chunk("a"), DONE.rstrip()).complete


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([chunk("a")], ENDED_EARLY),
        ([], ENDED_EARLY),
        ([chunk(finish="stop"), DONE], EMPTY),
        ([b"data: {\n\n"], MALFORMED),
        ([b"data: [1]\n\n"], MALFORMED),
        ([chunk("a"), chunk("b")[:-6] + b"\n\n", DONE], MALFORMED),
        ([b"x" * (MAX_EVENT_BYTES + 1)], MALFORMED),
        ([chunk("a"), event({"error": {"message": "no", "code": "boom"}})], f"{ERROR_EVENT} boom"),
        ([event({"error": "no"})], ERROR_EVENT),
    ],
)
def test_what_is_no_answer_is_a_failure(pieces: list[bytes], kind: str) -> None:
    with pytest.raises(Failed) as raised:
        read(*pieces)

    assert raised.value.kind == kind


@pytest.mark.parametrize(
    "kept", ["", "x", "[]", "1", '{"choices": [1]}', '{"choices": {}}', '{"choices": 3}', "[" * 100_000]
)
def test_text_of_nonsense_is_empty(kept: str) -> None:
    assert text_in(kept) == ""

"""Whatever an upstream sends, the mesh receives a valid answer or one typed error."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from tests.upstream.api.answering import check, reader
from tests.upstream.api.asking import TIME, WEATHER, asked

NAMES = (
    *("choices", "index", "delta", "message", "text", "content", "refusal", "reasoning", "reasoning_content"),
    *("tool_calls", "id", "function", "name", "arguments", "finish_reason", "stop_reason", "logprobs"),
    *("token", "logprob", "bytes", "top_logprobs", "tokens", "token_logprobs", "usage", "prompt_tokens"),
    *("completion_tokens", "prompt_tokens_details", "cached_tokens", "error", "type", "thinking"),
)
TEXTS = st.sampled_from(["stop", "length", "get_time", "{}", "{", "text", "x", "\ud800"]) | st.text(
    max_size=5
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=20,
)

# Mostly what a server would send, with anything in its places.
TOKEN = st.fixed_dictionaries(
    {"token": TEXTS, "logprob": st.floats(max_value=0) | st.just(-1)},
    optional={"bytes": st.lists(st.integers(0, 255), max_size=3) | JSON},
)
CALL = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({}, optional={"name": TEXTS, "arguments": TEXTS | JSON})},
    optional={"index": st.integers(0, 2) | JSON, "id": TEXTS},
)
DELTA = st.fixed_dictionaries(
    {},
    optional={
        "content": TEXTS | JSON,
        "reasoning": TEXTS,
        "tool_calls": st.lists(CALL, max_size=3) | JSON,
    },
)
CHOICE = st.fixed_dictionaries(
    {"delta": DELTA},
    optional={
        "index": st.just(0) | SCALARS,
        "finish_reason": st.sampled_from(["stop", "length", "tool_calls", None]) | SCALARS,
        "stop_reason": TEXTS | SCALARS,
        "logprobs": st.fixed_dictionaries({"content": st.lists(TOKEN, max_size=3)}) | JSON,
    },
)
USAGE = st.fixed_dictionaries({"prompt_tokens": st.integers(0, 9), "completion_tokens": st.integers(0, 99)})
EVENT = st.fixed_dictionaries(
    {"choices": st.lists(CHOICE, max_size=2) | JSON}, optional={"usage": USAGE | JSON}
)
FIELDS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "sampling": st.fixed_dictionaries(
            {},
            optional={
                "logprobs": st.booleans(),
                "top_logprobs": st.integers(0, 2),
                "max_tokens": st.integers(1, 8),
                "stop": st.just(["x"]),
            },
        ),
        "chat": st.sampled_from([{}, {"tools": [TIME, WEATHER]}]),
    }
)


ENDS = (pb.FINISH_REASON_STOP, pb.FINISH_REASON_STOP_SEQUENCE, pb.FINISH_REASON_LENGTH)
EARLY = (errors.NoWorkers, errors.Overloaded, errors.InvalidRequest)


@given(fields=FIELDS, events=st.lists(EVENT | JSON, max_size=8))
@example(
    fields={"sampling": {}, "chat": {}},
    events=[{"choices": [{"delta": {"content": "stop"}}, {"delta": {}, "index": 1}]}],
)
def test_any_events_are_a_valid_answer_or_one_error(fields: dict[str, Any], events: list[object]) -> None:
    reading, deltas = reader(**fields), []
    begun, error = False, None
    finish = pb.Finish()
    try:
        for event in events:
            deltas += reading.read(event)
            begun = reading.begun
            assert begun or not deltas
        finish = reading.finish()
    except errors.HeadraceError as raised:
        error = raised

    check(deltas, asked(**fields))
    assert reading.tokens == sum(delta.token_count for delta in deltas)
    if error is None:
        assert finish.reason in ENDS
    else:
        assert isinstance(error, errors.UpstreamLost if begun else EARLY)

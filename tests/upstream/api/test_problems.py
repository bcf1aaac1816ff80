"""Errors of upstreams become errors of the mesh, which say whether a retry helps and whose turn it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import errors
from headrace.upstream.api.problems import UPSTREAM_CODE, UPSTREAM_STATUS, problem_of, problem_of_event
from headrace.upstream.api.problems import retry_after as wait_of
from tests.upstream.api.recorded.reading import recorded

NOW = 1_795_970_000.0  # Sun, 29 Nov 2026 16:33:20 GMT
KEY = "sk-proj-AbCdEf0123456789"


def problem(status: int, body: object = b"", **headers: str) -> errors.HeadraceError:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return problem_of(status, named, data, key=KEY, now=NOW)


def openai(message: str, code: str | None = None, param: str | None = None, type: str = "") -> dict[str, Any]:
    return {
        "error": {"message": message, "type": type or "invalid_request_error", "param": param, "code": code}
    }


# The error object of a 400; the error and its field; whether another tier may answer.
TOP_P, MOST, STOP = "sampling.top_p", "sampling.max_tokens", "sampling.stop"
INVALID: list[tuple[object, type[errors.InvalidRequest], str, bool]] = [
    (b"", errors.InvalidRequest, "", False),
    (openai("no"), errors.InvalidRequest, "", False),
    ({"detail": "no"}, errors.InvalidRequest, "", False),
    (openai("is 7", param="top_p"), errors.InvalidSampling, TOP_P, False),
    (openai("no", param="max_completion_tokens"), errors.InvalidSampling, MOST, False),
    (openai("no", param="response_format"), errors.InvalidSampling, "sampling.structured", False),
    (openai("no", param="messages[3].content"), errors.InvalidRequest, "chat.messages[3]", False),
    (openai("no", param="tools.0.function"), errors.InvalidRequest, "chat.tools[0]", False),
    (openai("no", param="nonesuch"), errors.InvalidRequest, "", False),
    (openai("no", "unsupported_value", "top_p"), errors.InvalidSampling, TOP_P, True),
    (openai("'stop' is not supported with it", param="stop"), errors.InvalidSampling, STOP, True),
    (
        {"detail": [{"loc": ["body", "stop"], "msg": "Extra inputs are not permitted"}]},
        errors.InvalidSampling,
        STOP,
        True,
    ),
    (openai("it is", "context_length_exceeded", "messages"), errors.ContextTooLong, "input", False),
    (openai("it is", type="exceed_context_size_error"), errors.ContextTooLong, "input", False),
    (openai("The maximum context length is 9 tokens."), errors.ContextTooLong, "input", False),
]
# Status and body, the error, and whether a retry helps.
QUOTA = "insufficient_quota"
STATUSES: list[tuple[int, object, type[errors.HeadraceError], bool]] = [
    (301, b"", errors.NoWorkers, False),
    (401, openai("Incorrect API key", "invalid_api_key"), errors.NoWorkers, False),
    (400, [{"error": {"code": 400, "message": "no", "status": "API_KEY_INVALID"}}], errors.NoWorkers, False),
    (400, openai("no such model", "model_not_found"), errors.NoWorkers, False),
    (402, openai("Insufficient Balance"), errors.NoWorkers, False),
    (403, openai("region"), errors.NoWorkers, False),
    (404, openai("The model does not exist", "model_not_found"), errors.NoWorkers, False),
    (405, b"Method Not Allowed", errors.NoWorkers, False),
    (408, b"", errors.NoWorkers, True),
    (409, b"", errors.NoWorkers, True),
    (413, b"<html><title>413 Request Entity Too Large</title>", errors.ContextTooLong, False),
    (425, b"", errors.NoWorkers, True),
    (429, openai("You exceeded your current quota", QUOTA, type=QUOTA), errors.NoWorkers, False),
    (429, openai("Rate limit reached", "rate_limit_exceeded"), errors.Overloaded, True),
    (500, openai("The server had an error"), errors.NoWorkers, True),
    (501, openai("This server does not support it"), errors.InvalidRequest, False),
    (502, b"<html><head><title>502 Bad Gateway</title></head></html>", errors.NoWorkers, True),
    (503, openai("Loading model", "503", type="unavailable_error"), errors.NoWorkers, True),
    (504, b"upstream request timeout", errors.NoWorkers, True),
    (529, openai("Overloaded"), errors.Overloaded, True),
]


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("row", INVALID, ids=lambda row: f"{row[1].__name__}-{row[2]}")
def test_an_invalid_request_is_reported_with_its_field(row: tuple[Any, ...], status: int) -> None:
    body, kind, field, elsewhere = row

    error = problem(status, body)

    assert (type(error), error.field) == (kind, field)
    assert error.retry_after is None
    assert (errors.FEATURE in error.fields) == elsewhere


@pytest.mark.parametrize("row", STATUSES, ids=lambda row: f"{row[0]}-{row[2].__name__}")
def test_a_status_becomes_an_error(row: tuple[Any, ...]) -> None:
    status, body, kind, retryable = row

    error = problem(status, body)

    assert type(error) is kind
    assert (error.retry_after is not None) == retryable
    assert error.fields[UPSTREAM_STATUS] == str(status)
    assert str(status) in error.message


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "--api-key-file"), (403, "--api-key-file"), (404, "--model"), (301, "--url")]
)
def test_an_error_of_the_configuration_names_the_setting(status: int, advice: str) -> None:
    assert advice in problem(status).message


# name of the recording, error, field
RECORDED: list[tuple[str, type[errors.HeadraceError], str]] = [
    ("gateway/too_long", errors.ContextTooLong, "input"),
    ("gateway/bad_value", errors.InvalidSampling, "sampling.top_p"),
    ("gateway/bad_type", errors.InvalidSampling, "sampling.max_tokens"),
    ("gateway/no_model", errors.NoWorkers, ""),
    ("gateway/no_path", errors.NoWorkers, ""),
    ("vllm/too_long", errors.ContextTooLong, "input"),
    ("vllm/bad_value", errors.InvalidSampling, "sampling.top_p"),
    ("vllm/bad_type", errors.InvalidSampling, "sampling.max_tokens"),
    ("vllm/no_model", errors.NoWorkers, ""),
    ("vllm/no_path", errors.NoWorkers, ""),
    ("llama_cpp/too_long", errors.ContextTooLong, "input"),
    ("llama_cpp/bad_type", errors.InvalidRequest, ""),
    ("llama_cpp/no_path", errors.NoWorkers, ""),
]


@pytest.mark.parametrize(("name", "kind", "field"), RECORDED)
def test_recorded_errors(name: str, kind: type[errors.HeadraceError], field: str) -> None:
    status, body = recorded(name)

    error = problem(status, body)

    assert (type(error), error.field) == (kind, field)
    assert error.retry_after is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": "Sun, 29 Nov 2026 16:33:50 GMT"}, 30.0),
        ({"retry-after": "Sun, 29 Nov 2026 16:33:00 GMT"}, 0.0),
        ({"retry-after": "-1"}, 0.0),
        ({"retry-after": "1e9"}, 3600.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Sun, 29 Nov 99999 16:33:50 GMT"}, None),
        ({"retry-after-ms": "x", "retry-after": "2"}, 2.0),
    ],
)
def test_the_time_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert wait_of(headers, NOW) == seconds


def test_the_time_to_wait_is_part_of_a_temporary_error_only() -> None:
    assert problem(429, retry_after="7").retry_after == 7.0
    assert problem(503, retry_after="7").retry_after == 7.0
    assert problem(429).retry_after == 0.0
    assert problem(401, retry_after="7").retry_after is None


@pytest.mark.parametrize(
    "message",
    [
        f"Incorrect API key provided: {KEY}.",
        f"Incorrect API key provided: {KEY[:8]}**********6789. You can find yours at",
        f"{KEY[:12]}... is not valid",
        "Bearer abcdefghijklmnop was rejected",
        "gsk_0123456789abcdef is expired",
        "key AIzaSyA0123456789abcdef is expired",
    ],
)
def test_keys_are_removed_from_messages(message: str) -> None:
    said = problem(401, openai(message)).message

    assert "[key]" in said
    assert KEY[:8] not in said
    assert "6789" not in said
    assert "abcdef" not in said


def test_keys_are_removed_from_codes_and_from_text() -> None:
    assert KEY not in problem(500, openai("no", code=KEY)).fields[UPSTREAM_CODE]
    assert KEY not in problem(500, f"no {KEY}".encode()).message


@pytest.mark.parametrize("status", [408, 500, 503, 529])
def test_what_is_no_mistake_of_request_or_operator_is_reported_without_the_message(status: int) -> None:
    """llama.cpp quotes answers that it cannot parse, and such an error is logged."""
    error = problem(status, openai("cannot parse: my secret", "parse_error"))

    assert "secret" not in f"{error} {error.fields}"
    assert error.fields[UPSTREAM_CODE] == "parse_error"


def test_a_code_that_repeats_the_status_is_left_out() -> None:
    """As llama.cpp's."""
    error = problem(400, {"error": {"code": 400, "message": "no", "type": "exceed_context_size_error"}})

    assert error.fields[UPSTREAM_CODE] == "exceed_context_size_error"


def test_messages_are_one_line_of_bounded_length() -> None:
    said = problem(400, openai("a\r\nb\x00c\x1b[31m\u202e" + "x" * 5000)).message

    assert said.isprintable()
    assert len(said) < 400


def test_a_page_of_html_is_replaced_by_its_title() -> None:
    said = problem(429, b"<html><head><title>502 Bad Gateway</title></head><body>long</body>").message

    assert said.endswith("a page of HTML, '502 Bad Gateway'")


@pytest.mark.parametrize(
    ("error", "kind", "retryable"),
    [
        ({"message": "no", "code": 400}, errors.InvalidRequest, False),
        ({"message": "maximum context length", "code": 400}, errors.ContextTooLong, False),
        ({"message": "no", "type": "invalid_request_error", "code": None}, errors.InvalidRequest, False),
        ({"message": "slow", "type": "rate_limit_error"}, errors.Overloaded, True),
        ({"message": "slow", "code": "rate_limit_exceeded"}, errors.Overloaded, True),
        ({"message": "busy", "type": "overloaded_error"}, errors.Overloaded, True),
        ({"message": "paid", "code": "insufficient_quota"}, errors.NoWorkers, False),
        ({"message": "broken", "type": "server_error"}, errors.NoWorkers, True),
        ("broken", errors.NoWorkers, True),
        (True, errors.NoWorkers, True),
    ],
)
def test_an_error_in_a_stream(error: object, kind: type[errors.HeadraceError], retryable: bool) -> None:
    found = problem_of_event(error, key=KEY)

    assert type(found) is kind
    assert (found.retry_after is not None) == retryable


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "message", "type", "code", "param", "detail", "loc", "msg"]), inner
        )
    ),
    max_leaves=12,
)


@given(status=st.integers(300, 999), body=JSON | st.binary(max_size=50))
def test_any_response_is_an_error_of_the_mesh(status: int, body: object) -> None:
    error = problem(status, body)

    assert isinstance(error, errors.Unavailable | errors.Overloaded | errors.InvalidRequest)
    assert error.message.isprintable()


@given(error=JSON)
def test_any_error_in_a_stream_is_one_of_the_mesh(error: object) -> None:
    found = problem_of_event(error, key=KEY)

    assert isinstance(found, errors.Unavailable | errors.Overloaded | errors.InvalidRequest)

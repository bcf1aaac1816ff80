"""Each error of the mesh has a deliberate HTTP status."""

from __future__ import annotations

import pytest

from headrace import errors
from headrace.gateway.problems import _ROWS, problem_of, translated

ALL = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.HeadraceError)
]
STATUS = {
    "EMPTY_INPUT": 400,
    "CONTEXT_TOO_LONG": 400,
    "UNKNOWN_TIER": 404,
    "UNKNOWN_MODEL": 404,
    "MESSAGE_TOO_LARGE": 413,
    "CREDENTIALS_REQUIRED": 401,
    "CREDENTIALS_INVALID": 401,
    "FORBIDDEN": 403,
    "QUEUE_FULL": 429,
    "SHED": 429,
    "SERVER_BUSY": 429,
    "TENANT_QUOTA": 429,
    "DEADLINE_QUEUE": 504,
    "TTFT_UNATTAINABLE": 504,
    "DEADLINE_DECODE": 504,
    "NO_WORKERS": 503,
    "DRAINING": 503,
    "UPSTREAM_LOST": 502,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "NOT_FOUND": 502,
}


def test_every_class_of_errors_has_a_row_of_its_own() -> None:
    assert set(_ROWS) == set(ALL)
    assert {_ROWS[kind].status for kind in ALL} <= {
        400,
        401,
        403,
        404,
        409,
        413,
        429,
        500,
        501,
        502,
        503,
        504,
    }


@pytest.mark.parametrize("kind", ALL)
def test_an_error_keeps_its_message_and_says_whether_to_retry(kind: type[errors.HeadraceError]) -> None:
    problem = problem_of(kind("what to do"))

    assert problem.message == "what to do"
    assert problem.status == STATUS.get(kind.reason, problem.status)
    assert problem.code
    temporary = problem.status == 503 or (problem.status == 429 and kind is not errors.SlowReader)
    assert ("retry-after" in problem.headers) == (temporary or kind is errors.Aborted)
    assert ("www-authenticate" in problem.headers) == (problem.status == 401)


@pytest.mark.parametrize(
    ("seconds", "whole", "exact"),
    [(0.0, "1", "1"), (0.2, "1", "200"), (1.0, "1", "1000"), (1.2, "2", "1200")],
)
def test_a_delay_is_in_whole_seconds_and_exact(seconds: float, whole: str, exact: str) -> None:
    headers = problem_of(errors.Overloaded("full", retry_after=seconds)).headers

    assert (headers["retry-after"], headers["retry-after-ms"]) == (whole, exact)


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("sampling.top_p", "top_p"),
        ("routing.tenant", "user"),
        ("chat.messages[3].content", "messages[3].content"),
        ("chat.messages", "messages"),
        ("chat.continue_final_message", "continue_final_message"),
        ("chatty", None),
        ("resume.attempt", None),
        ("", None),
    ],
)
def test_fields_have_the_names_of_the_http_request(field: str, param: str | None) -> None:
    params = {"sampling.top_p": "top_p", "routing.tenant": "user", "chat.messages": "messages", "chat": ""}

    assert translated(field, params) == param


def test_elements_have_the_place_of_the_http_request() -> None:
    params = {
        "chat.tools[]": "tools[].function",
        "chat.tools[1]": "tools[3].function",
        "a[].b[]": "x[].y[].z",
    }

    assert translated("chat.tools[12].parameters", params) == "tools[12].function.parameters"
    assert translated("chat.tools[1].parameters", params) == "tools[3].function.parameters"
    assert translated("a[3].b[40].c", params) == "x[3].y[40].z.c"
    assert translated("chat.tools", params) is None


def test_other_fields_in_a_message_have_the_names_of_the_http_request_too() -> None:
    params = {"sampling": "", "chat": "", "chat.tools[]": "tools[].function"}
    text = (
        "sampling.regex and sampling.ignore_eos: see chat.tools[2].name, 'chat.tools' and my.sampling.top_p."
    )
    problem = problem_of(errors.InvalidSampling(text, field="sampling.regex"), params)

    assert problem.message == (
        "regex and ignore_eos: see tools[2].function.name, 'chat.tools' and my.sampling.top_p."
    )
    assert problem_of(errors.InvalidSampling(text, field="sampling.regex")).message == text

"""Options that cannot be used together are rejected in words."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.cli.bench.options import BadOption, Load, check_prompts, loads, parse_body, parse_headers

NONE: dict[str, Any] = {
    "concurrency": "",
    "rate": "",
    "burstiness": None,
    "max_concurrency": None,
    "requests": None,
    "seconds": None,
    "seed": 0,
    "timeout": 9.0,
}
NO_PROMPTS: dict[str, Any] = {
    "path": "",
    "input_len": None,
    "output_len": None,
    "prefix_len": 0,
    "range_ratio": 0.0,
    "max_tokens": None,
}


def of(**given: Any) -> list[Load]:
    return loads(**{**NONE, **given})


def test_by_default_a_closed_loop_of_eight_sends_a_hundred_requests() -> None:
    assert of() == [Load(concurrency=8, requests=100, timeout=9.0)]


def test_several_numbers_are_several_loads() -> None:
    assert [(one.concurrency, one.requests) for one in of(concurrency="1,16,64")] == [
        (1, 100),
        (16, 100),
        (64, 256),
    ], "with enough requests for each client"
    assert [(one.rate, one.requests, one.burstiness) for one in of(rate="0.5,2")] == [
        (0.5, 100, 1.0),
        (2.0, 100, 1.0),
    ]


def test_a_time_replaces_the_number_of_requests() -> None:
    assert of(seconds=5.0)[0].requests is None
    assert of(rate="3", seconds=5.0)[0].requests is None
    assert of(seconds=5.0, requests=7)[0].requests == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"concurrency": "4", "rate": "2"}, "either --concurrency or --rate"),
        ({"concurrency": "0"}, "must be a number from 1"),
        ({"concurrency": "4,x"}, "must be a number from 1"),
        ({"rate": "0"}, "above 0"),
        ({"rate": "inf"}, "above 0"),
        ({"rate": "1,fast"}, "above 0"),
        ({"burstiness": 2.0}, "--burstiness needs --rate"),
        ({"max_concurrency": 2}, "--max-concurrency needs --rate"),
    ],
)
def test_a_bad_load_is_explained(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        of(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "x.jsonl", "input_len": 3}, "either --prompts, or --input-len"),
        ({"prefix_len": 3}, "give --input-len"),
        ({"range_ratio": 0.1}, "give --input-len"),
        ({"output_len": 3, "max_tokens": 3}, "either --max-tokens, the most, or --output-len"),
    ],
)
def test_bad_prompts_are_explained(given: dict[str, Any], message: str) -> None:
    check_prompts(**NO_PROMPTS)
    with pytest.raises(BadOption, match=message):
        check_prompts(**{**NO_PROMPTS, **given})


def test_headers_have_a_name_and_a_value() -> None:
    assert parse_headers(["X-Tenant: search", "a:b:c"]) == {"x-tenant": "search", "a": "b:c"}
    for bad in ("x", ": y", "x y: z", "x: a\nb", "x: é"):
        with pytest.raises(BadOption, match="must be a name, a colon and a value"):
            parse_headers([bad])


def test_the_additional_body_is_an_object() -> None:
    assert parse_body('{"top_p": 0.9, "temperature": null}') == {"top_p": 0.9, "temperature": None}
    assert parse_body("") == {}
    for bad in ("[]", "x", "1"):
        with pytest.raises(BadOption, match="must be a JSON object"):
            parse_body(bad)

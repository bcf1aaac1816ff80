"""The load that options describe, and checks of options that depend on each other. No I/O."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DEFAULT_CONCURRENCY = 8
DEFAULT_REQUESTS = 100
PER_CLIENT = 4  # requests by default, so that the end of a run with fewer clients does not count much

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class BadOption(ValueError):
    """An option cannot be used, or not with another one. The message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much is sent, and when.

    concurrency       requests in flight at a time, in a closed loop; None: an open loop
    rate              requests per second of an open loop
    burstiness        of its arrivals; see `arrivals`
    max_concurrency   most requests in flight of an open loop; others wait for their turn. None: no limit
    requests          how many requests; None: as many as fit into *seconds*
    seconds           no request starts later than this; those in flight are completed. None: no limit
    timeout           seconds for one answer
    """

    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0
    max_concurrency: int | None = None
    requests: int | None = None
    seconds: float | None = None
    seed: int = 0
    timeout: float = 300.0


def loads(
    *,
    concurrency: str,
    rate: str,
    burstiness: float | None,
    max_concurrency: int | None,
    requests: int | None,
    seconds: float | None,
    seed: int,
    timeout: float,
) -> list[Load]:
    """Return one load for each of the numbers in *concurrency* or *rate*; both "" for the default.

    Raises BadOption.
    """
    if concurrency and rate:
        raise BadOption(
            "give either --concurrency or --rate; to limit the requests in flight of a rate, use "
            "--max-concurrency"
        )
    if rate:
        return [
            Load(
                rate=one,
                burstiness=1.0 if burstiness is None else burstiness,
                max_concurrency=max_concurrency,
                requests=DEFAULT_REQUESTS if requests is None and seconds is None else requests,
                seconds=seconds,
                seed=seed,
                timeout=timeout,
            )
            for one in _rates(rate)
        ]
    for name, value in (("--burstiness", burstiness), ("--max-concurrency", max_concurrency)):
        if value is not None:
            raise BadOption(
                f"{name} needs --rate; without a rate, --concurrency requests are in flight all the time"
            )
    return [
        Load(
            concurrency=one,
            requests=max(DEFAULT_REQUESTS, PER_CLIENT * one)
            if requests is None and seconds is None
            else requests,
            seconds=seconds,
            seed=seed,
            timeout=timeout,
        )
        for one in _concurrencies(concurrency)
    ]


def _rates(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 < one < math.inf for one in found):
        raise BadOption(
            f"--rate {text!r} must be requests per second above 0, or several separated by commas"
        )
    return found


def _concurrencies(text: str) -> list[int]:
    if not text:
        return [DEFAULT_CONCURRENCY]
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if not all(one >= 1 for one in found):
        raise BadOption(f"--concurrency {text!r} must be a number from 1, or several separated by commas")
    return found


def check_prompts(
    *,
    path: str,
    input_len: int | None,
    output_len: int | None,
    prefix_len: int,
    range_ratio: float,
    max_tokens: int | None,
) -> None:
    """Raise BadOption for options of prompts that exclude each other."""
    if path and input_len is not None:
        raise BadOption("give either --prompts, or --input-len for synthetic prompts")
    if input_len is None and (prefix_len or range_ratio):
        raise BadOption("--prefix-len and --range-ratio are for synthetic prompts: give --input-len")
    if output_len is not None and max_tokens is not None:
        raise BadOption("give either --max-tokens, the most, or --output-len, the exact number of tokens")


def parse_headers(given: Sequence[str]) -> dict[str, str]:
    """Parse "NAME: VALUE" of each header. Raises BadOption."""
    headers = {}
    for text in given:
        name, colon, value = text.partition(":")
        name, value = name.strip().lower(), value.strip()
        if not colon or not _HEADER_NAME.fullmatch(name) or not (value.isprintable() and value.isascii()):
            raise BadOption(
                f"--header {text!r} must be a name, a colon and a value: 'x-headrace-tenant: search'"
            )
        headers[name] = value
    return headers


def parse_body(text: str) -> dict[str, Any]:
    """Parse the JSON object of --extra-body. Raises BadOption."""
    if not text:
        return {}
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise BadOption(f"--extra-body {text!r} must be a JSON object: '{{\"top_p\": 0.9}}'")
    return body

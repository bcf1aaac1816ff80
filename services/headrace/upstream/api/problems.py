"""Translate errors that an upstream reports to errors of the mesh.

The convention for retries is that of `errors.HeadraceError.retry_after`: None if the same request to the same
upstream would fail again. Otherwise the seconds to wait first; 0.0 if the upstream names no time, so that the
caller of this module chooses one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from headrace import errors
from headrace.upstream.api.words import passed_on

# Keys in `fields` of the errors here: the upstream's HTTP status, and its own code for the error.
UPSTREAM_STATUS = "upstream_status"
UPSTREAM_CODE = "upstream_code"
# What is wrong with an answer of a service that works: "content_filter" or "tool_calls".
UNUSABLE = "unusable"
MAX_WAIT_SECONDS = 3600.0

_QUOTA = frozenset({"insufficient_quota", "billing_hard_limit_reached", "insufficient_balance"})
_KEY = frozenset({"invalid_api_key", "API_KEY_INVALID", "authentication_error", "missing_api_key"})
_MODEL = frozenset({"model_not_found", "NotFoundError"})
_TOO_LONG = frozenset({"context_length_exceeded", "exceed_context_size_error"})
_CONTEXT = re.compile(r"context.?(length|size|window)|maximum.{0,20}(input )?tokens|too many tokens", re.I)
_MISSING = frozenset(
    {"unsupported_parameter", "unsupported_value", "unknown_parameter", "not_supported_error"}
)
_UNSUPPORTED = re.compile(
    r"(un|not |n't )support|(unrecogni[sz]ed|unknown|unexpected) .{0,20}(parameter|argument|field)"
    r"|extra (inputs|fields)|not permitted",
    re.I,
)
# HTTP statuses for the types of errors in streams that have no status of their own.
_STATUSES = {
    "invalid_request_error": 400,
    "BadRequestError": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "overloaded_error": 529,
}
_OVERLOADED = (429, 529)
_TEMPORARY = (408, 409, 425)
_NOT_IMPLEMENTED = (501, 505)
_PAYMENT_REQUIRED = 402
_INVALID = (400, 422)

# Fields of the contract by the parameters that stand for them.
_FIELDS = {
    "messages": "chat.messages",
    "tools": "chat.tools",
    "tool_choice": "chat.tool_choice",
    "parallel_tool_calls": "chat.parallel_tool_calls",
    "continue_final_message": "chat.continue_final_message",
    "chat_template_kwargs": "chat.template_arguments",
    "reasoning_effort": "chat.template_arguments",
    "prompt": "prompt",
    "response_format": "sampling.structured",
    "structured_outputs": "sampling.structured",
    "json_schema": "sampling.structured",
    "grammar": "sampling.structured",
    "max_completion_tokens": "sampling.max_tokens",
    "repeat_penalty": "sampling.repetition_penalty",
    **{
        name: f"sampling.{name}"
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
            *("frequency_penalty", "seed", "max_tokens", "min_tokens", "stop", "ignore_eos", "logprobs"),
            *("top_logprobs", "logit_bias", "stop_token_ids"),
        )
    },
}
_PLACE = re.compile(r"[a-z_]+(?:\[\d+\]|\.\d+)?", re.A)


@dataclass(frozen=True, slots=True)
class _Report:
    """What an upstream reports.

    message      for people, within bounds
    type, code   empty: none
    param        the parameter at fault; empty: unknown
    """

    message: str
    type: str = ""
    code: str = ""
    param: str = ""

    @property
    def codes(self) -> frozenset[str]:
        """Type and code, of which servers set one or the other."""
        return frozenset({self.type, self.code})


def problem_of(
    status: int, headers: Mapping[str, str], body: bytes, *, key: str, now: float
) -> errors.HeadraceError:
    """Return the error for a response that is not a success.

    status    of HTTP, not 2xx
    headers   with names in lower case, or a mapping that ignores the case
    body      the first bytes of the body, at least 64 KiB of it if it is that long
    key       the API key, which is removed from the message; empty: none
    now       the time in seconds since 1970, to compare dates in Retry-After with

    429 and 529 are Overloaded, and 408, 409, 425 and 5xx NoWorkers, both with `retry_after`. An exhausted
    quota, and what an operator has to correct, such as 401, 403 and 404, is NoWorkers without it. 400 and 422
    are the request's: ContextTooLong, InvalidSampling or InvalidRequest, with the field as far as known.
    """
    return _error(status, _report(_value(body), key), retry_after(headers, now))


def problem_of_event(error: object, *, key: str) -> errors.HeadraceError:
    """Return the error for the `error` of an event in a stream that has not begun."""
    report = _report({"error": error}, key)
    status = int(report.code) if re.fullmatch(r"[45]\d\d", report.code, re.A) else 0
    return _error(status or _STATUSES.get(report.type) or _STATUSES.get(report.code) or 500, report, None)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds after which the upstream asks for a retry; None if it does not.

    Reads retry-after-ms, and Retry-After in seconds or as a date. Values are 0 to an hour.
    """
    seconds = _number(headers.get("retry-after-ms"))
    if seconds is not None:
        seconds /= 1000
    else:
        text = headers.get("retry-after")
        seconds = _number(text)
        if seconds is None and text:
            try:
                seconds = parsedate_to_datetime(text).timestamp() - now
            except (ValueError, OverflowError):
                return None
    return None if seconds is None else min(max(seconds, 0.0), MAX_WAIT_SECONDS)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _error(status: int, report: _Report, wait: float | None) -> errors.HeadraceError:
    error = _classified(status, report, wait or 0.0)
    error.fields[UPSTREAM_STATUS] = str(status)
    names = (report.code, report.type)
    if name := next((name for name in names if name not in ("", str(status))), ""):
        error.fields[UPSTREAM_CODE] = name
    return error


def _classified(status: int, report: _Report, wait: float) -> errors.HeadraceError:
    answered = f"the service behind this tier answered {status}"
    said = f"{answered}: {report.message}"
    if report.codes & _QUOTA or status == _PAYMENT_REQUIRED:
        return errors.NoWorkers(f"{said}; its quota is used up, which the operator has to extend")
    if report.codes & _KEY or status in (401, 403):
        return errors.NoWorkers(f"{said}; the operator has to check --api-key-file")
    if status == 404 or (report.codes & _MODEL and status < 500):
        return errors.NoWorkers(f"{said}; the operator has to check --model and --url")
    if status in _OVERLOADED:
        return errors.Overloaded(said if status < 500 else answered, retry_after=wait)
    if status in _NOT_IMPLEMENTED:
        return errors.InvalidRequest(said, feature="not_implemented")  # see `errors.FEATURE`
    if status in _TEMPORARY or status >= 500:
        # Without its message, which may quote prompt or answer: this error enters logs and spans.
        return errors.NoWorkers(answered, retry_after=wait)
    if status == 413 or (status in _INVALID and _too_long(report)):
        return errors.ContextTooLong(said, field="input")
    if status in _INVALID:
        return _invalid(said, report)
    return errors.NoWorkers(f"{said}; the operator has to check --url")


def _too_long(report: _Report) -> bool:
    return bool(report.codes & _TOO_LONG or _CONTEXT.search(report.message))


def _invalid(said: str, report: _Report) -> errors.InvalidRequest:
    field = _field(report.param)
    kind = errors.InvalidSampling if field.startswith("sampling.") else errors.InvalidRequest
    error = kind(said, field=field)
    if report.codes & _MISSING or (report.param and _UNSUPPORTED.search(report.message)):
        error.fields[errors.FEATURE] = report.param or report.code  # another tier may have it
    return error


def _field(param: str) -> str:
    """Return the field of the contract for a parameter such as "messages[3].content"; empty if unknown."""
    if not (found := _PLACE.match(param.removeprefix("body."))):
        return ""
    name, separator, place = found[0].replace(".", "[", 1).partition("[")
    field = _FIELDS.get(name, "")
    return f"{field}[{place.rstrip(']')}]" if separator and field.startswith("chat.") else field


def _value(body: bytes) -> object:
    """Return the JSON of a body, or its text."""
    text = body.decode(errors="replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _report(value: object, key: str) -> _Report:
    """Return what a body reports, in the forms of OpenAI, vLLM, FastAPI and others."""
    for _ in range(4):  # {"error": {...}}, [{...}], {"detail": [{...}]}
        if isinstance(value, list) and value:
            value = value[0]
        elif isinstance(value, dict) and (inner := value.get("error") or value.get("detail")):
            value = inner
        else:
            break
    if not isinstance(value, dict):
        return _Report(passed_on(value if isinstance(value, str) else "", key))
    message = next((text for name in ("message", "msg", "reason") if (text := _text(value, name))), "")
    param = _text(value, "param")
    if not param and isinstance(place := value.get("loc"), list):  # of FastAPI: ["body", "messages", 3]
        param = ".".join(str(part) for part in place[1:3])
    code, kind = _text(value, "code"), _text(value, "type") or _text(value, "status")
    return _Report(
        passed_on(message, key),
        *(passed_on(text, key, most=64, empty="") for text in (kind, code, param)),
    )


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    return str(found) if isinstance(found, str) or (type(found) is int and abs(found) < 10**9) else ""

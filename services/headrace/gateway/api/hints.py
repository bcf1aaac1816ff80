"""Read the hints of a request: its headers, its model, and who calls.

x-headrace-tier, -min-tier, -max-tier   names of tiers
x-headrace-quality                      0 (cost) to 1 (quality)
x-headrace-session                      the conversation
x-headrace-priority                     0 to 9, the most urgent
x-headrace-deadline                     seconds for the whole answer
x-headrace-tenant                       who is accounted, unless the credentials say it
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

from headrace.gateway.api.models import Models
from headrace.gateway.api.parameters import DEFAULT_PRIORITY, CompletionParameters
from headrace.gateway.http.callers import TENANT_HEADER, tenant_of
from headrace.gateway.http.exchange import Exchange
from headrace.gateway.problems import Problem
from headrace.quoting import quoted
from headrace.runtime.security.identity import MAX_PRIORITY
from headrace.v1 import generation_pb2 as pb

MAX_REQUEST_ID = 64  # characters, so that prefix and suffix fit into the mesh's limit
_NAMES = {"x-headrace-tier": "tier", "x-headrace-min-tier": "min_tier", "x-headrace-max-tier": "max_tier"}


@dataclass(frozen=True)
class Hints:
    """What a request says besides its input.

    id        of the completion and of the request in the mesh
    routing   for the mesh
    timeout   seconds for the whole answer; None: the default of the router
    ignored   parameters that have no effect because of others or of the credentials
    """

    id: str
    routing: pb.Routing
    timeout: float | None
    ignored: tuple[str, ...] = ()


async def hints_of(
    exchange: Exchange, parameters: CompletionParameters, models: Models, *, prefix: str
) -> Hints:
    """Return the hints of a request. Raises Problem.

    prefix   of the id of the completion, such as "chatcmpl-"
    """
    routing = await models.pin(parameters.model, metadata=exchange.metadata)
    headers = exchange.headers
    for header, name in _NAMES.items():
        if value := headers.get(header):
            setattr(routing, name, value)
    if session := headers.get("x-headrace-session"):
        routing.session_id = session
    if (quality := _number(exchange, "x-headrace-quality", 0, 1)) is not None:
        routing.quality_preference = quality
    _set_priority(exchange, parameters, routing)
    named = headers.get(TENANT_HEADER)
    routing.tenant = tenant_of(exchange.identity, parameters.user, named)
    ignored = ("user",) if parameters.user and parameters.user != routing.tenant else ()
    timeout = _number(exchange, "x-headrace-deadline", 0, math.inf)
    if timeout == 0:
        raise _bad_header("x-headrace-deadline", headers["x-headrace-deadline"], "more than 0 seconds")
    return Hints(prefix + _request_id(exchange, parameters), routing, timeout, ignored)


def _set_priority(exchange: Exchange, parameters: CompletionParameters, routing: pb.Routing) -> None:
    """Set the priority: that of the header, or of the body; not above the limit of the credentials."""
    header = _number(exchange, "x-headrace-priority", 0, MAX_PRIORITY)
    if header is not None and header != int(header):
        value = exchange.headers["x-headrace-priority"]
        raise _bad_header("x-headrace-priority", value, f"an integer from 0 to {MAX_PRIORITY}")
    priority = parameters.urgency() if header is None else int(header)
    most = exchange.identity.max_priority
    if most < MAX_PRIORITY:
        priority = min(DEFAULT_PRIORITY if priority is None else priority, most)
    if priority is not None:
        routing.priority = priority


def _request_id(exchange: Exchange, parameters: CompletionParameters) -> str:
    given = parameters.request_id or exchange.headers.get("x-request-id")
    if not given:
        return secrets.token_hex(16)
    if len(given) > MAX_REQUEST_ID or not (given.isascii() and given.isprintable()):
        field = "request_id" if parameters.request_id else "x-request-id"
        raise Problem(
            400,
            f"{field} is {quoted(given)}, must be at most {MAX_REQUEST_ID} printable ASCII characters",
            code="invalid_value",
            param=field,
        )
    return given


def _number(exchange: Exchange, header: str, low: float, high: float) -> float | None:
    text = exchange.headers.get(header)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:  # also refuses NaN
        wanted = f"a number from {low:g} to {high:g}" if high < math.inf else "a number of seconds above 0"
        raise _bad_header(header, text, wanted)
    return value


def _bad_header(header: str, text: str, wanted: str) -> Problem:
    return Problem(
        400,
        f"the header {header} is {quoted(text)}, must be {wanted}",
        code="invalid_value",
        param=header,
    )

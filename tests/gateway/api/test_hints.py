"""Headers, the model and the credentials of a request become its routing, its tenant and its deadline."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.datastructures import Headers

from headrace.gateway.api.chat.parameters import ChatParameters
from headrace.gateway.api.hints import Hints, hints_of
from headrace.gateway.api.models import Models
from headrace.gateway.api.reading import read
from headrace.gateway.http.exchange import Exchange
from headrace.gateway.problems import Problem
from headrace.runtime.security.identity import ALL_SCOPES, ANONYMOUS, Identity
from tests.gateway.fake_router import Edge


async def test_headers_are_hints(plain: Edge) -> None:
    await plain.chat(
        headers={
            "x-headrace-tier": "small",
            "x-headrace-min-tier": "small",
            "x-headrace-max-tier": "large",
            "x-headrace-quality": "0.75",
            "x-headrace-session": "s1",
            "x-headrace-priority": "9",
            "x-headrace-tenant": "acme",
            "x-headrace-deadline": "12.5",
            "x-request-id": "mine",
        }
    )

    routing = plain.asked.routing
    assert (routing.tier, routing.min_tier, routing.max_tier) == ("small", "small", "large")
    assert (routing.quality_preference, routing.session_id, routing.priority) == (0.75, "s1", 9)
    assert routing.tenant == "acme"
    assert plain.asked.request_id == "chatcmpl-mine"
    [left] = plain.router.time_left
    assert left is not None
    assert 0 < left <= 13  # gRPC rounds deadlines up


async def test_without_hints_the_router_decides_everything(plain: Edge) -> None:
    await plain.chat()

    assert not plain.asked.routing.ListFields()
    assert plain.asked.request_id.startswith("chatcmpl-")
    assert plain.router.time_left == [None]


WRONG = [
    ("x-headrace-quality", "1.5", "must be a number from 0 to 1"),
    ("x-headrace-quality", "nan", "must be a number from 0 to 1"),
    ("x-headrace-quality", "much", "must be a number from 0 to 1"),
    ("x-headrace-priority", "10", "must be a number from 0 to 9"),
    ("x-headrace-priority", "1.5", "must be an integer from 0 to 9"),
    ("x-headrace-deadline", "0", "must be more than 0 seconds"),
    ("x-headrace-deadline", "-1", "must be a number of seconds above 0"),
    ("x-headrace-deadline", "soon", "must be a number of seconds above 0"),
    ("x-request-id", "a" * 65, "must be at most 64 printable ASCII characters"),
    ("x-headrace-tenant", "a" * 257, "must have 1 to 256 printable characters"),
    ("x-headrace-session", "a" * 257, "must be at most 256"),
    ("x-headrace-min-tier", "a" * 257, "must be at most 256"),
]


@pytest.mark.parametrize(("header", "value", "complaint"), WRONG)
async def test_a_wrong_header_is_explained(plain: Edge, header: str, value: str, complaint: str) -> None:
    response = await plain.chat(headers={header: value})

    assert response.status_code in (400, 404)
    error = response.json()["error"]
    assert complaint in error["message"]
    assert error["param"] == header
    assert not plain.router.requests


async def test_the_header_takes_precedence_over_the_body(plain: Edge) -> None:
    response = await plain.chat(
        priority=0, user="ann", headers={"x-headrace-priority": "3", "x-headrace-tenant": "acme"}
    )

    assert plain.asked.routing.priority == 3
    assert plain.asked.routing.tenant == "acme"
    assert response.headers["x-headrace-ignored"] == "user"


async def hints(identity: Identity, headers: dict[str, str] | None = None, **body: Any) -> Hints:
    exchange = SimpleNamespace(headers=Headers(headers or {}), identity=identity, metadata={})
    parameters = read(ChatParameters, {"messages": [{"role": "user", "content": "a"}], **body})
    models = Models(cast(Any, None))  # not asked: no request here names a model
    return await hints_of(cast(Exchange, exchange), parameters, models, prefix="chatcmpl-")


BOUND = Identity(name="token-1", scopes=ALL_SCOPES, tenant="acme", max_priority=4)


async def test_credentials_of_a_tenant_decide_the_tenant() -> None:
    plain = await hints(BOUND)
    with_user = await hints(BOUND, user="ann")
    same = await hints(BOUND, {"x-headrace-tenant": "acme"}, user="acme")

    assert [found.routing.tenant for found in (plain, with_user, same)] == ["acme"] * 3
    assert [found.ignored for found in (plain, with_user, same)] == [(), ("user",), ()]


async def test_credentials_of_a_tenant_cannot_name_another() -> None:
    with pytest.raises(Problem) as raised:
        await hints(BOUND, {"x-headrace-tenant": "other"})

    assert raised.value.status == 403


@pytest.mark.parametrize(("asked", "given"), [(None, 4), ("9", 4), ("2", 2)])
async def test_credentials_limit_the_priority(asked: str | None, given: int) -> None:
    found = await hints(BOUND, {} if asked is None else {"x-headrace-priority": asked})

    assert found.routing.priority == given


async def test_credentials_of_all_tenants_name_any() -> None:
    found = await hints(ANONYMOUS, user="ann")

    assert found.routing.tenant == "ann"
    assert not found.routing.HasField("priority")

"""Models are named as the router reports its tiers, without a call for each request."""

from __future__ import annotations

import asyncio
import time

import pytest

from headrace import errors
from headrace.gateway.api import models
from tests.gateway.fake_router import Edge, edge


async def test_auto_tiers_and_models_are_listed(plain: Edge) -> None:
    listed = (await plain.http.get("/models")).json()

    assert listed["object"] == "list"
    assert {model["id"]: model["max_model_len"] for model in listed["data"]} == {
        "auto": 4096,
        "small": 2048,
        "large": 4096,
        "tiny": 2048,
        "big": 4096,
        "bigger": 4096,
    }
    for model in listed["data"]:
        assert model["object"] == "model"
        assert model["owned_by"] == "headrace"
        assert abs(model["created"] - time.time()) < 3600


async def test_a_model_is_shown_by_its_name(plain: Edge) -> None:
    shown = await plain.http.get("/models/big")
    unknown = await plain.http.get("/models/org/none")

    assert shown.json()["id"] == "big"
    assert shown.json()["max_model_len"] == 4096
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("name", "tier", "model"),
    [("auto", "", ""), (None, "", ""), ("small", "small", ""), ("bigger", "", "bigger")],
)
async def test_a_name_pins_a_tier_or_a_model(plain: Edge, name: str | None, tier: str, model: str) -> None:
    response = await plain.chat(model=name)

    assert response.status_code == 200
    assert (plain.asked.routing.tier, plain.asked.routing.model) == (tier, model)


async def test_an_unknown_model_is_not_found_and_the_names_are_given(plain: Edge) -> None:
    response = await plain.chat(model="gpt-6")

    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert error["message"] == (
        "the model 'gpt-6' does not exist: use one of 'auto', 'small', 'large', 'tiny', 'big', 'bigger'"
    )
    assert not plain.router.requests


async def test_the_tiers_are_asked_for_only_when_a_name_is_unknown_and_at_most_once_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "FRESH_SECONDS", 3600.0)
    async with edge() as started:
        await started.chat(model="auto")
        assert started.router.polls == []

        await asyncio.gather(*(started.chat(model="small") for _ in range(8)))
        await asyncio.gather(*(started.chat(model=f"none-{number}") for number in range(8)))
        await started.http.get("/models")
        assert len(started.router.polls) == 1

        monkeypatch.setattr(models, "FRESH_SECONDS", 0.0)
        started.router.tiers = {"small": "tiny", "new": "newest"}
        answers = [await started.chat(model=name) for name in ("small", "newest", "large")]
        assert [answer.status_code for answer in answers] == [200, 200, 404]
        assert len(started.router.polls) == 3, "small was known"


async def test_a_tier_that_is_not_known_yet_may_serve_any_model() -> None:
    async with edge(tiers={"small": "tiny", "large": ""}) as started:
        response = await started.chat(model="big")

    assert response.status_code == 200
    assert started.asked.routing.model == "big"


async def test_a_name_of_a_tier_takes_precedence_over_that_of_a_model() -> None:
    async with edge(tiers={"a": "b", "b": "auto"}) as started:
        await started.chat(model="b")
        routing = started.asked.routing
        listed = (await started.http.get("/models")).json()["data"]

    assert (routing.tier, routing.model) == ("b", "")
    assert [model["id"] for model in listed] == ["auto", "a", "b"]


async def test_an_unreachable_router_is_an_error_of_the_list() -> None:
    async with edge(refuses=errors.Draining("the router is stopping", retry_after=1.0)) as started:
        listed = await started.http.get("/models")
        pinned = await started.chat(model="small")

    assert listed.status_code == pinned.status_code == 503
    assert listed.headers["retry-after"] == "1"


async def test_embeddings_are_not_served_and_other_paths_name_what_is(plain: Edge) -> None:
    embeddings = await plain.http.post("/embeddings", json={"model": "auto", "input": "a"})
    others = [
        await plain.http.get("/files"),
        await plain.http.post("/responses", json={}),
        await plain.http.delete("/chat/completions/x"),
    ]

    assert embeddings.status_code == 501
    assert embeddings.json()["error"]["code"] == "not_served"
    for other in others:
        assert other.status_code == 404
        assert "/v1/chat/completions" in other.json()["error"]["message"]

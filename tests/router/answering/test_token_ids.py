"""Token ids belong to one model: a router never sends them to another, and does not score them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace import errors
from headrace.client import chat
from headrace.router.answering.pins import pin_token_ids
from headrace.router.quotas.admission import ANSWER_TOKENS
from headrace.router.state.tiers import Tier
from headrace.routing.changes.records import join, parse
from headrace.v1 import generation_pb2 as pb
from tests.harness import collect
from tests.router.fake_batchers import FakeBatcher, routed


def ids(*tokens: int, **routing: Any) -> pb.GenerateRequest:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=tokens or (72, 105)))
    if routing:
        request.routing.CopyFrom(pb.Routing(**routing))
    return request


async def test_token_ids_go_to_the_model_or_the_tier_that_is_named() -> None:
    small, large = FakeBatcher(model="s"), FakeBatcher(model="l")
    async with routed(small=small, large=large) as client:
        by_tier = await collect(client, ids(tier="large"))
        by_model = await collect(client, ids(model="s"))
        with pytest.raises(errors.InvalidRequest, match=r"one of small, large, or .* one of l, s") as unclear:
            await collect(client, ids())
        with pytest.raises(errors.InvalidRequest, match="one of small, large"):
            await client.explain(ids())
        explained = await client.explain(ids(model="s"))

    assert (by_tier.text, by_tier.accepted.tier) == ("Hi", "large")
    assert (by_model.text, by_model.accepted.tier) == ("Hi", "small")
    assert unclear.value.field == "routing.model"
    assert not by_tier.accepted.HasField("score"), "ids have no text to score"
    assert [list(request.token_ids.ids) for request in (*small.requests, *large.requests)] == [[72, 105]] * 2
    assert explained.tier == "small"
    assert not explained.features


async def test_one_model_needs_no_name_and_only_its_tiers_replace_each_other() -> None:
    one, two = FakeBatcher(model="m", refuses=errors.NoWorkers("none")), FakeBatcher(model="m")
    async with routed(one=one, two=two) as client:
        answer = await collect(client, ids())
    assert (answer.text, answer.accepted.tier) == ("Hi", "two")

    other = FakeBatcher(model="other")
    async with routed(one=one, two=other) as client:
        for named in (ids(model="m"), ids(tier="one")):
            with pytest.raises(errors.NoWorkers):
                await collect(client, named)
    assert other.requests == []


async def test_a_tier_whose_model_is_not_known_may_have_another_one() -> None:
    unknown = FakeBatcher(model="", healthy=False)
    async with routed(small=FakeBatcher(model="m"), large=unknown) as client:
        with pytest.raises(errors.InvalidRequest, match=r"one of small, large, or .* one of m"):
            await collect(client, ids())
        assert (await collect(client, ids(model="m"))).text == "Hi"
    with pytest.raises(errors.NoWorkers, match="no model of the tiers only is known"):
        pin_token_ids(ids(), [Tier("only", [])])


async def test_an_interrupted_answer_to_token_ids_is_resumed() -> None:
    batchers = [FakeBatcher(breaks=[1]), FakeBatcher(breaks=[1])]
    async with routed(only=batchers) as client:
        answer = await collect(client, ids(*b"all of it"))

    assert answer.text == "all of it"
    requests = [request for batcher in batchers for request in batcher.requests]
    assert [bytes(request.token_ids.ids) for request in requests] == [b"all of it"] * 3
    assert sorted(len(request.resume.token_ids) for request in requests) == [0, 1, 2]


async def test_what_watches_requests_gets_no_text_of_token_ids(tmp_path: Path) -> None:
    """Feedback is taken, but there is no row of it; the shadow leaves them out."""
    log, rated = tmp_path / "decisions.jsonl", tmp_path / "feedback.jsonl"
    settings: dict[str, Any] = {
        "decision_log": log,
        "decision_log_text": True,
        "feedback": rated,
        "cascade": True,
        "explore": 0.5,
        "thresholds": "1",
        "shadow_tier": "large",
        "shadow_share": 1.0,
    }
    large = FakeBatcher(model="m")
    async with routed(settings, small=FakeBatcher(model="m"), large=large) as client:
        asked = [ids(model="m"), ids(1, 2, 3, model="m")]
        for request in asked:
            request.request_id = "same"
        first, second = [await collect(client, request) for request in asked]
        with pytest.raises(errors.InvalidRequest, match="several answers"):
            await client.feedback("same", ok=True)
        said = await client.feedback(answer_id=first.accepted.answer_id, ok=True)

    assert not said.kept
    assert rated.read_text() == ""
    assert second.tokens == 3
    assert large.requests == [], "neither a draft nor a shadow request"
    one, two = join(parse(json.loads(line)) for line in log.read_text().splitlines())
    assert (one.scored, one.turns, one.hints.model, one.characters) == (False, None, "m", 0)
    assert list(one.qualities.values()) == [1.0]
    assert two.qualities == {}


async def test_token_ids_count_as_so_many_tokens_of_a_quota(tmp_path: Path) -> None:
    quotas = tmp_path / "quotas.toml"
    quotas.write_text(f"[default]\ntokens_per_minute = {ANSWER_TOKENS + 10}\n")
    async with routed({"quotas": quotas}, only=FakeBatcher()) as client:
        await collect(client, ids(*range(1, 9)))
        with pytest.raises(errors.TenantQuota):
            await collect(client, ids(*range(1, 9)))


@pytest.mark.parametrize("role", ["developer", "system"])
async def test_a_developer_is_not_scored_and_a_tools_result_is_not_the_question(role: str) -> None:
    hard = "Prove that there are infinitely many primes."
    turns = [(role, hard), ("user", "Hello!"), ("assistant", ""), ("tool", hard)]
    async with routed(only=FakeBatcher()) as client:
        scores = [(await client.explain(chat(some))).score for some in (turns[1:2], turns[:2], turns)]

    assert scores[0] == scores[1]
    assert scores[2] == pytest.approx(scores[0], abs=0.1)

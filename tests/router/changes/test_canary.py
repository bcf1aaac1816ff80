"""A canary gets its share of conversations, and is rolled back everywhere when it is worse."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import errors
from headrace.client import Client, chat, connect
from headrace.router.__main__ import router
from headrace.router.changes.answered import Answered, Rating
from headrace.router.changes.canary import CANARY, Canary
from headrace.router.settings import Settings
from headrace.router.siblings import Siblings, inboxes
from headrace.router.state.bills import Bill
from headrace.routing.changes.verdict import MAX_TENANTS
from headrace.routing.request import Hints, RoutingRequest
from headrace.routing.scoring.score import UNSCORED
from headrace.routing.tier_view import Price
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_changes_pb2 as changes_pb
from tests.harness import PATIENCE, collect, until_healthy
from tests.router.changes.candidates import ALL_LARGE, ALL_SMALL, write, write_calibration
from tests.router.drafts import EASY
from tests.router.fake_batchers import FakeBatcher, routed, serving_fake


def talk(session: str, tenant: str = "") -> pb.GenerateRequest:
    request = chat(EASY)
    request.routing.session_id = session
    request.routing.tenant = tenant
    return request


def settings(folder: Path, *, part: float = 0.5, **others: Any) -> dict[str, Any]:
    """A scorer that sends everything to the small tier, and a candidate that sends everything to large."""
    control = write(folder / "control.json", ALL_SMALL)
    candidate = write(folder / "candidate.json", ALL_LARGE)
    return {"scorer": control, "canary": f"{candidate}:{part}", "poll_seconds": 0.02, **others}


async def state_of(client: Client) -> changes_pb.CanaryState:
    return (await client.list_tiers()).changes.canary


async def until(client: Client, condition: Callable[[changes_pb.CanaryState], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition(await state_of(client)):
            await asyncio.sleep(0.01)


async def rate(client: Client, number: int, good: Callable[[str], bool]) -> str:
    """Answer and rate a request of a new conversation; return its tier."""
    answer = await collect(client, talk(f"s{number}"))
    await client.feedback(answer.accepted.request_id, ok=good(answer.accepted.tier))
    return answer.accepted.tier


async def rate_until_rolled_back(client: Client, good: Callable[[str], bool]) -> int:
    """Return the number of conversations that were rated before a roll-back."""
    for number in range(400):
        await rate(client, number, good)
        if (await state_of(client)).rolled_back:
            return number
    raise AssertionError("the canary was not rolled back")


async def test_conversations_keep_their_arm_and_the_candidate_gets_its_share(tmp_path: Path) -> None:
    tiers: dict[str, set[str]] = {}
    async with routed(settings(tmp_path, part=0.25), small=FakeBatcher(), large=FakeBatcher()) as client:
        for number in [*range(100)] * 2:
            answer = await collect(client, talk(f"s{number}"))
            tiers.setdefault(f"s{number}", set()).add(answer.accepted.tier)
        state = await state_of(client)

    assert all(len(seen) == 1 for seen in tiers.values())
    large = sum(seen == {"large"} for seen in tiers.values())
    assert 12 <= large <= 40
    assert (state.candidate.requests, state.control.requests) == (2 * large, 200 - 2 * large)
    assert state.share == 0.25


@given(share=st.floats(0.01, 0.99), tenant=st.text(max_size=20), session=st.text(min_size=1, max_size=20))
def test_all_processes_assign_a_conversation_to_the_same_arm(share: float, tenant: str, session: str) -> None:
    one, two, other = (Canary(share, Siblings()) for _ in range(3))
    one.restart("a", "x")
    two.restart("a", "y")
    other.restart("b", "x")

    assert one.arm_of(tenant, session) == two.arm_of(tenant, session, "any id")
    assert other.arm_of(tenant, session) in ("", CANARY)


async def test_a_candidate_with_worse_ratings_is_rolled_back_until_its_file_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small, large = FakeBatcher(), FakeBatcher()
    async with routed(settings(tmp_path), small=small, large=large) as client:
        await rate_until_rolled_back(client, lambda tier: tier == "small")
        before = len(large.requests)
        state = await state_of(client)
        for number in range(40):
            assert await rate(client, 1000 + number, lambda _: True) == "small"
        (tmp_path / "copy").write_bytes((tmp_path / "candidate.json").read_bytes())
        (tmp_path / "copy").replace(tmp_path / "candidate.json")
        assert len(large.requests) == before

        write(tmp_path / "candidate.json", ALL_LARGE - 1)
        await until(client, lambda state: state.share == 0.5)
        for number in range(40):
            await collect(client, talk(f"t{number}"))
        after = await state_of(client)

    assert (state.rolled_back, state.share) == ("quality", 0.0)
    assert state.candidate.quality == 0.0
    assert state.control.quality == 1.0
    (record,) = [record for record in caplog.records if record.message == "canary rolled back"]
    assert vars(record)["measure"] == "quality"
    assert len(large.requests) > before
    assert after.rolled_back == ""
    counted = after.candidate.requests + after.control.requests
    assert counted == 40, "the counts are those of the new candidate"


async def test_a_candidate_whose_requests_fail_is_rolled_back(tmp_path: Path) -> None:
    async with routed(
        settings(tmp_path, part=0.3),
        small=FakeBatcher(),
        large=FakeBatcher(refuses=errors.Overloaded("full")),
    ) as client:
        for number in range(600):
            request = talk(f"s{number}")
            request.routing.allow_escalation = False
            try:
                await collect(client, request)
            except errors.Overloaded:
                if (await state_of(client)).rolled_back:
                    break
        state = await state_of(client)

    assert state.rolled_back == "errors"
    assert state.candidate.failed == state.candidate.requests >= 30
    assert state.control.failed == 0


async def test_a_candidate_that_costs_more_than_allowed_is_rolled_back(tmp_path: Path) -> None:
    given = settings(tmp_path, prices="small=1/1,large=9/9", canary_cost=2.0)
    async with routed(given, small=FakeBatcher(), large=FakeBatcher()) as client:
        for number in range(400):
            await collect(client, talk(f"s{number}"))
            if (await state_of(client)).rolled_back:
                break
        state = await state_of(client)

    assert state.rolled_back == "cost"
    assert state.candidate.cost == pytest.approx(9 * state.control.cost)


async def test_a_candidate_that_is_not_worse_is_kept(tmp_path: Path) -> None:
    """Half of the answers of both arms are rated badly."""
    async with routed(settings(tmp_path), small=FakeBatcher(), large=FakeBatcher()) as client:
        for number in range(200):
            await rate(client, number, lambda _, number=number: number % 2 == 0)  # type: ignore[misc]
        state = await state_of(client)

    assert state.rolled_back == ""
    assert state.candidate.rated + state.control.rated == 200


async def test_one_conversation_is_one_outcome_and_pinned_requests_are_none(tmp_path: Path) -> None:
    async with routed(settings(tmp_path), small=FakeBatcher(), large=FakeBatcher()) as client:
        for _ in range(5):
            answer = await collect(client, talk("one"))
            await client.feedback(answer.accepted.request_id, ok=True)
            pinned = talk("pinned")
            pinned.routing.tier = "small"
            answer = await collect(client, pinned)
            await client.feedback(answer.accepted.request_id, ok=False)
        state = await state_of(client)

    assert state.candidate.requests + state.control.requests == 5
    assert state.candidate.rated + state.control.rated == 1


async def test_each_arm_keeps_the_share_of_the_tiers_by_itself(tmp_path: Path) -> None:
    """The candidate's scores are all higher, but that is no reason to send it more to the large tier."""
    files = settings(tmp_path, share="0.3", canary=f"{write(tmp_path / 'b.json', -0.1)}:0.5")
    tiers: dict[str, list[str]] = {"": [], CANARY: []}
    async with routed(files, small=FakeBatcher(), large=FakeBatcher()) as client:
        for number in range(240):
            request = chat(f"{EASY} Prove {number} = {number * 17}." if number % 3 else EASY)
            request.request_id = f"r{number}"
            score = (await client.explain(request)).score
            answer = await collect(client, request)
            tiers[CANARY if score > 0.1 else ""].append(answer.accepted.tier)

    for own in tiers.values():
        assert len(own) > 80
        assert abs(own.count("large") - 0.3 * len(own)) <= 9


@asynccontextmanager
async def processes(given: dict[str, Any]) -> AsyncGenerator[list[Client], None]:
    """Two processes of one router, on a port each."""
    mail = inboxes(2)
    async with AsyncExitStack() as stack:
        tiers = [await stack.enter_async_context(serving_fake(FakeBatcher())) for _ in range(2)]
        clients = []
        for number in range(2):
            own = Settings(port=0, tiers=f"small={tiers[0]},large={tiers[1]}", drain_seconds=0, **given)
            gate = await stack.enter_async_context(router(own, Siblings(number, mail)))
            clients.append(await stack.enter_async_context(connect(f"127.0.0.1:{gate.port}")))
            await until_healthy(clients[-1])
        yield clients
    for pair in mail:
        for end in pair:
            end.close()


async def test_the_processes_of_a_router_add_up_their_evidence_and_roll_back_together(tmp_path: Path) -> None:
    async with processes(settings(tmp_path)) as (one, two):
        for number in range(12):
            await rate(one, 2 * number, lambda tier: tier == "small")
            await rate(two, 2 * number + 1, lambda tier: tier == "small")
        for client in (one, two):
            await until(client, lambda state: state.candidate.rated + state.control.rated == 24)
        number = 24
        while not (await state_of(one)).rolled_back:
            assert number < 400
            await rate(one if number % 2 else two, number, lambda tier: tier == "small")
            number += 1
        await until(two, lambda state: state.rolled_back == "quality")
        tiers = {(await collect(two, talk(f"t{place}"))).accepted.tier for place in range(20)}

    assert tiers == {"small"}


async def test_a_conversation_is_explained_by_its_arm_and_others_by_control(tmp_path: Path) -> None:
    async with routed(settings(tmp_path), small=FakeBatcher(), large=FakeBatcher()) as client:
        for number in range(20):
            explained = await client.explain(talk(f"s{number}"))
            assert explained.tier == (await collect(client, talk(f"s{number}"))).accepted.tier
        without = {(await client.explain(chat(EASY))).tier for _ in range(20)}
        tiers = {(await collect(client, chat(EASY))).accepted.tier for _ in range(30)}

    assert without == {"small"}
    assert tiers == {"small", "large"}


class Overheard(Siblings):
    """Keeps the last message to the siblings."""

    last: tuple[object, ...] = ()

    def tell(self, topic: str, *values: object) -> None:
        self.last = (topic, values)


def ended(request: pb.GenerateRequest, facts: RoutingRequest, bill: Bill, answer_id: str) -> Answered:
    """Return a request that the small tier has answered."""
    return Answered(
        request, (), UNSCORED, facts, None, "small", "stop", "ok", "", bill, seconds=0.0, answer_id=answer_id
    )


def test_the_evidence_about_any_tenants_fits_one_message() -> None:
    overheard = Overheard()
    canary = Canary(0.5, overheard, cost_limit=1.0)
    bill = Bill(["small"], {"small": Price(1.0, 1.0)})
    bill.add_attempt("small")
    bill.add_answer("small", prompt_tokens=123, tokens=45)
    for place in range(2 * MAX_TENANTS):
        tenant = f"{place:04}" + "\N{OGHAM SPACE MARK}" * 252
        facts = RoutingRequest(0.5, Hints(), tenant=tenant, arm=CANARY if place % 2 else "")
        request = pb.GenerateRequest(request_id="a")
        canary.answered(ended(request, facts, bill, "x"))
        canary.rated(Rating(tenant, "a", "small", 0.123456789, answer_id="x"))
        canary.rated(Rating(tenant, "a", "small", 0.123456789, source="judge", answer_id="x"))
    canary.exchange()

    assert overheard.last[0] == "canary"
    assert 10_000 < len(pickle.dumps(("tell", *overheard.last))) < 60_000


def test_verdicts_of_a_judge_are_not_mixed_with_ratings_of_callers() -> None:
    """A tie means "as good as the larger tier", which is no worse than a caller's 1.0."""
    canary = Canary(0.5, Siblings())
    for place in range(800):
        arm = CANARY if place % 2 else ""
        request = pb.GenerateRequest(request_id=str(place))
        facts, bill = RoutingRequest(0.5, Hints(), arm=arm), Bill(["small"], {})
        name = f"answer {place}"
        canary.answered(ended(request, facts, bill, name))
        # Answers of the smaller tier are judged, of which the candidate has more; callers are content.
        if place % 4 == 1:
            canary.rated(Rating("", str(place), "small", 0.5, source="judge", answer_id=name))
        canary.rated(Rating("", str(place), "small", 1.0, answer_id=name))
        canary.exchange()

    state = canary.state()
    assert not state.rolled_back
    assert state.verdicts["quality"].means == (0.0, 0.0)
    assert state.verdicts["judged"].counts == (0, 200)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"canary": "scorer.json"}, "is not FILE:SHARE"),
        ({"canary": "scorer.json:1"}, "is not FILE:SHARE"),
        ({"canary": "scorer.json:nan"}, "is not FILE:SHARE"),
        ({"canary": ":0.1"}, "is not FILE:SHARE"),
        ({"canary_cost": 1.2}, "need HEADRACE_CANARY"),
        ({"canary": "a.json:0.1", "canary_cost": 1.2}, "needs HEADRACE_PRICES"),
        ({"canary": "a.json:0.1", "calibration": "c.json"}, "needs HEADRACE_CANARY_CALIBRATION"),
    ],
)
def test_settings_that_make_no_canary_are_explained(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Settings(port=0, tiers="small=127.0.0.1:1,large=127.0.0.1:2", **wrong)


async def test_a_candidate_has_the_thresholds_of_its_calibration(tmp_path: Path) -> None:
    files = settings(tmp_path)
    files["calibration"] = write_calibration(tmp_path / "one.json", ALL_SMALL, 0.25)
    files["canary_calibration"] = write_calibration(tmp_path / "two.json", ALL_LARGE, 0.75)
    seen = set()
    async with routed(files, small=FakeBatcher(), large=FakeBatcher()) as client:
        for number in range(20):
            explained = await client.explain(talk(f"s{number}"))
            seen.add((round(explained.score), round(explained.candidates[-1].threshold, 2)))

    assert seen == {(0, 0.25), (1, 0.75)}

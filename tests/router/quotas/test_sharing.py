"""Routers share the limits of tenants over gRPC, through the loss of their keeper and through partitions."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.harness import eventually
from tests.router.quotas.group import group


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "quotas.toml"
    path.write_text(
        """
        [default]
        requests_per_minute = 60
        [tenants.streams]
        concurrent_streams = 10
        [tenants.cost]
        cost_per_day = 100
        """
    )
    return path


async def test_three_routers_admit_together_what_one_may(path: Path) -> None:
    async with group(path) as routers:
        await routers.settled(1, 1, 1)
        counts = [0, 0, 0]
        for _ in range(60):
            for place, member in enumerate(routers.members):
                counts[place] += await member.admit()
        most = 60 * (1 + routers.minutes)

    assert 60 <= sum(counts) <= most
    assert all(counts), "each of them got some"


async def test_streams_are_counted_over_all_routers_and_are_free_when_they_end(path: Path) -> None:
    async with group(path) as routers:
        await routers.settled(1, 1, 1)
        members = routers.members
        counts = await asyncio.gather(*(member.admit_many(10, "streams") for member in members))
        assert sum(counts) == 10
        members[2].end()
        ended = counts[2]
        await asyncio.sleep(0)
        async with asyncio.timeout(60):
            while ended:
                ended -= await members[1].admit("streams")
        assert not await members[1].admit("streams")


async def test_cost_is_counted_over_all_routers_by_what_answers_have_cost(path: Path) -> None:
    async with group(path) as routers:
        await routers.settled(1, 1, 1)
        keeper, second, third = routers.members
        assert await second.admit("cost", tokens=40)
        assert await third.admit("cost", tokens=40)
        assert not await keeper.admit("cost", tokens=40), "80 are reserved"
        second.end(tokens=1)
        third.end(tokens=30)
        await eventually(lambda: keeper.account("cost").spent == pytest.approx(31))
        assert await keeper.admit("cost", tokens=60)
        assert not await second.admit("cost", tokens=30)


async def test_the_next_keeper_knows_what_was_used_when_the_keeper_is_lost(path: Path) -> None:
    async with group(path) as routers:
        await routers.settled(1, 1, 1)
        keeper, second, third = routers.members
        admitted = await keeper.admit_many(30) + await third.admit_many(10)
        assert await third.admit("cost", tokens=70)
        third.end(tokens=70)
        # What the keeper admits in its last second, the others do not know.
        await eventually(lambda: all(0 < one.account().requests < 15 for one in (second, third)))
        await eventually(lambda: all(one.account("cost").spent >= 70 for one in (second, third)))
        await routers.split([0], [1, 2])
        await routers.settled(1 / 3, 2 / 3, 2 / 3)
        counts = await asyncio.gather(second.admit_many(60), third.admit_many(60))
        most = 60 * (1 + routers.minutes)
        assert sum(counts) > 0
        assert admitted + sum(counts) <= most
        assert not await second.admit("cost", tokens=31)
        assert await third.admit("cost", tokens=5)


async def test_a_partition_does_not_multiply_the_limits_and_costs_are_added_up_after_it(path: Path) -> None:
    async with group(path) as routers:
        await routers.settled(1, 1, 1)
        members = routers.members
        for member in members:
            assert await member.admit("cost", tokens=1)  # so that all have accounts
        await routers.split([0, 1], [2])
        await routers.settled(2 / 3, 2 / 3, 1 / 3)
        counts = await asyncio.gather(*(member.admit_many(60) for member in members))
        most = 60 * (1 + routers.minutes)
        assert 40 <= sum(counts) <= most
        assert counts[2] <= 20 * (1 + routers.minutes)

        # Each half has its share of the budget of cost, and no more after the other half has used its own.
        assert not await members[2].admit("cost", tokens=40)
        for member, tokens in ((members[0], 30), (members[2], 20)):
            assert await member.admit("cost", tokens=tokens)
            member.end(tokens=tokens)
        await routers.split([0, 1, 2])
        await routers.settled(1, 1, 1)
        await eventually(lambda: members[0].account("cost").spent >= 50)
        await eventually(lambda: members[2].account("cost").spent >= 50)
        assert not await members[2].admit("cost", tokens=51)
        await eventually(lambda: not members[1].quotas.sharing.keeps)
        assert not members[2].quotas.sharing.keeps


@pytest.mark.parametrize("cut_off", [[0], [2]], ids=["with the keeper", "with another"])
async def test_at_the_moment_of_a_split_those_cut_off_from_the_keeper_add_at_most_their_share(
    path: Path, cut_off: list[int]
) -> None:
    """The keeper is not aware of the split yet, and the others do not know what it has just admitted."""
    async with group(path) as routers:
        await routers.settled(1, 1, 1)
        burst = await routers.members[0].admit_many(60)
        await routers.split(cut_off, [place for place in range(3) if place not in cut_off])
        counts = [0, 0, 0]
        for _ in range(200):
            for place, member in enumerate(routers.members):
                counts[place] += await member.admit()
            await asyncio.sleep(0.01)
        lost = 2 if cut_off == [0] else 1  # routers that cannot reach the keeper
        most = 60 * (1 + lost / 3) + 60 * routers.minutes * (1 + lost / 3)

    assert burst == 60
    assert sum(counts) > 0
    assert burst + sum(counts) <= most


async def test_a_router_that_reaches_nobody_admits_its_share(path: Path) -> None:
    async with group(path) as routers:
        await routers.split([0], [1], [2])
        await routers.settled(1 / 3, 1 / 3, 1 / 3)
        counts = [await member.admit_many(60, "lonely") for member in routers.members]
        streams = [await member.admit_many(10, "streams") for member in routers.members]
        most = 60 * (1 + routers.minutes)

    assert all(count <= most / 3 + 1 for count in counts)
    assert streams == [3, 3, 3]


async def test_a_keeper_that_stalls_delays_requests_only_briefly(path: Path) -> None:
    """The wire stays open and nothing comes: as a process that is stopped."""
    async with group(path) as routers:
        await routers.settled(1, 1, 1)
        for place in (1, 2):
            routers.wires[place, 0].freeze()
        async with asyncio.timeout(60):
            while not await routers.members[1].admit("stalled"):
                pass
        await routers.settled(1 / 3, 2 / 3, 2 / 3)
        for place in (1, 2):
            routers.wires[place, 0].thaw()
        await routers.settled(1, 1, 1)


async def test_a_router_with_a_lower_address_takes_over_with_what_was_used(path: Path) -> None:
    async with group(path, start=[1, 2]) as routers:
        first, second, third = routers.members
        await eventually(lambda: second.gives_out(2 / 3) and third.gives_out(2 / 3))
        admitted = await third.admit_many(30)
        assert await third.admit("cost", tokens=60)
        third.end(tokens=60)
        await routers.start(0)
        await routers.settled(1, 1, 1)
        assert not second.quotas.sharing.keeps
        assert not await first.admit("cost", tokens=41)
        counts = await asyncio.gather(*(member.admit_many(60) for member in routers.members))
        most = 60 * (1 + routers.minutes)

    assert admitted + sum(counts) <= most


async def test_more_tenants_than_fit_into_a_message_are_shared_too(path: Path) -> None:
    async with group(path) as routers:
        await routers.settled(1, 1, 1)
        keeper, second, third = routers.members
        tenants = [f"tenant {number}" for number in range(300)]
        for each in tenants:
            assert await keeper.admit_many(20, each) == 20
            assert await third.admit(each)
        await eventually(lambda: all(0 < second.account(each).requests < 20 for each in tenants))
        await routers.split([0], [1, 2])
        await routers.settled(1 / 3, 2 / 3, 2 / 3)
        assert await second.admit_many(60, tenants[0]) + await third.admit_many(60, tenants[0]) <= 56
        for member in routers.members:
            member.end()
        await routers.split([0, 1, 2])
        await routers.settled(1, 1, 1)
        await eventually(lambda: not any(keeper.account(each).all_streams for each in tenants))


async def test_a_router_that_stops_leaves_the_whole_budget_of_the_day_to_the_others(path: Path) -> None:
    """As each router does in a rolling restart; the next keeper is told what was spent."""
    async with group(path) as routers:
        await routers.settled(1, 1, 1)
        keeper, second, third = routers.members
        assert await second.admit("cost", tokens=20)
        second.end(tokens=20)
        await routers.stop(1)
        await eventually(lambda: keeper.account("cost").spent == pytest.approx(20))
        assert not keeper.account("cost").held or all(
            not held.away for held in keeper.account("cost").held.values()
        )
        await eventually(lambda: third.account("cost").spent == pytest.approx(20))
        await routers.stop(0)
        await eventually(lambda: third.gives_out(1 / 3))
        assert not await third.admit("cost", tokens=81)
        assert await third.admit("cost", tokens=20)


async def test_a_caller_that_leaves_while_its_router_leases_holds_nothing(path: Path) -> None:
    async with group(path) as routers:
        await routers.settled(1, 1, 1)
        member = routers.members[1]
        for turns in range(40):
            request = asyncio.create_task(member.admit("streams"))
            for _ in range(turns):
                await asyncio.sleep(0)
            request.cancel()
            await asyncio.wait([request])
            if not request.cancelled() and request.result():
                member.end()
        await eventually(lambda: member.account("streams").streams == 0)
        await eventually(lambda: routers.members[0].account("streams").all_streams == 0)
        assert await member.admit_many(10, "streams") == 10

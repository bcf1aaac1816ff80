"""A client spreads its calls over all servers of a name, and follows the name."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest

from headrace import errors
from headrace.channel import open_channel
from headrace.client import Client, connect
from headrace.endpoints import endpoints
from headrace.endpoints.endpoints import Spread, servers_of
from headrace.endpoints.resolving import dns_name, replicated_name
from headrace.multiplex.calling import Caller
from headrace.v1 import generation_pb2 as pb
from tests.endpoints.routers import Router, routers
from tests.harness import PATIENCE, collect, eventually, prompt

LONG = "a long answer, which lasts for a while. " * 5


def endless() -> pb.GenerateRequest:
    """Return a request whose answer lasts for ten seconds, unless its caller leaves."""
    return prompt("again ", max_tokens=1000, ignore_eos=True)


@asynccontextmanager
async def streaming(client: Client, count: int) -> AsyncGenerator[None, None]:
    """Stream answers while the block runs, which is entered when all have begun."""
    begun = asyncio.Semaphore(0)

    async def read() -> None:
        async with aclosing(client.generate(endless(), timeout=PATIENCE)) as stream:
            await anext(stream)
            begun.release()
            async for _ in stream:
                pass

    tasks = [asyncio.create_task(read()) for _ in range(count)]
    try:
        async with asyncio.timeout(PATIENCE):
            for _ in range(count):
                await begun.acquire()
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def all_connected(client: Client, running: Sequence[Router]) -> None:
    """Have the client use each of these routers once."""
    seen: set[str] = set()
    async with asyncio.timeout(PATIENCE):
        while len(seen) < len(running):
            async with streaming(client, len(running)):
                seen |= {one.address for one in running if one.in_flight}


@pytest.mark.parametrize("multiplex", [False, True])
async def test_calls_are_spread_evenly_over_all_addresses(multiplex: bool) -> None:
    async with routers(3) as (made, running), made.client(multiplex=multiplex) as client:
        await all_connected(client, running)
        await eventually(lambda: not any(one.in_flight for one in running))

        async with streaming(client, 30):
            assert [one.in_flight for one in running] == [10, 10, 10]


async def test_an_added_router_gets_calls_and_a_removed_one_gets_no_more() -> None:
    """Scaling up and down is unseen: no call fails, without retries and resumption."""
    async with routers(1) as (made, running), made.client(retries=0, multiplex=True) as client:
        [first] = running
        outcomes: Counter[str] = Counter()
        stop = asyncio.Event()

        async def call_on() -> None:
            while not stop.is_set():
                async with aclosing(
                    client.generate(prompt("hello"), timeout=PATIENCE, resume=False)
                ) as stream:
                    events = [response async for response in stream]
                outcomes[events[-1].WhichOneof("event") or ""] += 1

        async with streaming(client, 4), asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(call_on())
            assert first.in_flight >= 4
            second = await made.start()
            made.published = [first.address, second.address]
            await eventually(lambda: second.in_flight >= 4)

            made.published = [second.address]
            await eventually(lambda: first.in_flight == 4)  # those that had begun
            before = outcomes.total()
            await eventually(lambda: outcomes.total() >= before + 20)
            assert first.in_flight == 4, "their answers continue, and no call was added"
            stop.set()

    assert set(outcomes) == {"finish"}


async def test_a_router_that_drains_is_left_by_its_callers_without_a_failed_call() -> None:
    """A rolling restart of all routers, one after the other, while answers stream and calls are made."""
    async with routers(2) as (made, running), made.client() as client:
        stop = asyncio.Event()

        async def call_on(number: int) -> int:
            count = 0
            while not stop.is_set():
                text = f"{number} {count} {LONG}"
                assert (await collect(client, prompt(text, max_tokens=1000))).text == text
                count += 1
            return count

        calls = [asyncio.create_task(call_on(number)) for number in range(12)]
        await eventually(lambda: all(one.in_flight for one in running))
        for old in running:
            new = await made.start()
            made.published = [one.address for one in made.started if one is not old and not one.stop.is_set()]
            await old.drain()
            async with asyncio.timeout(PATIENCE):
                while not new.in_flight:
                    await asyncio.sleep(0.01)
        stop.set()

        assert min(await asyncio.gather(*calls)) >= 1


async def test_a_conversation_stays_on_one_router_and_others_are_spread() -> None:
    async with routers(3) as (made, running), made.client() as client:
        await all_connected(client, running)
        places: dict[str, set[str]] = {}
        for session in range(12):
            for _ in range(3):
                asked = endless()
                asked.routing.session_id = f"session {session}"
                await eventually(lambda: not any(one.in_flight for one in running))
                async with aclosing(client.generate(asked, timeout=PATIENCE)) as stream:
                    await anext(stream)
                    [place] = [one.address for one in running if one.in_flight]
                    places.setdefault(asked.routing.session_id, set()).add(place)

    assert all(len(used) == 1 for used in places.values())
    assert len(set().union(*places.values())) > 1


async def test_feedback_reaches_the_router_that_gave_the_answer() -> None:
    async with routers(3) as (made, running), made.client() as client:
        await all_connected(client, running)
        answers = await asyncio.gather(*(collect(client, prompt(f"hello {n}")) for n in range(12)))

        for answer in answers:  # a router that does not know the request raises UnknownRequest
            await client.feedback(answer_id=answer.accepted.answer_id, ok=True)
            await client.feedback(answer.accepted.request_id, ok=True)


async def test_a_router_that_rejects_calls_does_not_attract_them() -> None:
    """It rejects them faster than the other one answers, so it always has fewer in flight."""
    async with routers(1) as (made, running), made.client() as client:
        broken = await made.start(tiers="only=127.0.0.1:1")
        made.published = [running[0].address, broken.address]

        answers = [await collect(client, prompt("hello")) for _ in range(30)]

    assert [answer.text for answer in answers] == ["hello"] * 30


async def test_while_the_name_server_is_down_the_known_addresses_are_used() -> None:
    async with routers(2) as (made, running), made.client() as client:
        await all_connected(client, running)
        made.published = socket.gaierror(socket.EAI_AGAIN, "temporary failure")
        asked = made.lookups
        while made.lookups < asked + 3:
            assert (await collect(client, prompt("hello"))).text == "hello"


async def test_a_call_waits_for_no_address_of_a_name_that_is_left_to_grpc(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as a name whose servers were replaced by one with an address of each family."""
    monkeypatch.setattr(endpoints, "URGENT_SECONDS", 0.01)
    published = ["127.0.0.1:1", "127.0.0.2:1"]  # nothing listens there

    async def find() -> list[str]:
        return list(published)

    found = endpoints.Endpoints(open_channel("127.0.0.1:1"), Caller, Spread(find, open_channel, 0.01))
    try:
        await found.wait()
        waiting = asyncio.create_task(found.reconnected())
        await asyncio.sleep(0)
        published.clear()

        async with asyncio.timeout(PATIENCE):
            await waiting
        assert (await found.wait()).address == "", "the channel that gRPC resolves"
    finally:
        await found.close()


async def test_an_idle_client_does_not_resolve() -> None:
    async with routers(1) as (made, _), made.client() as client:
        await collect(client, prompt("hello"))
        before = made.lookups

        await asyncio.sleep(0.3)  # six intervals
        assert made.lookups == before


async def test_a_name_that_does_not_resolve_is_reported_as_by_grpc() -> None:
    async with connect("dns:///no-such-router.invalid:50051", retries=0) as client:
        with pytest.raises(errors.Unavailable, match="no-such-router"):
            await client.list_tiers(timeout=PATIENCE)


async def test_a_deadline_covers_the_wait_for_addresses() -> None:
    async def find() -> list[str]:
        await asyncio.Event().wait()  # a name server that does not reply
        return []

    async with Client(open_channel("127.0.0.1:1"), spread=Spread(find, open_channel), retries=0) as client:
        with pytest.raises(errors.DeadlineExceeded, match="address"):
            await collect(client, prompt("hello"), timeout=0.05)


@pytest.mark.parametrize(
    ("found", "used"),
    [
        (["10.0.0.1"], {"10.0.0.1:50051"}),
        (["10.0.0.1", "10.0.0.2"], {"10.0.0.1:50051", "10.0.0.2:50051"}),
        (["::1"], {"[::1]:50051"}),
        (["10.0.0.1", "::1"], set()),  # one server with both: gRPC finds out which of them works
        (["10.0.0.1", "10.0.0.2", "::1", "::2"], {"10.0.0.1:50051", "10.0.0.2:50051"}),
    ],
)
async def test_each_server_counts_once(
    monkeypatch: pytest.MonkeyPatch, found: list[str], used: set[str]
) -> None:
    def addresses(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [
            (socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 50051))
            for one in found
        ]

    monkeypatch.setattr(socket, "getaddrinfo", addresses)

    assert await servers_of("router", "50051", open_channel).find() == used


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("router:50051", ("router", "50051")),
        ("dns:router:50051", ("router", "50051")),
        ("dns:///router.headrace.svc:50051", ("router.headrace.svc", "50051")),
        ("dns://10.0.0.1/router:50051", None),  # names its DNS server
        ("10.0.0.1:50051", None),
        ("dns:///10.0.0.1:50051", None),
        ("[::1]:50051", None),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", None),
        ("localhost:50051", None),
        ("unix:/tmp/socket", None),
        ("xds:///router", None),
        ("router", None),
        ("", None),
    ],
)
def test_only_names_in_dns_are_followed(target: str, name: tuple[str, str] | None) -> None:
    assert replicated_name(target) == name
    if name is not None and target.startswith("dns:"):
        assert dns_name(target) == name

"""Several workers per batcher and several batchers per worker; callers see none of their changes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from headrace import errors
from headrace.batcher.__main__ import batcher
from headrace.batcher.settings import Settings
from headrace.batcher.text.tokens import ByteTokenizer
from headrace.batcher.waiting.prefixes import block_names
from headrace.channel import open_channel
from headrace.cli.launch.mesh import reserved_ports
from headrace.client import connect
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1 import generation_pb2 as pb
from headrace.v1.admin_service_pb2_grpc import AdminServiceStub
from headrace.worker.__main__ import Worker, engine_loop, worker
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.flow.credit import IDLE_CREDIT
from headrace.worker.flow.step_pace import StepPace
from headrace.worker.settings import Settings as WorkerSettings
from tests.harness import PATIENCE, collect, eventually, prompt, running_worker
from tests.tier import OracleEngine, Trap, running_tier


async def test_work_is_spread_over_the_workers() -> None:
    go = threading.Event()

    class Blocked(EchoEngine):
        """Makes no step before it is released."""

        def step(self, rows):  # type: ignore[no-untyped-def]
            go.wait(PATIENCE)
            return super().step(rows)

    async with running_tier([Blocked(), Blocked(), Blocked()]) as tier:
        reading = [asyncio.create_task(collect(tier.client, prompt(f"n{n:02}" * 12))) for n in range(12)]
        await eventually(lambda: all(worker.streams.in_flight for worker in tier.workers))
        go.set()

        assert [(await answer).text for answer in reading] == [f"n{n:02}" * 12 for n in range(12)]


async def test_a_prompt_is_sent_to_the_worker_that_has_its_prefix_cached() -> None:
    async with running_tier([EchoEngine(), EchoEngine(), EchoEngine()]) as tier:
        common = "The same long instructions precede every question of this application. " * 6
        for question in range(6):
            await collect(tier.client, prompt(f"{common} {question}", max_tokens=1))
        frames = [sum(stream.frames for stream in worker.streams) for worker in tier.workers]

        assert sorted(frames)[:2] == [0, 0]


async def test_a_worker_that_evicted_a_prefix_is_assumed_to_have_evicted_older_ones() -> None:
    """Its cache holds two of the four prompts, and the least recently used are evicted."""
    engine = EchoEngine(context_length=512, max_running=1, kv_blocks=40)
    async with running_tier([engine]) as tier:
        (link,) = tier.batcher.coalescer.pool
        prefixes = tier.batcher.coalescer.prefixes
        texts = [letter * 260 for letter in "abcd"]
        names = [block_names(ByteTokenizer().encode_text(text)) for text in texts]
        for text in texts:
            await collect(tier.client, prompt(text, max_tokens=1))
        assert all(prefixes.cached_tokens(one, link.target) for one in names), (
            "the estimate before it is corrected"
        )

        again = await collect(tier.client, prompt(texts[1], max_tokens=1))
        assert again.finish.usage.cached_tokens < 256

        held = [prefixes.cached_tokens(one, link.target) for one in names]
        assert held == [0, 256, 256, 256]


async def test_cached_tokens_are_reported_for_answers_that_end_at_a_stop_text() -> None:
    async with running_tier([EchoEngine()]) as tier:
        asked = prompt("tell me again and again and again, the same long thing STOP", stop=["STOP"])
        first = await collect(tier.client, asked)
        second = await collect(tier.client, asked)

    assert second.finish.reason == pb.FINISH_REASON_STOP_SEQUENCE
    assert (first.finish.usage.cached_tokens, second.finish.usage.cached_tokens) == (0, 48)


async def test_a_cached_prompt_is_not_rejected_for_its_prefill_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StepPace, "prefill_rate", 100.0)  # tokens per second: 35 s for these prompts
    async with running_tier([EchoEngine()]) as tier:
        (link,) = tier.batcher.coalescer.pool
        known = "m" * 3500
        await collect(tier.client, prompt(known, max_tokens=1))
        await eventually(lambda: link.load.prefill_tokens_per_second > 0)

        with pytest.raises(errors.TtftUnattainable, match="first token"):
            await collect(tier.client, prompt("n" * 3500, max_tokens=1), timeout=10)
        # On a busy machine the deadline may still pass; the test is that the request is admitted.
        with suppress(errors.DeadlineInQueue, errors.DeadlineInDecode):
            answer = await collect(tier.client, prompt(known, max_tokens=1), timeout=10)
            assert answer.finish.usage.cached_tokens >= 3488


async def test_workers_join_and_leave_a_dns_name_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The addresses of a DNS name keep changing; every answer is complete and correct."""
    from headrace.runtime import discovery

    monkeypatch.setattr(discovery, "RESOLVE_SECONDS", 0.02)
    behind: set[str] = set()

    async def lookup(host: str, port: str) -> frozenset[str]:
        return frozenset(behind)

    async with (
        running_worker(OracleEngine(step_seconds=0.002)) as one,
        running_worker(OracleEngine(step_seconds=0.002)) as two,
        running_worker(OracleEngine(step_seconds=0.002)) as three,
    ):
        addresses = [f"127.0.0.1:{worker.server.port}" for worker in (one, two, three)]
        behind.update(addresses[:2])
        settings = Settings(port=0, tier="t", workers="dns:///pool:1", fake=True)
        async with batcher(settings, ByteTokenizer(), "b") as running:
            pool = running.coalescer.pool
            pool._discovery._lookup = lookup
            pool._discovery._resolve_seconds = 0.02
            await eventually(lambda: len(pool.ready()) == 2)
            async with connect(f"127.0.0.1:{running.server.port}", retries=0) as client:
                asked = prompt("steady", max_tokens=60, ignore_eos=True, seed=1)
                expected = (await collect(client, asked)).ids

                async def read() -> list[int]:
                    return (await collect(client, asked)).ids

                done = 0
                async with asyncio.TaskGroup() as tasks:
                    for turn in range(9):
                        reading = [tasks.create_task(read()) for _ in range(6)]
                        behind.add(addresses[(turn + 2) % 3])
                        behind.discard(addresses[turn % 3])
                        await asyncio.gather(*reading)
                        assert all(answer.result() == expected for answer in reading)
                        done += len(reading)
            assert done == 54
            await eventually(lambda: {link.target for link in pool} == behind)


async def test_a_name_without_addresses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(port=0, tier="t", workers="dns:///nobody.invalid:1", fake=True)
    async with (
        batcher(settings, ByteTokenizer(), "b") as running,
        connect(f"127.0.0.1:{running.server.port}", retries=0) as client,
    ):
        with pytest.raises(errors.NoWorkers, match=r"nobody\.invalid"):
            await collect(client, prompt("x"))


async def test_several_batchers_share_a_worker_and_its_queue_stays_short() -> None:
    async with running_worker(EchoEngine(max_running=4, step_seconds=0.002)) as worker:
        settings = Settings(port=0, tier="t", workers=f"127.0.0.1:{worker.server.port}", fake=True)
        async with (
            batcher(settings, ByteTokenizer(), "a") as one,
            batcher(settings, ByteTokenizer(), "b") as two,
            connect(f"127.0.0.1:{one.server.port}", retries=0) as first,
            connect(f"127.0.0.1:{two.server.port}", retries=0) as second,
        ):
            await eventually(lambda: one.coalescer.pool.ready() and two.coalescer.pool.ready())
            most = 0

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, worker.streams.in_flight)
                    await asyncio.sleep(0.001)

            watching = asyncio.create_task(watch())
            texts = [f"text {number:02} " * 3 for number in range(40)]
            answers = await asyncio.gather(
                *(collect((first, second)[n % 2], prompt(text)) for n, text in enumerate(texts))
            )
            watching.cancel()

            assert [answer.text for answer in answers] == texts
            # The worker's capacity is what runs plus the prompts of one step (here as many again). Only the
            # one sequence that an idle batcher may send comes on top. Reserves are part of the capacity, and
            # credit moves from one batcher to the other only after an acknowledgement, which follows all that
            # was sent under the old credit.
            assert most <= 4 + 4 + IDLE_CREDIT
            assert most > 4, "the capacity is used"


@asynccontextmanager
async def worker_on(port: int) -> AsyncGenerator[Worker, None]:
    """Run a worker on a given port that drains only briefly."""
    settings = WorkerSettings(port=port, engine="echo", drain_seconds=0.05)
    engine = OracleEngine(step_seconds=0.003)
    async with worker(settings, lambda: engine_loop(engine, settings), f"worker-{port}") as running:
        yield running


@pytest.fixture
def ports() -> Iterator[list[int]]:
    """Two ports that stay reserved for the test, with or without a listener."""
    with reserved_ports(2) as ports:
        yield ports


async def test_a_rolling_restart_of_workers_is_invisible_to_callers(ports: list[int]) -> None:
    """Under load each worker drains, hands its work back, and restarts as another process."""
    ups = [worker_on(port) for port in ports]
    workers = [await up.__aenter__() for up in ups]
    targets = ",".join(f"127.0.0.1:{port}" for port in ports)
    settings = Settings(port=0, tier="t", workers=targets, fake=True)
    async with (
        batcher(settings, ByteTokenizer(), "b") as running,
        connect(f"127.0.0.1:{running.server.port}", retries=0) as client,
    ):
        await eventually(lambda: len(running.coalescer.pool.ready()) == 2)
        asked = prompt("rolling", max_tokens=120, ignore_eos=True, seed=9)
        expected = (await collect(client, asked)).ids
        stop = False

        async def keep_asking() -> int:
            count = 0
            while not stop:
                assert (await collect(client, asked)).ids == expected
                count += 1
            return count

        callers = [asyncio.create_task(keep_asking()) for _ in range(6)]
        for number in (0, 1, 0, 1):
            await eventually(lambda: len(running.coalescer.pool.ready()) == 2)
            await eventually(lambda streams=workers[number].streams: streams.in_flight)  # type: ignore[misc]
            await ups[number].__aexit__(None, None, None)
            ups[number] = worker_on(ports[number])
            workers[number] = await ups[number].__aenter__()
        stop = True

        assert all(count >= 1 for count in await asyncio.gather(*callers))
    for up in ups:
        await up.__aexit__(None, None, None)


async def test_a_full_queue_sheds_the_lowest_priority_and_serves_the_rest_in_order(
    count: Callable[..., float],
) -> None:
    before = {reason: count("headrace.requests.refused", error=reason) for reason in ("SHED", "QUEUE_FULL")}
    stalls = count("headrace.credit.stalls", credit="worker")
    trap = Trap(2)
    async with running_tier([OracleEngine(max_running=1, drew=trap)], queue_limit=2) as tier:

        def asking(priority: int, tenant: str = "") -> asyncio.Task[Any]:
            asked = prompt(f"priority {priority}", max_tokens=4, ignore_eos=True, seed=1)
            asked.routing.CopyFrom(pb.Routing(priority=priority, tenant=tenant))
            return asyncio.create_task(collect(tier.client, asked))

        queue = tier.batcher.coalescer.queue
        running = [asking(5), asking(5)]  # one runs, one waits at the worker
        await trap.sprung.wait()
        await eventually(lambda: tier.workers[0].streams.in_flight == 2)
        low = asking(1)
        await eventually(lambda: len(queue) == 1)
        middle = asking(4)
        await eventually(lambda: len(queue) == 2)
        with pytest.raises(errors.Overloaded) as refused:
            await asking(1)
        assert type(refused.value) is errors.Overloaded
        high = asking(9)
        with pytest.raises(errors.Shed) as shed:
            await low
        assert shed.value.retry_after is not None
        # It has held its place since it arrived, and enters the queue once it is tokenised.
        await eventually(lambda: [job.priority for job in [queue.head(0.0)] if job] == [9])
        trap.open()

        for reading in (*running, middle, high):
            assert (await reading).tokens == 4
    assert {reason: count("headrace.requests.refused", error=reason) for reason in before} == {
        reason: value + 1 for reason, value in before.items()
    }
    assert count("headrace.credit.stalls", credit="worker") == stalls + 1, "until the first one ended"


async def test_a_deadline_that_cannot_be_met_is_rejected_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepPace, "prefill_rate", 100.0)  # tokens per second: 35 s for the long prompt
    async with running_tier([EchoEngine(step_seconds=0.05)], worker_settings={"step_tokens": 64}) as tier:
        (link,) = tier.batcher.coalescer.pool
        await collect(tier.client, prompt("m" * 500, max_tokens=1))
        await eventually(lambda: link.load.step_time.ToMilliseconds() >= 50)

        with pytest.raises(errors.TtftUnattainable, match="first token"):
            await collect(tier.client, prompt("m" * 3500, max_tokens=1), timeout=10)
        with pytest.raises(errors.DeadlineUnattainable, match="1000 tokens"):
            await collect(tier.client, prompt("m", max_tokens=1000, min_tokens=1000), timeout=10)
        assert (await collect(tier.client, prompt("m", max_tokens=4))).tokens == 1


async def test_the_debug_endpoints_show_queue_workers_and_sequences() -> None:
    trap = Trap(3)
    async with running_tier([OracleEngine(max_running=1, drew=trap)]) as tier:
        asked = prompt("hello", max_tokens=5, ignore_eos=True, seed=1)
        asked.routing.CopyFrom(pb.Routing(priority=7, tenant="acme"))
        asked.request_id = "seen"
        reading = [asyncio.create_task(collect(tier.client, asked)) for _ in range(3)]
        await trap.sprung.wait()
        await eventually(lambda: len(tier.batcher.coalescer.queue) == 1)
        await eventually(lambda: any(job.answer_length == 3 for job in tier.batcher.coalescer.live))
        async with (
            open_channel(f"127.0.0.1:{tier.batcher.server.port}") as batcher_channel,
            open_channel(f"127.0.0.1:{tier.workers[0].server.port}") as worker_channel,
        ):
            seen = (await AdminServiceStub(batcher_channel).Inspect(admin.InspectRequest())).batcher
            behind = (await AdminServiceStub(worker_channel).Inspect(admin.InspectRequest())).worker
            trap.open()

    assert [(place.priority, place.tenant, place.waiting) for place in seen.queue] == [(7, "acme", 1)]
    (worker,) = seen.workers
    assert (worker.state, worker.breaker, worker.outstanding, worker.credit.sequences) == (
        "ready",
        "closed",
        2,
        2,
    )
    assert {sequence.request_id for sequence in seen.sequences} == {"seen"}
    assert max(sequence.offset for sequence in seen.sequences) == 3
    assert sorted(bool(sequence.peer) for sequence in seen.sequences) == [False, True, True]
    assert (behind.in_flight, behind.streams[0].batcher_id, behind.streams[0].sequences) == (2, "b", 2)
    assert {sequence.peer for sequence in behind.sequences} == {"b"}
    assert behind.incarnation == worker.incarnation
    await asyncio.gather(*reading, return_exceptions=True)

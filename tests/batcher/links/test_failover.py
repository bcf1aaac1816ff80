"""A worker may die at any token without changing the answer that the caller reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from headrace import errors
from headrace.client import Client
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, Answer, collect, eventually, prompt
from tests.tier import OracleEngine, Tier, Trap, running_tier

TOKENS = 24

# What an answer may depend on besides its ids; each results in another answer to the same prompt.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0, "seed": 7},
    "penalties": {"seed": 3, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "logprobs": {"seed": 5, "logprobs": True},
    "stops": {"seed": 11, "stop": ["ba", "jjj", "e a", "- "]},
    "minimum": {"seed": 13, "min_tokens": 20},
}


def request(kind: str, **more: Any) -> pb.GenerateRequest:
    return prompt("what the oracle says", max_tokens=TOKENS, ignore_eos=True, **KINDS[kind], **more)


def same(left: Answer, right: Answer) -> None:
    """Assert that two answers are equal, byte for byte."""
    assert left.text == right.text
    assert left.ids == right.ids
    assert left.logprobs == right.logprobs
    assert left.finish.reason == right.finish.reason
    assert left.finish.stop_sequence == right.finish.stop_sequence
    assert left.finish.usage.completion_tokens == right.finish.usage.completion_tokens


@pytest.fixture(scope="module")
async def pair() -> AsyncGenerator[Tier, None]:
    """Two workers whose connections can be cut."""
    async with running_tier([OracleEngine(), OracleEngine()]) as tier:
        yield tier


async def whole(tier: Tier) -> None:
    """Wait until both workers are ready."""
    await eventually(lambda: len(tier.batcher.coalescer.pool.ready()) == 2)


async def cut(tier: Tier, trap: Trap) -> None:
    """Cut off the worker that *trap* stopped, after all that it sent has arrived."""
    if not tier.batcher.coalescer.live:
        trap.open()
        return
    (job,) = tier.batcher.coalescer.live
    attempt, serving = job.attempt, tier.serving
    await eventually(lambda: job.answer_length == trap.offset or job not in tier.batcher.coalescer.live)
    if job not in tier.batcher.coalescer.live:  # at a stop text the answer ends before the worker does
        trap.open()
        return
    tier.wires[serving].reset()
    # Both ends notice before it continues; otherwise its engine would run into the next trap.
    await eventually(lambda: job.attempt > attempt or job.inbox.closed)
    await eventually(lambda: not tier.workers[serving].streams.in_flight)
    trap.open()


async def interrupted(tier: Tier, asked: pb.GenerateRequest, *offsets: int) -> Answer:
    """Read the answer while its worker is cut off as it draws the token at each offset."""
    await whole(tier)
    traps = [Trap(offset) for offset in offsets]

    def drew(offset: int) -> None:
        for trap in traps:
            trap(offset)

    for engine in tier.engines:
        engine.drew = drew  # type: ignore[attr-defined]
    reading = asyncio.create_task(collect(tier.client, asked))
    for trap in traps:
        sprung = asyncio.create_task(trap.sprung.wait())
        await asyncio.wait({sprung, reading}, return_when=asyncio.FIRST_COMPLETED)
        if not trap.sprung.is_set():
            sprung.cancel()  # the answer ended before
            break
        await cut(tier, trap)
    answer = await reading
    for engine in tier.engines:
        engine.drew = None  # type: ignore[attr-defined]
    return answer


@pytest.mark.parametrize("kind", KINDS)
async def test_a_worker_lost_at_any_token_changes_nothing(pair: Tier, kind: str) -> None:
    expected = await collect(pair.client, request(kind))
    assert expected.tokens > 4

    for offset in range(expected.tokens + 1):
        answer = await interrupted(pair, request(kind), offset)

        same(answer, expected)
        if offset < expected.tokens and kind != "stops":
            assert answer.finish.usage.replayed_tokens == offset


async def test_a_seed_that_was_drawn_is_kept_across_workers(pair: Tier) -> None:
    asked = prompt("any seed", max_tokens=TOKENS, ignore_eos=True)
    answer = await interrupted(pair, asked, 9)

    asked.sampling.seed = answer.accepted.seed
    same(answer, await collect(pair.client, asked))


async def test_two_losses_are_hidden_and_the_replayed_tokens_are_counted(pair: Tier) -> None:
    expected = await collect(pair.client, request("sampled"))
    answer = await interrupted(pair, request("sampled"), 6, 15)

    same(answer, expected)
    assert answer.finish.usage.replayed_tokens == 6 + 15


async def test_a_third_loss_is_reported_and_the_caller_can_resume(pair: Tier) -> None:
    expected = await collect(pair.client, request("sampled"))
    with pytest.raises(errors.WorkerLost, match="resume") as caught:
        await interrupted(pair, request("sampled"), 3, 8, 13)
    assert caught.value.fields["attempts"] == "3"
    await whole(pair)

    resumed = request("sampled")
    resumed.resume.token_ids.extend(expected.ids[:10])
    rest = await collect(pair.client, resumed)
    assert expected.ids[10:] == rest.ids


async def test_tokens_that_came_with_a_request_do_not_count_in_latency_metrics(
    pair: Tier, count: Callable[..., float]
) -> None:
    """The first token of the rest is not the first of the answer, and a single new token has no TPOT."""
    booked = count("headrace.requests")
    expected = await collect(pair.client, request("sampled"))
    await eventually(lambda: count("headrace.requests") == booked + 1)
    firsts, paces = (f"gen_ai.server.time_{name}" for name in ("to_first_token", "per_output_token"))
    before = count(firsts), count(paces)

    for had in (expected.tokens - 1, expected.tokens - 2):
        resumed = request("sampled")
        resumed.resume.token_ids.extend(expected.ids[:had])
        rest = await collect(pair.client, resumed)
        assert rest.tokens == expected.tokens - had
        assert rest.finish.usage.completion_tokens == expected.tokens
    await eventually(lambda: count("headrace.requests") == booked + 3)

    assert count(firsts) == before[0]
    assert count(paces) - before[1] <= 1, "only for two new tokens that arrived separately"


async def test_a_caller_can_request_route_change_events(pair: Tier) -> None:
    asked = request("sampled")
    asked.stream.include_route_changes = True
    await whole(pair)
    trap = Trap(5)
    for engine in pair.engines:
        engine.drew = trap  # type: ignore[attr-defined]
    events: list[pb.GenerateResponse] = []

    async def read() -> None:
        async with aclosing(pair.client.generate(asked, timeout=90)) as stream:
            events.extend([event async for event in stream])

    reading = asyncio.create_task(read())
    await trap.sprung.wait()
    await cut(pair, trap)
    await reading
    for engine in pair.engines:
        engine.drew = None  # type: ignore[attr-defined]

    kinds = [event.WhichOneof("event") for event in events]
    assert kinds.count("route_change") == 1
    assert kinds[0] == "accepted"
    assert kinds[-1] == "finish"
    change = next(event.route_change for event in events if event.HasField("route_change"))
    assert (change.reason, change.attempt) == ("WORKER_LOST", 1)
    assert change.to == "worker"
    offset = 0
    for event in events:
        if event.HasField("delta"):
            assert event.delta.offset == offset
            offset += event.delta.token_count


async def test_the_same_worker_resumes_when_it_comes_back() -> None:
    trap = Trap(7)
    async with running_tier([OracleEngine(drew=trap)]) as tier:
        asked = request("sampled")
        reading = asyncio.create_task(collect(tier.client, asked))
        await trap.sprung.wait()
        tier.wires[0].cut()
        trap.open()
        await eventually(lambda: not tier.batcher.coalescer.pool.ready())
        await tier.wires[0].join()

        same(await reading, await collect(tier.client, asked))


async def test_answers_fail_if_no_worker_comes_back() -> None:
    async with running_tier([EchoEngine(step_seconds=0.01)], failover_seconds=0.3) as tier:
        reading = asyncio.create_task(collect(tier.client, prompt("x", max_tokens=900, ignore_eos=True)))
        await eventually(lambda: tier.workers[0].streams.in_flight)
        tier.wires[0].cut()

        with pytest.raises(errors.WorkerLost, match="no worker was ready"):
            await reading


async def killed_by(client: Client, text: str) -> errors.HeadraceError:
    with pytest.raises(errors.HeadraceError) as caught:
        await collect(client, prompt(text))
    return caught.value


async def test_a_prompt_that_kills_workers_stops_after_two_without_harming_others() -> None:
    """Of three workers the prompt reaches two. Requests in the same batch get their answers."""
    wires: list[Any] = []

    class Mortal(EchoEngine):
        """Appears dead from outside when it computes a prompt that starts with "poison"."""

        def step(self, rows):  # type: ignore[no-untyped-def]
            for row in rows:
                if row.start == 0 and bytes(id for id in row.ids[:6] if id < 256) == b"poison":
                    loop.call_soon_threadsafe(wires[engines.index(self)].cut)
                    dead.wait(0.3)  # nothing of this step is received
            return super().step(rows)

    import threading

    loop, dead = asyncio.get_running_loop(), threading.Event()
    engines = [Mortal(), Mortal(), Mortal()]
    async with running_tier(engines) as tier:
        wires.extend(tier.wires)
        bad = asyncio.create_task(killed_by(tier.client, "poison"))
        good = [asyncio.create_task(collect(tier.client, prompt(f"good {n} " * 9))) for n in range(12)]

        error = await bad
        assert isinstance(error, errors.PoisonRequest)
        assert error.fields["attempts"] == "2"
        assert [(await task).text for task in good] == [f"good {n} " * 9 for n in range(12)]


async def test_a_first_token_ends_probation_and_the_next_request_follows_immediately() -> None:
    """A worker dies with several uncomputed prompts. They are retried one after another, without waiting for
    complete answers."""
    import threading

    dead = threading.Event()

    class Mortal(EchoEngine):
        def step(self, rows):  # type: ignore[no-untyped-def]
            dead.wait(PATIENCE)
            return super().step(rows)

    async with running_tier([Mortal(), EchoEngine(step_seconds=0.01)]) as tier:
        pool = tier.batcher.coalescer.pool
        tier.wires[1].cut()
        await eventually(lambda: len(pool.ready()) == 1)
        asked = prompt("on and on", max_tokens=1000, ignore_eos=True)
        reading = [asyncio.create_task(collect(tier.client, asked)) for _ in range(6)]
        await eventually(lambda: tier.workers[0].streams.in_flight == 6)
        await tier.wires[1].join()
        await eventually(lambda: len(pool.ready()) == 2)
        tier.wires[0].cut()

        await eventually(lambda: tier.workers[1].streams.in_flight == 6)
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        dead.set()


class _Failing(EchoEngine):
    """Raises in its first steps."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    def step(self, rows):  # type: ignore[no-untyped-def]
        if self.failures:
            self.failures -= 1
            raise RuntimeError("out of memory")
        return super().step(rows)


async def test_a_request_with_an_engine_fault_is_retried_on_another_worker() -> None:
    async with running_tier([_Failing(99), EchoEngine()]) as tier:
        assert [(await collect(tier.client, prompt(f"try {n}"))).text for n in range(4)] == [
            f"try {n}" for n in range(4)
        ]


async def test_an_engine_fault_that_repeats_is_reported() -> None:
    async with running_tier([_Failing(2)]) as tier:
        with pytest.raises(errors.SequenceFault):
            await collect(tier.client, prompt("x"))
        assert (await collect(tier.client, prompt("again"))).text == "again"


async def test_a_stalled_worker_loses_its_sequences_and_its_late_tokens_do_not_count() -> None:
    """The connection stays open, as that of a stopped process does: silence is the only sign."""
    async with running_tier([OracleEngine(), OracleEngine()]) as tier:
        asked = prompt("long", max_tokens=150, ignore_eos=True, seed=3)
        expected = await collect(tier.client, asked)
        trap = Trap(20)
        for engine in tier.engines:
            engine.drew = trap  # type: ignore[attr-defined]
        reading = asyncio.create_task(collect(tier.client, asked))
        await trap.sprung.wait()
        (job,) = tier.batcher.coalescer.live
        await eventually(lambda: job.answer_length == trap.offset)
        frozen = tier.wires[tier.serving]
        frozen.freeze()
        trap.open()  # the worker sends the rest, which does not arrive
        answer = await reading
        frozen.thaw()

        same(answer, expected)
        assert answer.finish.usage.replayed_tokens > 0
        await eventually(lambda: not any(link.outstanding for link in tier.batcher.coalescer.pool))


async def test_a_worker_with_a_hanging_engine_loses_its_sequences() -> None:
    trap = Trap(40)
    async with running_tier([OracleEngine(drew=trap, step_seconds=0.005) for _ in range(2)]) as tier:
        asked = prompt("long", max_tokens=80, ignore_eos=True, seed=3)
        reading = asyncio.create_task(collect(tier.client, asked))
        await trap.sprung.wait()
        answer = await reading
        trap.open()

        same(answer, await collect(tier.client, asked))


async def test_the_answers_of_a_drained_worker_are_resumed_on_another() -> None:
    async with running_tier([OracleEngine(), OracleEngine()], worker_settings={"drain_seconds": 0.1}) as tier:
        asked = prompt("long", max_tokens=100, ignore_eos=True, seed=3)
        expected = await collect(tier.client, asked)
        traps = [Trap(20), Trap(20)]
        for engine, trap in zip(tier.engines, traps, strict=True):
            engine.drew = trap  # type: ignore[attr-defined]
        reading = [asyncio.create_task(collect(tier.client, asked)) for _ in range(6)]
        for trap in traps:
            await trap.sprung.wait()
        (first,) = (
            link for link in tier.batcher.coalescer.pool if link.target.endswith(f":{tier.wires[0].port}")
        )
        await eventually(lambda: any(job.answer_length for job in first.in_flight.jobs()))
        tier.workers[0].streams.stop_admitting()
        tier.workers[0].streams.hand_off()
        for trap in traps:
            trap.open()

        answers = await asyncio.gather(*reading)
        for answer in answers:
            same(answer, expected)
        assert any(answer.finish.usage.replayed_tokens for answer in answers)

"""A worker trusts no batcher: whatever one sends, the sequences of the others end as they should.

Peers here speak the contract by hand, over the real server; beside them works a real batcher.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from headrace import errors
from headrace.channel import open_channel
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub
from headrace.worker import allowance, service
from headrace.worker import stream as session
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.service import RUN
from headrace.worker.streams import Sessions
from tests.harness import PATIENCE, collect, eventually, prompt, running_worker
from tests.tier import Tier, running_tier

HELLO = wire.RunRequest(hello=wire.Hello(batcher_id="peer", epoch=1))


def sequence(handle: int, text: str = "hello", **sampling: Any) -> wire.Sequence:
    asked = pb.Sampling(**{"seed": 1, "max_tokens": 50, **sampling})
    return wire.Sequence(handle=handle, prompt_ids=list(text.encode()), sampling=asked)


def submit(*sequences: wire.Sequence) -> wire.RunRequest:
    return wire.RunRequest(submit=wire.Submit(batch_id=1, sequences=sequences))


class Peer:
    """One `Run` stream, spoken by hand."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.heard: list[wire.RunResponse] = []

    async def hello(self) -> wire.Welcome:
        await self.call.write(HELLO)
        return (await self.read("welcome")).welcome

    async def read(
        self, kind: str, *, until: Callable[[Any], bool] = lambda message: True
    ) -> wire.RunResponse:
        """The next message of a kind for which *until* holds."""
        async with asyncio.timeout(PATIENCE):
            async for response in self.call:
                self.heard.append(response)
                if response.WhichOneof("message") == kind and until(response):
                    return self.heard[-1]
        raise AssertionError(f"the stream ended without {kind}: {await self.call.code()}")

    async def credit(self, least: int) -> None:
        """Wait for so much credit."""
        await self.read("credit", until=lambda response: response.credit.sequences >= least)

    async def end(self) -> errors.HeadraceError | None:
        """Read to the end of the stream, and return its error."""
        try:
            async with asyncio.timeout(PATIENCE):
                async for response in self.call:
                    self.heard.append(response)
        except grpc.aio.AioRpcError as error:
            return errors.from_rpc_error(error)
        return None

    def deltas(self) -> list[wire.SequenceDelta]:
        return [delta for response in self.heard for delta in response.step.deltas]

    def verdicts(self) -> dict[int, wire.Verdict]:
        return {one.handle: one for response in self.heard for one in response.admission.verdicts}


@asynccontextmanager
async def dialled(port: int) -> AsyncGenerator[Peer, None]:
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call = WorkerServiceStub(channel).Run(timeout=PATIENCE)
        try:
            yield Peer(call)
        finally:
            call.cancel()


@pytest.fixture
async def tier() -> AsyncGenerator[Tier, None]:
    """A worker with an honest batcher."""
    async with running_tier([EchoEngine(max_running=8, step_seconds=0.002)]) as tier:
        yield tier


async def served(tier: Tier, count: int = 16) -> None:
    """Assert that the honest batcher's callers get their answers."""
    texts = [f"honest {number} " * 4 for number in range(count)]
    answers = await asyncio.gather(*(collect(tier.client, prompt(text)) for text in texts))
    assert [answer.text for answer in answers] == texts


def port_of(tier: Tier) -> int:
    return tier.workers[0].server.port


async def test_each_peer_that_says_hello_twice_gets_a_status_even_while_the_first_answer_is_written() -> None:
    async with running_worker(EchoEngine()) as worker:

        async def twice() -> errors.HeadraceError | None:
            async with dialled(worker.server.port) as peer:
                await peer.call.write(HELLO)
                await peer.call.write(HELLO)
                return await peer.end()

        ends = await asyncio.gather(*(twice() for _ in range(30)))

        assert Counter(type(end) for end in ends) == {errors.InvalidRequest: 30}


async def test_a_half_closed_stream_carries_what_was_submitted_to_its_end_and_ends_well() -> None:
    """Also with a window that nobody will acknowledge any more."""
    async with running_worker(EchoEngine(step_seconds=0.002)) as worker, dialled(worker.server.port) as peer:
        await peer.call.write(wire.RunRequest(hello=wire.Hello(batcher_id="peer", epoch=1, frame_window=1)))
        await peer.call.write(submit(*(sequence(handle, f"number {handle}") for handle in range(60))))
        await peer.call.done_writing()

        assert await peer.end() is None
        finished = Counter(delta.handle for delta in peer.deltas() if delta.finish)
        assert finished == Counter(range(60))
        for handle in range(60):
            said = [id for delta in peer.deltas() if delta.handle == handle for id in delta.token_ids]
            assert bytes(said).decode() == f"number {handle}"
        await eventually(lambda: not worker.sessions.streams)


async def test_a_stream_that_half_closes_at_once_ends_at_once() -> None:
    async with running_worker(EchoEngine()) as worker, dialled(worker.server.port) as peer:
        await peer.hello()
        await peer.call.done_writing()

        assert await peer.end() is None


async def test_a_stream_that_goes_beyond_its_credit_ends_and_no_neighbour_notices(tier: Tier) -> None:
    async with dialled(port_of(tier)) as peer:
        await peer.hello()
        greedy = [sequence(handle, "me first", ignore_eos=True, max_tokens=4000) for handle in range(20_000)]
        for one in greedy:
            one.priority = 9
        honest = asyncio.create_task(served(tier))
        await peer.call.write(submit(*greedy))
        error = await peer.end()
        await honest

    assert isinstance(error, errors.InvalidRequest)
    assert "beyond the credit" in error.message
    assert tier.workers[0].sessions.live == 0


async def test_credit_counts_what_has_ended_but_was_not_read() -> None:
    """Else a peer that reads nothing could have any number of answers kept for it."""
    async with running_worker(EchoEngine()) as worker, dialled(worker.server.port) as peer:
        await peer.call.write(wire.RunRequest(hello=wire.Hello(batcher_id="peer", epoch=1, frame_window=1)))
        welcome = (await peer.read("welcome")).welcome
        for handle in range(4 * welcome.credit.sequences):
            try:
                await peer.call.write(submit(sequence(handle, "x")))
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                break
        error = await peer.end()

    assert isinstance(error, errors.InvalidRequest)


BAD_SAMPLING: list[dict[str, Any]] = [
    {"temperature": math.nan},
    {"temperature": -1.0},
    {"temperature": math.inf},
    {"top_p": math.nan},
    {"top_p": 0.0},
    {"min_p": 2.0},
    {"repetition_penalty": math.nan},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": -3.0},
    {"presence_penalty": math.inf},
    {"frequency_penalty": math.nan},
    {"logit_bias": {4_000_000_000: 1.0}},
    {"logit_bias": {258: 1.0}},
    {"logit_bias": {1: math.nan}},
    {"logit_bias": {1: math.inf}},
    {"stop_token_ids": [4_000_000_000]},
    {"stop_token_ids": [258]},
    {"stop_token_ids": range(200)},
    {"max_tokens": 0},
]


async def test_a_sequence_with_impossible_sampling_is_refused_by_itself(tier: Tier) -> None:
    async with dialled(port_of(tier)) as peer:
        await peer.hello()
        for number, bad in enumerate(BAD_SAMPLING):
            await peer.call.write(submit(sequence(number, **bad)))
            await peer.read("admission")
        await peer.call.write(submit(sequence(1000, "good")))
        await peer.call.done_writing()
        honest = asyncio.create_task(served(tier))
        assert await peer.end() is None
        await honest

    refused = {handle: one for handle, one in peer.verdicts().items() if one.HasField("error")}
    assert set(refused) == set(range(len(BAD_SAMPLING)))
    assert {type(errors.from_status(one.error)) for one in refused.values()} == {errors.InvalidSampling}
    assert [delta.handle for delta in peer.deltas() if delta.finish] == [1000]


async def test_what_is_refused_takes_no_credit_from_what_is_sent_with_it(tier: Tier) -> None:
    async with dialled(port_of(tier)) as peer:
        await peer.hello()
        bad = [sequence(number, **sampling) for number, sampling in enumerate(BAD_SAMPLING)]
        await peer.call.write(submit(*bad[:9], sequence(1000, "good"), *bad[9:]))
        await peer.call.done_writing()
        assert await peer.end() is None

    assert sum(one.HasField("error") for one in peer.verdicts().values()) == len(BAD_SAMPLING)
    assert [delta.handle for delta in peer.deltas() if delta.finish] == [1000]


async def test_a_new_stream_beside_one_that_has_nothing_to_do_gets_more_than_a_knock(tier: Tier) -> None:
    async with dialled(port_of(tier)) as peer:
        await peer.hello()
        await peer.credit(2)


@pytest.mark.parametrize(
    "broken",
    [
        wire.Sequence(handle=1),
        wire.Sequence(handle=1, prompt_ids=[1], sampling=pb.Sampling(seed=1)),
        wire.Sequence(handle=1, prompt_ids=[2**32 - 1], sampling=pb.Sampling(seed=1, max_tokens=3)),
        wire.Sequence(handle=1, prompt_ids=[1] * 5000, sampling=pb.Sampling(seed=1, max_tokens=3)),
        wire.Sequence(
            handle=1, prompt_ids=[1], sampling=pb.Sampling(seed=1, max_tokens=3), prefix_scope=b"x" * 65
        ),
    ],
    ids=["no prompt", "no max_tokens", "unknown id", "too long", "long scope"],
)
async def test_a_sequence_that_cannot_be_computed_is_refused_by_itself(
    broken: wire.Sequence, tier: Tier
) -> None:
    async with dialled(port_of(tier)) as peer:
        await peer.hello()
        await peer.call.write(submit(broken))
        await peer.call.write(wire.RunRequest(cancel=wire.Cancel(handles=[1, 2, 3])))
        verdict = (await peer.read("admission")).admission.verdicts[0]
        assert verdict.state == wire.ADMISSION_STATE_REFUSED
        assert isinstance(errors.from_status(verdict.error), errors.InvalidRequest)
        await served(tier, 4)


async def test_a_name_or_trace_of_any_length_is_no_burden(tier: Tier) -> None:
    async with dialled(port_of(tier)) as peer:
        long = "x" * 100_000
        await peer.call.write(wire.RunRequest(hello=wire.Hello(batcher_id=long, epoch=1)))
        await peer.read("welcome")
        one = sequence(1, "named")
        one.request_id = one.trace.traceparent = one.trace.tracestate = long
        await peer.call.write(submit(one))
        await peer.read("step", until=lambda response: any(delta.finish for delta in response.step.deltas))

        names = [len(stream.batcher_id) for stream in tier.workers[0].sessions.streams]
        assert max(names) <= 128


async def test_pings_that_are_not_read_take_no_memory(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "OTHER_SECONDS", 0.0)  # else few of them would be read at all
    async with dialled(port_of(tier)) as peer:
        await peer.hello()
        (stream,) = (one for one in tier.workers[0].sessions.streams if one.batcher_id == "peer")
        most = 0
        for nonce in range(20_000):
            await peer.call.write(wire.RunRequest(ping=wire.Ping(nonce=nonce)))
            most = max(most, len(stream.others))
        assert most < 10
        await peer.read("pong", until=lambda response: response.pong.nonce == 19_999)
        await served(tier, 4)


async def test_a_stream_that_reads_nothing_of_its_answers_ends(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "UNREAD_BYTES", 2000)
    async with dialled(port_of(tier)) as peer:
        await peer.call.write(wire.RunRequest(hello=wire.Hello(batcher_id="peer", epoch=1, frame_window=1)))
        await peer.call.write(
            submit(sequence(1, "on and on", ignore_eos=True, max_tokens=4000, logprobs=True))
        )
        error = await peer.end()  # it reads, but acknowledges nothing
        await served(tier, 4)

    assert isinstance(error, errors.SlowReader)


async def test_idle_streams_keep_nothing_from_a_batcher_that_works(tier: Tier) -> None:
    (link,) = tier.batcher.coalescer.pool
    async with open_channel(f"127.0.0.1:{port_of(tier)}") as channel:
        calls = [WorkerServiceStub(channel).Run(timeout=PATIENCE) for _ in range(25)]
        for call in calls:
            await call.write(HELLO)
        sessions = tier.workers[0].sessions
        await eventually(lambda: len(sessions.streams) == 26)
        await served(tier, 60)

        assert link.credit.sequences >= sessions.capacity, "as if it were alone"
        for call in calls:
            call.cancel()


async def test_beyond_the_bound_a_new_stream_takes_the_place_of_an_idle_one() -> None:
    async with (
        running_tier([EchoEngine(step_seconds=0.002)], worker_settings={"max_streams": 3}) as tier,
        open_channel(f"127.0.0.1:{port_of(tier)}") as channel,
    ):
        answer = asyncio.create_task(collect(tier.client, prompt("honest", ignore_eos=True, max_tokens=900)))
        sessions: Sessions = tier.workers[0].sessions
        await eventually(lambda: sessions.live)
        peers = [Peer(WorkerServiceStub(channel).Run(timeout=PATIENCE)) for _ in range(5)]
        for peer in peers:
            await peer.hello()
        ended = [await peer.end() for peer in peers[:3]]

        assert len(sessions.streams) == 3
        assert {type(error) for error in ended} == {errors.Overloaded}
        assert (await answer).finish.usage.replayed_tokens == 0, "the batcher at work keeps its stream"
        for peer in peers:
            peer.call.cancel()


async def test_where_no_stream_is_idle_a_new_one_is_refused() -> None:
    async with (
        running_worker(EchoEngine(step_seconds=0.002), max_streams=1) as worker,
        dialled(worker.server.port) as busy,
        dialled(worker.server.port) as late,
    ):
        await busy.hello()
        await busy.call.write(submit(sequence(1, ignore_eos=True, max_tokens=4000)))
        await busy.read("step")
        await late.call.write(HELLO)
        error = await late.end()

    assert isinstance(error, errors.Overloaded)
    assert error.retry_after


async def test_streams_that_never_say_hello_are_bounded_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "HELLO_SECONDS", 0.2)
    async with (
        running_worker(EchoEngine(), max_streams=2) as worker,
        open_channel(f"127.0.0.1:{worker.server.port}") as channel,
    ):
        peers = [Peer(WorkerServiceStub(channel).Run(timeout=PATIENCE)) for _ in range(10)]
        ends = Counter([type(await peer.end()) for peer in peers])

        assert ends == {errors.InvalidRequest: 4, errors.Overloaded: 6}
        async with dialled(worker.server.port) as peer:
            await peer.hello()


async def test_bytes_that_are_no_message_end_the_stream_with_a_status() -> None:
    async with (
        running_worker(EchoEngine()) as worker,
        open_channel(f"127.0.0.1:{worker.server.port}") as channel,
    ):
        for messages in ([b"\xff\xff\xff"], [HELLO.SerializeToString(), b"\xff\xff\xff"]):
            method: Any = channel.stream_stream(RUN)
            call = method(iter(messages), timeout=PATIENCE)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            assert isinstance(errors.from_rpc_error(caught.value), errors.InvalidText)


async def test_a_task_of_the_stream_that_fails_ends_it_with_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever task it is: what nobody reports any more, nobody should wait for."""

    def fails(*_: Any) -> Any:
        raise RuntimeError("planned")

    for broken, name in ((Sessions, "load"), (session.Session, "news"), (Sessions, "_delta")):
        async with running_worker(EchoEngine()) as worker, dialled(worker.server.port) as peer:
            with monkeypatch.context() as patch:
                patch.setattr(broken, name, fails)
                await peer.call.write(HELLO)
                await peer.call.write(submit(sequence(1, "hello")))
                assert isinstance(await peer.end(), errors.InternalError)
            async with dialled(worker.server.port) as next_peer:
                await next_peer.hello()


async def test_a_peer_that_vanishes_in_the_middle_of_everything_leaves_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_worker(EchoEngine()) as worker:
        for _ in range(20):
            async with dialled(worker.server.port) as peer:
                await peer.call.write(HELLO)
                await peer.call.write(submit(sequence(1, "hello", ignore_eos=True, max_tokens=4000)))
                await peer.read("step")
        await eventually(lambda: not worker.sessions.streams)
        await eventually(lambda: not worker.sessions.load().running)

    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def test_a_stream_on_which_everything_is_urgent_does_not_starve_the_others(tier: Tier) -> None:
    """Within its credit a peer may send what it likes; the honest batcher is served beside it."""
    async with dialled(port_of(tier)) as peer:
        room = (await peer.hello()).credit.sequences
        answers = aiter(peer.call)
        stop = asyncio.Event()
        handles = 0

        async def flood() -> None:
            nonlocal handles, room
            held = 0
            while not stop.is_set():
                while held < room:
                    one = sequence(handles, "me first", ignore_eos=True, max_tokens=40)
                    one.priority = 9
                    await peer.call.write(submit(one))
                    handles, held = handles + 1, held + 1
                response = await anext(answers)
                if response.HasField("credit"):
                    room = response.credit.sequences
                    await peer.call.write(
                        wire.RunRequest(ack=wire.Ack(credit_generation=response.credit.generation))
                    )
                held -= sum(bool(delta.finish) for delta in response.step.deltas)

        flooding = asyncio.create_task(flood())
        await eventually(lambda: handles > 20)
        before = handles
        await served(tier, 30)
        during = handles - before
        stop.set()
        await flooding

    # 30 answers of 37 tokens beside a flood of 40 each: with equal shares about as many of either kind.
    assert during < 2 * 30

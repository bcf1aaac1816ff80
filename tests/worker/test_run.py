"""A worker trusts no batcher: whatever one sends, the sequences of the others are computed correctly.

The peers here write the contract's messages themselves, to a real server that also serves a real batcher.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest

from headrace import errors, statuses
from headrace.channel import open_channel
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub
from headrace.worker import service, stream
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.flow import allowance
from headrace.worker.service import RUN
from headrace.worker.streams import BatcherStreams
from tests.harness import PATIENCE, collect, eventually, prompt, running_worker
from tests.tier import Tier, running_tier
from tests.worker.peer import HELLO, Peer, bad_sampling, dialled, sequence, submit


@pytest.fixture
async def tier() -> AsyncGenerator[Tier, None]:
    """A worker with a well-behaved batcher."""
    async with running_tier([EchoEngine(max_running=8, step_seconds=0.002)]) as tier:
        yield tier


async def served(tier: Tier, count: int = 16) -> None:
    """Assert that the well-behaved batcher's callers get their answers."""
    texts = [f"regular {number} " * 4 for number in range(count)]
    answers = await asyncio.gather(*(collect(tier.client, prompt(text)) for text in texts))
    assert [answer.text for answer in answers] == texts


def port_of(tier: Tier) -> int:
    return tier.workers[0].server.port


async def test_each_peer_that_sends_hello_twice_gets_a_status_even_while_welcome_is_written() -> None:
    async with running_worker(EchoEngine()) as worker:

        async def twice() -> errors.HeadraceError | None:
            async with dialled(worker.server.port) as peer:
                await peer.call.write(HELLO)
                await peer.call.write(HELLO)
                return await peer.end()

        ends = await asyncio.gather(*(twice() for _ in range(30)))

        assert Counter(type(end) for end in ends) == {errors.InvalidRequest: 30}


async def test_a_half_closed_stream_finishes_its_sequences_and_ends_without_error() -> None:
    """Even with a window, which is no longer acknowledged."""
    async with running_worker(EchoEngine(step_seconds=0.002)) as worker, dialled(worker.server.port) as peer:
        await peer.call.write(wire.RunRequest(hello=wire.Hello(batcher_id="peer", epoch=1, frame_window=1)))
        await peer.call.write(submit(*(sequence(handle, f"number {handle}") for handle in range(60))))
        await peer.call.done_writing()

        assert await peer.end() is None
        finished = Counter(delta.handle for delta in peer.deltas() if delta.finish)
        assert finished == Counter(range(60))
        for handle in range(60):
            ids = [id for delta in peer.deltas() if delta.handle == handle for id in delta.token_ids]
            assert bytes(ids).decode() == f"number {handle}"
        await eventually(lambda: not worker.streams)


async def test_a_stream_that_half_closes_immediately_ends_immediately() -> None:
    async with running_worker(EchoEngine()) as worker, dialled(worker.server.port) as peer:
        await peer.hello()
        await peer.call.done_writing()

        assert await peer.end() is None


async def test_a_stream_that_exceeds_its_credit_ends_and_no_other_is_affected(tier: Tier) -> None:
    async with dialled(port_of(tier)) as peer:
        await peer.hello()
        greedy = [sequence(handle, "me first", ignore_eos=True, max_tokens=4000) for handle in range(20_000)]
        for one in greedy:
            one.priority = 9
        regular = asyncio.create_task(served(tier))
        await peer.call.write(submit(*greedy))
        error = await peer.end()
        await regular

    assert isinstance(error, errors.InvalidRequest)
    assert "beyond the credit" in error.message
    assert tier.workers[0].streams.in_flight == 0


async def test_sequences_that_have_ended_but_are_unread_count_against_credit() -> None:
    """Otherwise a peer that reads nothing could make the worker keep any number of answers."""
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


BAD_SAMPLING = bad_sampling(vocabulary=258)


async def test_a_sequence_with_invalid_sampling_is_refused_alone(tier: Tier) -> None:
    async with dialled(port_of(tier)) as peer:
        await peer.hello()
        for number, bad in enumerate(BAD_SAMPLING):
            await peer.call.write(submit(sequence(number, **bad)))
            await peer.read("admission")
        await peer.call.write(submit(sequence(1000, "good")))
        await peer.call.done_writing()
        regular = asyncio.create_task(served(tier))
        assert await peer.end() is None
        await regular

    refused = {handle: one for handle, one in peer.verdicts().items() if one.HasField("error")}
    assert set(refused) == set(range(len(BAD_SAMPLING)))
    assert {type(statuses.from_status(one.error)) for one in refused.values()} == {errors.InvalidSampling}
    assert [delta.handle for delta in peer.deltas() if delta.finish] == [1000]


async def test_refused_sequences_take_no_credit_from_others_of_the_same_message(tier: Tier) -> None:
    async with dialled(port_of(tier)) as peer:
        await peer.hello()
        bad = [sequence(number, **sampling) for number, sampling in enumerate(BAD_SAMPLING)]
        await peer.call.write(submit(*bad[:9], sequence(1000, "good"), *bad[9:]))
        await peer.call.done_writing()
        assert await peer.end() is None

    assert sum(one.HasField("error") for one in peer.verdicts().values()) == len(BAD_SAMPLING)
    assert [delta.handle for delta in peer.deltas() if delta.finish] == [1000]


async def test_a_new_stream_beside_an_idle_one_gets_more_than_the_idle_credit(tier: Tier) -> None:
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
async def test_a_sequence_that_cannot_be_computed_is_refused_alone(broken: wire.Sequence, tier: Tier) -> None:
    async with dialled(port_of(tier)) as peer:
        await peer.hello()
        await peer.call.write(submit(broken))
        await peer.call.write(wire.RunRequest(cancel=wire.Cancel(handles=[1, 2, 3])))
        verdict = (await peer.read("admission")).admission.verdicts[0]
        assert verdict.state == wire.ADMISSION_STATE_REFUSED
        assert isinstance(statuses.from_status(verdict.error), errors.InvalidRequest)
        await served(tier, 4)


async def test_names_and_traces_of_any_length_are_bounded(tier: Tier) -> None:
    async with dialled(port_of(tier)) as peer:
        long = "x" * 100_000
        await peer.call.write(wire.RunRequest(hello=wire.Hello(batcher_id=long, epoch=1)))
        await peer.read("welcome")
        one = sequence(1, "named")
        one.request_id = one.trace.traceparent = one.trace.tracestate = long
        await peer.call.write(submit(one))
        await peer.read("step", until=lambda response: any(delta.finish for delta in response.step.deltas))

        names = [len(one.batcher_id) for one in tier.workers[0].streams]
        assert max(names) <= 128


async def test_pongs_that_are_not_read_take_no_memory(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "OTHER_SECONDS", 0.0)  # otherwise only few of them would be read
    async with dialled(port_of(tier)) as peer:
        await peer.hello()
        (own,) = (one for one in tier.workers[0].streams if one.batcher_id == "peer")
        most = 0
        for nonce in range(20_000):
            await peer.call.write(wire.RunRequest(ping=wire.Ping(nonce=nonce)))
            most = max(most, len(own.others))
        assert most < 10
        await peer.read("pong", until=lambda response: response.pong.nonce == 19_999)
        await served(tier, 4)


async def test_a_stream_that_does_not_read_its_answers_ends(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "UNREAD_BYTES", 2000)
    async with dialled(port_of(tier)) as peer:
        await peer.call.write(wire.RunRequest(hello=wire.Hello(batcher_id="peer", epoch=1, frame_window=1)))
        await peer.call.write(
            submit(sequence(1, "on and on", ignore_eos=True, max_tokens=4000, logprobs=True))
        )
        error = await peer.end()  # it reads, but acknowledges nothing
        await served(tier, 4)

    assert isinstance(error, errors.SlowReader)


async def test_idle_streams_withhold_nothing_from_a_working_batcher(tier: Tier) -> None:
    (link,) = tier.batcher.coalescer.pool
    async with open_channel(f"127.0.0.1:{port_of(tier)}") as channel:
        calls = [WorkerServiceStub(channel).Run(timeout=PATIENCE) for _ in range(25)]
        for call in calls:
            await call.write(HELLO)
        streams = tier.workers[0].streams
        await eventually(lambda: len(streams) == 26)
        await served(tier, 60)

        assert link.credit.sequences >= streams.capacity, "as if it were alone"
        for call in calls:
            call.cancel()


async def test_above_the_limit_a_new_stream_replaces_an_idle_one() -> None:
    async with (
        running_tier([EchoEngine(step_seconds=0.002)], worker_settings={"max_batcher_streams": 3}) as tier,
        open_channel(f"127.0.0.1:{port_of(tier)}") as channel,
    ):
        answer = asyncio.create_task(collect(tier.client, prompt("regular", ignore_eos=True, max_tokens=900)))
        streams = tier.workers[0].streams
        await eventually(lambda: streams.in_flight)
        peers = [Peer(WorkerServiceStub(channel).Run(timeout=PATIENCE)) for _ in range(5)]
        for peer in peers:
            await peer.hello()
        ended = [await peer.end() for peer in peers[:3]]

        assert len(streams) == 3
        assert {type(error) for error in ended} == {errors.Overloaded}
        assert (await answer).finish.usage.replayed_tokens == 0, "the working batcher keeps its stream"
        for peer in peers:
            peer.call.cancel()


async def test_a_new_stream_is_rejected_if_no_stream_is_idle() -> None:
    async with (
        running_worker(EchoEngine(step_seconds=0.002), max_batcher_streams=1) as worker,
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


async def test_streams_that_never_send_hello_are_bounded_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "HELLO_SECONDS", 0.2)
    async with (
        running_worker(EchoEngine(), max_batcher_streams=2) as worker,
        open_channel(f"127.0.0.1:{worker.server.port}") as channel,
    ):
        peers = [Peer(WorkerServiceStub(channel).Run(timeout=PATIENCE)) for _ in range(10)]
        ends = Counter([type(await peer.end()) for peer in peers])

        assert ends == {errors.InvalidRequest: 4, errors.Overloaded: 6}
        async with dialled(worker.server.port) as peer:
            await peer.hello()


async def test_bytes_that_are_not_a_message_end_the_stream_with_a_status() -> None:
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
            assert isinstance(statuses.from_rpc_error(caught.value), errors.InvalidText)


async def test_a_task_of_the_stream_that_fails_ends_it_with_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever task it is: a batcher must not wait for what is no longer reported."""

    def fails(*_: Any) -> Any:
        raise RuntimeError("planned")

    for broken, name in (
        (BatcherStreams, "load"),
        (stream.BatcherStream, "take_messages"),
        (stream.BatcherStream, "add_update"),
    ):
        async with running_worker(EchoEngine()) as worker, dialled(worker.server.port) as peer:
            with monkeypatch.context() as patch:
                patch.setattr(broken, name, fails)
                await peer.call.write(HELLO)
                await peer.call.write(submit(sequence(1, "hello")))
                assert isinstance(await peer.end(), errors.InternalError)
            async with dialled(worker.server.port) as next_peer:
                await next_peer.hello()


async def test_a_peer_that_disconnects_during_a_step_causes_no_error_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_worker(EchoEngine()) as worker:
        for _ in range(20):
            async with dialled(worker.server.port) as peer:
                await peer.call.write(HELLO)
                await peer.call.write(submit(sequence(1, "hello", ignore_eos=True, max_tokens=4000)))
                await peer.read("step")
        await eventually(lambda: not worker.streams)
        await eventually(lambda: not worker.streams.load().running)

    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def test_a_stream_on_which_everything_is_urgent_does_not_starve_the_others(tier: Tier) -> None:
    """Within its credit a peer may send anything; the regular batcher is served beside it."""
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

    # 30 answers of about 43 tokens beside a flood of 40 each: equal shares give about as many of either kind.
    assert during < 2 * 30


async def test_log_probabilities_of_prompt_and_answer_arrive_before_and_with_the_tokens(tier: Tier) -> None:
    async with dialled(tier.workers[0].server.port) as peer:
        await peer.hello()
        await peer.call.write(
            submit(sequence(1, "hello", max_tokens=3, top_logprobs=2, prompt_logprobs=20, ignore_eos=True))
        )
        await peer.read("step", until=lambda response: any(one.finish for one in response.step.deltas))
        parts = [delta.prompt for delta in peer.deltas() if delta.HasField("prompt")]

    assert parts[0].offset == 1
    assert [value for part in parts for value in part.logprobs] == [0.0] * 4
    assert [top.ids[0] for part in parts for top in part.top] == list(b"ello")
    assert {len(top.ids) for part in parts for top in part.top} == {20}
    deltas = [delta for delta in peer.deltas() if delta.token_ids]
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
    assert [len(top.ids) for delta in deltas for top in delta.top] == [2, 2, 2]


@pytest.mark.parametrize("field", ["top_logprobs", "prompt_logprobs"])
async def test_more_of_the_most_likely_tokens_than_allowed_are_refused(field: str, tier: Tier) -> None:
    over: dict[str, Any] = {field: 21}
    most: dict[str, Any] = {field: 20}
    async with dialled(tier.workers[0].server.port) as peer:
        await peer.hello()
        await peer.call.write(submit(sequence(1, **over), sequence(2, **most)))
        await peer.read("admission")

    verdicts = peer.verdicts()
    assert verdicts[1].state == wire.ADMISSION_STATE_REFUSED
    assert "0 to 20" in verdicts[1].error.message
    assert verdicts[2].state != wire.ADMISSION_STATE_REFUSED

"""A worker with vLLM keeps the contract of `Run`, as one with our own engine does.

The peers write the contract's messages themselves, beside the stream of a real batcher.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from headrace import errors, statuses
from headrace.channel import open_channel
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub
from tests.harness import PATIENCE
from tests.vllm.conftest import CONTEXT, MAX_RUNNING, Served
from tests.worker.peer import HELLO, Peer, bad_sampling, dialled, sequence, submit

LONG = 700


@pytest.fixture
def port(served: Served) -> int:
    return served.worker.port


def endless(handle: int, text: str = "on and on", **sampling: Any) -> wire.Sequence:
    return sequence(handle, text, **{"temperature": 0.0, "ignore_eos": True, "max_tokens": LONG, **sampling})


def greedy(handle: int, text: str = "Once upon a time", **sampling: Any) -> wire.Sequence:
    return endless(handle, text, **{"max_tokens": 16, **sampling})


async def model(port: int) -> wire.ModelDescription:
    async with open_channel(f"127.0.0.1:{port}") as channel:
        return (await WorkerServiceStub(channel).GetModel(wire.GetModelRequest(), timeout=PATIENCE)).model


async def finished(peer: Peer, *handles: int) -> dict[int, wire.SequenceDelta]:
    """Read until all of *handles* have ended; return their last deltas."""
    while True:
        last = [delta for delta in peer.deltas() if delta.finish or delta.HasField("error")]
        ends = {delta.handle: delta for delta in last}
        assert len(ends) == len(last), "a handle ends once"
        if set(handles) <= set(ends):
            return ends
        await peer.read_any()


async def idle(peer: Peer) -> wire.Load:
    """Wait until the worker reports that it has no sequence and that all KV memory is free."""
    return (
        await peer.read(
            "load",
            until=lambda response: (
                not response.load.running
                and not response.load.waiting
                and response.load.kv_tokens_free == response.load.kv_tokens_total
            ),
        )
    ).load


def ids(peer: Peer, handle: int) -> list[int]:
    """Return the tokens of a sequence; check that they came in order."""
    found: list[int] = []
    for delta in peer.deltas():
        if delta.handle == handle:
            if delta.token_ids:
                assert delta.offset == len(found)
            found += delta.token_ids
    return found


async def test_the_model_is_described(port: int) -> None:
    described = await model(port)

    assert described.dtype == "float32"
    assert described.device == "cpu"
    assert described.context_length == CONTEXT
    assert described.max_running == MAX_RUNNING
    assert described.vocabulary_size == 49152
    assert described.kv_tokens >= CONTEXT
    assert described.shared_block_tokens > 0
    assert described.step_tokens == 512, "steps on a CPU are short"
    assert described.tokenizer_fingerprint
    assert described.weights_fingerprint
    assert described.determinism == wire.DETERMINISM_BEST_EFFORT, "EXACT is announced with --exact only"
    assert {"logprobs", "top_logprobs", "prompt_logprobs", "structured"} <= set(described.features)


async def test_a_sequence_streams_its_tokens_and_ends_with_usage_and_timing(port: int) -> None:
    async with dialled(port) as peer:
        welcome = await peer.hello()
        await peer.call.write(submit(greedy(7)))
        end = (await finished(peer, 7))[7]

    assert welcome.epoch == 1
    assert welcome.credit.sequences >= 1
    assert len(ids(peer, 7)) == 16
    assert end.finish == pb.FINISH_REASON_LENGTH
    assert end.usage.prompt_tokens == len("Once upon a time")
    assert end.usage.completion_tokens == 16
    assert end.usage.replayed_tokens == 0
    assert end.timing.prefill.ToNanoseconds() > 0
    assert end.timing.decode.ToNanoseconds() > 0
    steps = [response.step for response in peer.received if response.step.deltas]
    assert len(steps) >= 16, "tokens arrive step by step"
    frames = [response.step.frame for response in peer.received if response.HasField("step")]
    assert frames == list(range(1, len(frames) + 1))


async def test_a_sequence_with_invalid_sampling_is_refused_alone(port: int) -> None:
    bad = bad_sampling(vocabulary=49152)
    async with dialled(port) as peer:
        await peer.hello()
        for number, sampling in enumerate(bad):
            await peer.call.write(submit(sequence(number, **sampling)))
            await peer.read("admission")
        await peer.call.write(submit(greedy(1000)))
        await finished(peer, 1000)

    refused = {handle: one for handle, one in peer.verdicts().items() if one.HasField("error")}
    assert set(refused) == set(range(len(bad)))
    assert {type(statuses.from_status(one.error)) for one in refused.values()} == {errors.InvalidSampling}


@pytest.mark.parametrize(
    "broken",
    [
        wire.Sequence(handle=1),
        wire.Sequence(handle=1, prompt_ids=[1], sampling=pb.Sampling(seed=1)),
        wire.Sequence(handle=1, prompt_ids=[2**32 - 1], sampling=pb.Sampling(seed=1, max_tokens=3)),
        wire.Sequence(handle=1, prompt_ids=[1] * CONTEXT, sampling=pb.Sampling(seed=1, max_tokens=3)),
    ],
    ids=["no prompt", "no max_tokens", "unknown id", "too long"],
)
async def test_a_sequence_that_cannot_be_computed_is_refused_alone(broken: wire.Sequence, port: int) -> None:
    async with dialled(port) as peer:
        await peer.hello()
        await peer.call.write(submit(broken))
        verdict = (await peer.read("admission")).admission.verdicts[0]
        await peer.call.write(submit(greedy(2)))
        await finished(peer, 2)

    assert verdict.state == wire.ADMISSION_STATE_REFUSED


async def test_an_answer_ends_where_the_context_is_full(port: int) -> None:
    async with dialled(port) as peer:
        await peer.hello()
        await peer.call.write(submit(endless(1, "x" * (CONTEXT - 8), max_tokens=200)))
        end = (await finished(peer, 1))[1]

    assert end.finish == pb.FINISH_REASON_LENGTH
    assert len(ids(peer, 1)) == end.usage.completion_tokens == 8


async def test_a_stop_token_ends_the_answer_and_is_not_delivered(port: int) -> None:
    async with dialled(port) as peer:
        await peer.hello()
        await peer.call.write(submit(greedy(1)))
        await finished(peer, 1)
        whole = ids(peer, 1)
        last = next(id for id in whole[4:] if id not in whole[:4])
        await peer.call.write(submit(greedy(2, stop_token_ids=[last])))
        end = (await finished(peer, 2))[2]
        kept = whole.index(last)
        await peer.call.write(submit(greedy(3, stop_token_ids=[last], min_tokens=kept + 1)))
        await finished(peer, 3)

    assert ids(peer, 2) == whole[:kept]
    assert end.finish == pb.FINISH_REASON_STOP
    assert end.usage.completion_tokens == kept
    assert len(ids(peer, 3)) > kept
    assert last not in ids(peer, 3)[: kept + 1], "min_tokens forbids the stop token"


async def test_logprobs_of_tokens_of_the_likeliest_and_of_the_prompt(port: int) -> None:
    async with dialled(port) as peer:
        await peer.hello()
        await peer.submit(greedy(1, logprobs=True), greedy(2, top_logprobs=3, prompt_logprobs=2), greedy(3))
        await finished(peer, 1, 2, 3)
        deltas = {handle: [one for one in peer.deltas() if one.handle == handle] for handle in (1, 2, 3)}

    own = [value for one in deltas[1] for value in one.logprobs]
    top = [one for delta in deltas[2] for one in delta.top]
    assert len(own) == len(top) == 16
    assert all(value <= 0 for value in own)
    assert not [value for one in deltas[1] for value in one.top]
    assert not [value for one in deltas[3] for value in one.logprobs]
    assert [one.ids[0] for one in top] == ids(peer, 2), "a greedy token is the likeliest"
    assert {len(one.ids) for one in top} == {3}
    assert [value for one in deltas[2] for value in one.logprobs] == [one.logprobs[0] for one in top]
    parts = [one.prompt for one in deltas[2] if one.HasField("prompt")]
    assert parts[0].offset == 1
    assert sum(len(part.logprobs) for part in parts) == len("Once upon a time") - 1
    assert {len(one.ids) for part in parts for one in part.top} == {2}


async def test_a_cancelled_sequence_ends_and_its_memory_is_free(port: int) -> None:
    async with dialled(port) as peer:
        await peer.hello()
        await peer.submit(*(endless(handle) for handle in range(4)))
        await peer.read("step", until=lambda response: len(response.step.deltas) == 4)
        await peer.call.write(wire.RunRequest(cancel=wire.Cancel(handles=[0, 1, 2, 3, 99])))
        ends = await finished(peer, 0, 1, 2, 3)
        await idle(peer)

    assert {end.finish for end in ends.values()} == {pb.FINISH_REASON_CANCELLED}
    assert all(0 < end.usage.completion_tokens < LONG / 2 for end in ends.values())


async def test_a_sequence_past_its_deadline_ends_with_that_reason(port: int) -> None:
    late = endless(1)
    late.ttl.FromSeconds(3)
    gone = endless(2)
    gone.ttl.FromNanoseconds(1)
    async with dialled(port) as peer:
        await peer.hello()
        await peer.call.write(submit(late, gone))
        ends = await finished(peer, 1, 2)
        await idle(peer)

    assert {end.finish for end in ends.values()} == {pb.FINISH_REASON_DEADLINE}
    assert len(ids(peer, 1)) == ends[1].usage.completion_tokens < LONG
    assert ends[1].usage.completion_tokens > 0
    assert ids(peer, 2) == []


async def test_a_lost_stream_discards_its_sequences_and_its_handles_are_free_for_the_next(port: int) -> None:
    """A delta belongs to the stream, handle and attempt that it was computed for."""
    async with dialled(port) as peer:
        await peer.hello()
        await peer.call.write(submit(endless(1, "lost")))
        await peer.read("step", until=lambda response: bool(response.step.deltas))
    async with dialled(port) as peer:
        await peer.call.write(wire.RunRequest(hello=wire.Hello(batcher_id="peer", epoch=2)))
        welcome = (await peer.read("welcome")).welcome
        again = greedy(1)
        again.attempt = 2
        await peer.call.write(submit(again))
        await finished(peer, 1)
        await idle(peer)

    assert welcome.epoch == 2
    assert {delta.attempt for delta in peer.deltas()} == {2}
    assert len(ids(peer, 1)) == 16


async def test_a_half_closed_stream_finishes_its_sequences(port: int) -> None:
    count = 6
    async with dialled(port) as peer:
        await peer.hello()
        await peer.submit(*(greedy(handle, f"number {handle}") for handle in range(count)))
        await peer.call.done_writing()

        assert await peer.end() is None
    assert [len(ids(peer, handle)) for handle in range(count)] == [16] * count


async def test_a_stream_that_exceeds_its_credit_ends(port: int) -> None:
    async with dialled(port) as peer:
        await peer.hello()
        await peer.call.write(submit(*(endless(handle) for handle in range(2000))))
        error = await peer.end()
    async with dialled(port) as peer:
        await peer.hello()
        await idle(peer)

    assert isinstance(error, errors.InvalidRequest)
    assert "beyond the credit" in error.message


async def test_credit_grows_to_all_that_the_worker_has_for_one_batcher_that_works(port: int) -> None:
    async with dialled(port) as peer:
        await peer.hello()
        await peer.submit(*(greedy(handle, f"{handle} and so on") for handle in range(2 * MAX_RUNNING)))
        await finished(peer, *range(2 * MAX_RUNNING))

    assert max(response.credit.sequences for response in peer.received) > MAX_RUNNING


async def test_urgent_sequences_overtake_others_that_wait(port: int) -> None:
    """Priorities order what waits; what runs goes on."""
    async with dialled(port) as peer:
        await peer.hello()
        waiting = range(MAX_RUNNING, MAX_RUNNING + 6)
        regular = [greedy(handle, f"{handle} is patient", max_tokens=200) for handle in range(waiting.stop)]
        for one in regular:
            one.priority = 2
        urgent = [greedy(handle, f"{handle} is urgent", max_tokens=4) for handle in (100, 101)]
        for one in urgent:
            one.priority = 7
        await peer.submit(*regular)
        await peer.submit(*urgent)
        await finished(peer, *range(waiting.stop), 100, 101)

    first: dict[int, int] = {}
    for place, delta in enumerate(peer.deltas()):
        if delta.token_ids:
            first.setdefault(delta.handle, place)
    assert max(first[100], first[101]) < min(first[handle] for handle in waiting)


async def test_prefixes_are_cached_within_a_scope_alone(port: int) -> None:
    """No tenant can learn from `cached_tokens` or from latency what another has sent."""
    text = "a prompt that nobody else in this file sends, long enough for several blocks of memory. " * 2

    def scoped(handle: int, scope: bytes) -> wire.Sequence:
        one = greedy(handle, text, max_tokens=4)
        one.prefix_scope = scope
        return one

    async with dialled(port) as peer:
        await peer.hello()
        cached = []
        for handle, scope in enumerate((b"acme", b"acme", b"other", b"", b"acme")):
            await peer.call.write(submit(scoped(handle, scope)))
            cached.append((await finished(peer, handle))[handle].usage.cached_tokens)
        block = (await model(port)).shared_block_tokens

    assert cached[0] == cached[2] == cached[3] == 0
    assert cached[1] == cached[4] == (len(text) - 1) // block * block
    answers = {tuple(ids(peer, handle)) for handle in range(5)}
    assert len(answers) == 1, "a cached prefix changes no token"


async def test_a_resumed_sequence_continues_after_its_tokens(port: int) -> None:
    async with dialled(port) as peer:
        await peer.hello()
        await peer.call.write(submit(greedy(1, min_tokens=12)))
        await finished(peer, 1)
        whole = ids(peer, 1)
        again = greedy(2, min_tokens=12)
        again.resume_ids.extend(whole[:10])
        await peer.call.write(submit(again))
        end = (await finished(peer, 2))[2]

    deltas = [delta for delta in peer.deltas() if delta.handle == 2 and delta.token_ids]
    assert deltas[0].offset == 10
    assert [id for delta in deltas for id in delta.token_ids] == whole[10:]
    assert end.usage.replayed_tokens == 10
    assert end.usage.completion_tokens == 16


async def test_pings_are_answered_while_the_engine_computes(port: int) -> None:
    async with dialled(port) as peer:
        await peer.hello()
        await peer.call.write(submit(endless(1)))
        await peer.read("step")
        await peer.call.write(wire.RunRequest(ping=wire.Ping(nonce=5)))

        assert (await peer.read("pong")).pong.nonce == 5


async def test_the_load_counts_sequences_and_memory(port: int) -> None:
    async with dialled(port) as peer:
        await peer.hello()
        await peer.submit(*(endless(handle, f"{handle} " * 20) for handle in range(3)))
        load = (
            await peer.read(
                "load", until=lambda response: response.load.running == 3 and response.load.tokens_per_second
            )
        ).load

    assert load.kv_tokens_total == (await model(port)).kv_tokens
    assert load.kv_tokens_free <= load.kv_tokens_total - 3 * 32
    assert load.step_time.ToNanoseconds() > 0


async def test_two_streams_share_the_worker(port: int) -> None:
    async with dialled(port) as one, dialled(port) as two:
        for peer in (one, two):
            await peer.call.write(HELLO)
            await peer.read("welcome")
            await peer.call.write(submit(greedy(1)))
        await asyncio.gather(finished(one, 1), finished(two, 1))

    assert ids(one, 1) == ids(two, 1)

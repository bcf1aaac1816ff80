"""Attacks with valid but abusive calls: Run, Feedback, sessions, Watch."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable

import grpc
from grpc_health.v1 import health_pb2

from headrace.channel import open_channel
from headrace.client import chat
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1 import worker_service_pb2 as wire
from headrace.v1.routing_service_pb2_grpc import RoutingServiceStub
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub
from tests.hostile.attack import Attack, attack
from tests.hostile.wire import GENERATE, headers, message, peer

HELLO = wire.RunRequest(hello=wire.Hello(batcher_id="hostile", epoch=1, frame_window=4, acks_credit=True))


async def _run_stream(
    run: Attack,
    channel: grpc.aio.Channel,
    requests: Iterable[wire.RunRequest],
    *,
    reads: bool,
    seconds: float,
) -> None:
    """Open a Run stream, send *requests*, and keep it open for *seconds*."""

    async def sent() -> AsyncIterator[wire.RunRequest]:
        for request in requests:
            yield request
        await asyncio.sleep(seconds)

    call = WorkerServiceStub(channel).Run(sent(), timeout=seconds + 3)
    try:
        async with asyncio.timeout(seconds + 2):
            if reads:
                async for response in call:
                    run.outcomes[f"read {response.WhichOneof('message')}"] += 1
            run.outcomes[(await call.code()).name] += 1
    except grpc.aio.AioRpcError as error:
        # If a stream ends while grpc.aio writes to it, the client gets INTERNAL, whatever the server sent.
        cut = error.details() == "Internal error from Core"
        run.outcomes["cut" if cut else error.code().name] += 1
    except TimeoutError:
        run.outcomes["open"] += 1
    finally:
        call.cancel()


def _sequence(handle: int, **changes: object) -> wire.Sequence:
    made = wire.Sequence(handle=handle, request_id="h", attempt=1, prompt_ids=[72, 105], priority=9)
    made.sampling.seed = 1
    made.sampling.max_tokens = 64
    for name, value in changes.items():
        setattr(made.sampling, name, value)
    return made


def _submit(*sequences: wire.Sequence) -> wire.RunRequest:
    return wire.RunRequest(submit=wire.Submit(batch_id=1, sequences=sequences))


@attack
async def idle_run_streams(run: Attack) -> None:
    """Open 200 Run streams that send a hello and nothing else."""
    async with open_channel(f"127.0.0.1:{run.port}") as channel:
        await asyncio.gather(*(_run_stream(run, channel, [HELLO], reads=True, seconds=1) for _ in range(200)))


@attack
async def urgent_sequences_beyond_credit(run: Attack) -> None:
    """Submit 20,000 sequences of the highest priority, far beyond the stream's credit."""
    submits = [_submit(*(_sequence(n * 500 + k) for k in range(500))) for n in range(40)]
    async with open_channel(f"127.0.0.1:{run.port}") as channel:
        await _run_stream(run, channel, [HELLO, *submits], reads=True, seconds=1)


@attack
async def sequences_that_cannot_be(run: Attack) -> None:
    """Submit ids beyond the vocabulary, NaN and tiny numbers, empty prompts, equal handles."""
    far = _sequence(1)
    far.sampling.logit_bias[4_000_000_000] = 5.0
    beyond = _sequence(1)
    beyond.prompt_ids.append(4_000_000_000)
    empty = _sequence(1)
    del empty.prompt_ids[:]
    odd = [
        far,
        beyond,
        empty,
        _sequence(1, temperature=math.nan),
        _sequence(1, temperature=math.inf),
        _sequence(1, repetition_penalty=1e-39),
        _sequence(1, top_p=-1.0),
        _sequence(1, max_tokens=2**31),
        wire.Sequence(),
    ]
    async with open_channel(f"127.0.0.1:{run.port}") as channel:
        await asyncio.gather(
            *(_run_stream(run, channel, [HELLO, _submit(one)], reads=True, seconds=1) for one in odd),
            _run_stream(run, channel, [HELLO, _submit(_sequence(1), _sequence(1))], reads=True, seconds=1),
        )


@attack
async def run_out_of_order(run: Attack) -> None:
    """Send no hello, two hellos, a hello of 100 kB, or unknown messages; the status must arrive."""
    named = wire.RunRequest(hello=wire.Hello(batcher_id='x\n{"level": "CRITICAL"}' * 5000, epoch=1))
    beginnings = [
        [_submit(_sequence(1))],
        [HELLO, HELLO],
        [HELLO, _submit(_sequence(1)), HELLO],
        [named],
        [wire.RunRequest()],
        [HELLO, wire.RunRequest(), wire.RunRequest(ack=wire.Ack(frame=2**60, credit_generation=2**60))],
        [HELLO, wire.RunRequest(cancel=wire.Cancel(handles=range(50_000)))],
    ]
    async with open_channel(f"127.0.0.1:{run.port}") as channel:
        await asyncio.gather(
            *(
                _run_stream(run, channel, begins, reads=True, seconds=1)
                for begins in beginnings
                for _ in range(5)
            )
        )


@attack
async def unread_pings(run: Attack) -> None:
    """Send 20,000 pings on each of four streams and do not read the answers."""
    pings = [wire.RunRequest(ping=wire.Ping(nonce=n)) for n in range(20_000)]
    async with open_channel(f"127.0.0.1:{run.port}") as channel:
        await asyncio.gather(
            *(_run_stream(run, channel, [HELLO, *pings], reads=False, seconds=1) for _ in range(4))
        )


@attack
async def feedback_without_end(run: Attack) -> None:
    """Send feedback on unknown requests, and repeatedly on a known one."""
    async with open_channel(f"127.0.0.1:{run.port}") as channel:
        stub = RoutingServiceStub(channel)
        while not run.over:
            calls = [
                stub.Feedback(
                    routing.FeedbackRequest(
                        request_id=f"fuzz-{run.rng.randrange(50)}", ok=True, tier="large"
                    ),
                    timeout=5,
                )
                for _ in range(50)
            ]
            for code in await asyncio.gather(*(call.code() for call in calls)):
                run.outcomes[code.name] += 1


@attack
async def sessions_without_end(run: Attack) -> None:
    """Send each request with a new, long session id."""
    async with peer(run.port, source=run.source) as one:
        while not run.over and not one.closed.is_set():
            streams = []
            for _ in range(50):
                made = chat("x", max_tokens=1)
                made.routing.tenant = "hostile"
                made.routing.session_id = f"{run.rng.getrandbits(64)}" * 5
                streams.append(await one.call(headers(GENERATE), message(made.SerializeToString())))
            await one.answered(streams)
            run.count(one, streams)


@attack
async def watchers(run: Attack) -> None:
    """Watch the health of 2,000 services, each with its own name."""
    async with peer(run.port, source=run.source) as one:
        streams = []
        for number in range(2_000):
            if one.closed.is_set():
                break
            asked = health_pb2.HealthCheckRequest(service=f"service-{number}" * 20)
            body = message(asked.SerializeToString())
            streams.append(await one.call(headers("/grpc.health.v1.Health/Watch", timeout="1S"), body))
        await one.answered(streams, seconds=6)
        run.count(one, streams)

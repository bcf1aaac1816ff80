"""Invalid replies of a batcher make it unhealthy or its stream lost; the request ends correctly."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from headrace import errors
from headrace.client import chat
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing
from tests.harness import PATIENCE, collect, eventually, prompt
from tests.router.fake_batchers import FakeBatcher, routed
from tests.router.rogue import ACCEPTED, FINISH, InvalidBatcher, delta, event


@pytest.mark.parametrize(
    ("listed", "problem"),
    [
        (routing.ListTiersResponse(), "names no tier"),
        (
            routing.ListTiersResponse(tiers=[routing.Tier(healthy=True), routing.Tier(healthy=True)]),
            "names 2 tiers",
        ),
        (routing.ListTiersResponse(tiers=[routing.Tier(healthy=True, model="m" * 300)]), "a model of 300"),
        (routing.ListTiersResponse(tiers=[routing.Tier(healthy=True, name="n" * 300)]), "a name of 300"),
        (routing.ListTiersResponse(bill=pb.Bill()), "names no tier"),
    ],
)
async def test_a_malformed_list_of_tiers_makes_only_that_batcher_unhealthy(
    listed: routing.ListTiersResponse, problem: str
) -> None:
    fake = FakeBatcher()
    async with routed({"poll_seconds": 0.02}, small=fake, large=FakeBatcher()) as client:
        fake.listed = listed
        async with asyncio.timeout(PATIENCE):
            while (await client.list_tiers()).tiers[0].healthy:
                await asyncio.sleep(0.01)
        seen = (await client.list_tiers()).tiers
        answer = await collect(client, chat("Hi!"))
        fake.listed = None
        async with asyncio.timeout(PATIENCE):
            while not (await client.list_tiers()).tiers[0].healthy:
                await asyncio.sleep(0.01)

    assert problem in seen[0].unhealthy_reason
    assert seen[1].healthy
    assert answer.accepted.tier == "large"


async def test_sums_of_counts_are_limited_to_a_uint32() -> None:
    most = 2**32 - 1
    tier = routing.Tier(
        healthy=True,
        limits=routing.TierLimits(queue_limit=most, max_running=most),
        load=routing.TierLoad(queued=most - 1, running=most, tokens_per_second=math.nan),
    )
    tier.load.oldest_wait.seconds = -5
    listed = routing.ListTiersResponse(tiers=[tier])
    async with routed(only=[FakeBatcher(listed=listed), FakeBatcher(listed=listed)]) as client:
        (seen,) = (await client.list_tiers()).tiers
        answer = await collect(client, chat("Hi!"))

    assert seen.load.queued == seen.limits.queue_limit == most
    assert seen.load.tokens_per_second == 0
    assert seen.load.oldest_wait.ToNanoseconds() == 0
    assert answer.finish.reason == pb.FINISH_REASON_STOP


async def test_a_peer_that_does_not_implement_list_tiers_is_unhealthy_immediately() -> None:
    """Another kind of server at the address replies immediately; that is not silence."""

    @dataclass
    class Other(FakeBatcher):
        other: bool = False

        async def ListTiers(self, request: object, context: object) -> routing.ListTiersResponse:
            if self.other:
                raise errors.Unimplemented("no such method")
            return await super().ListTiers(request, context)

    fake = Other()
    async with routed({"poll_seconds": 0.02, "stall_seconds": 3600}, only=fake) as client:
        fake.other = True
        async with asyncio.timeout(PATIENCE):
            while (await client.list_tiers()).tiers[0].healthy:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "script",
    [
        [],
        [delta(0), FINISH],
        [FINISH],
        [event()],
        [event(route_change=pb.RouteChange(to="elsewhere"))],
        [event(accepted=pb.Accepted(model="m" * 300)), FINISH],
    ],
)
async def test_an_invalid_first_event_moves_the_request_to_another_batcher(
    script: list[pb.GenerateResponse],
) -> None:
    async with routed(only=[InvalidBatcher(script=script), FakeBatcher(running=9)]) as client:
        answer = await collect(client, prompt("abc"))

    assert answer.text == "abc"


@pytest.mark.parametrize(
    "script",
    [
        [ACCEPTED, ACCEPTED],
        [ACCEPTED, delta(5)],
        [ACCEPTED, delta(0), delta(0)],
        [ACCEPTED, delta(0, token_count=2)],
        [ACCEPTED, delta(0, logprobs=[-1.0, -2.0])],
        [ACCEPTED, delta(0), delta(1, token_count=0, token_ids=[]), delta(1)],
        [ACCEPTED, event(finish=pb.Finish())],
        [ACCEPTED, event(finish=pb.Finish(reason=pb.FINISH_REASON_CANCELLED))],
        [ACCEPTED, event(route_change=pb.RouteChange(attempt=2**32 - 1))],
        [ACCEPTED, *(delta(place) for place in range(9))],
        [ACCEPTED, delta(0)],
    ],
)
async def test_an_answer_resumes_elsewhere_after_an_invalid_event(
    script: list[pb.GenerateResponse],
) -> None:
    rogue, other = InvalidBatcher(script=script), FakeBatcher(running=9)
    async with routed(only=[rogue, other]) as client:
        answer = await collect(client, prompt("aaaaaaaa", max_tokens=8))

    assert answer.text == "aaaaaaaa"
    assert len(rogue.requests) == len(other.requests) == 1


class Garbage(grpc.GenericRpcHandler):
    """Answers each request with bytes that are not a message, and each poll too once it is `broken`."""

    broken = False

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        async def list_tiers(request: bytes, context: Any) -> bytes:
            first = routing.ListTiersResponse(tiers=[routing.Tier(healthy=True)])
            return first.SerializeToString() if not self.broken else b"\xff\xff\xff"

        async def generate(request: bytes, context: Any) -> AsyncIterator[bytes]:
            yield ACCEPTED.SerializeToString()
            yield b"\xff\xff\xff"

        if call.method.endswith("Multiplex"):
            return None
        if call.method.endswith("ListTiers"):
            return grpc.unary_unary_rpc_method_handler(list_tiers)
        return grpc.unary_stream_rpc_method_handler(generate)


async def test_bytes_that_are_not_a_message_lose_the_batcher() -> None:
    server = grpc.aio.server()
    garbage = Garbage()
    server.add_generic_rpc_handlers((garbage,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with routed(
            {"poll_seconds": 0.05}, small=f"127.0.0.1:{port}", large=FakeBatcher(model="large")
        ) as client:
            with pytest.raises(errors.BatcherLost):
                await collect(client, prompt("x"))
            garbage.broken = True
            async with asyncio.timeout(PATIENCE):
                while (await client.list_tiers()).tiers[0].healthy:
                    await asyncio.sleep(0.01)
            answer = await collect(client, prompt("x"))
    finally:
        await server.stop(None)

    assert answer.accepted.tier == "large"


@pytest.mark.parametrize("more", [[FINISH], [delta(1)], [ACCEPTED], [event()], []])
async def test_events_after_the_finish_are_ignored(more: list[pb.GenerateResponse]) -> None:
    rogue = InvalidBatcher(script=[ACCEPTED, delta(0), FINISH, *more], lingers=True, multiplexes=False)
    async with routed(only=rogue) as client:
        answer = await collect(client, prompt("a"))
        await eventually(lambda: rogue.left == 1)

    assert answer.text == "a"


async def test_a_finish_reason_of_a_newer_batcher_reaches_the_caller() -> None:
    unknown = max(pb.FinishReason.values()) + 1
    finish = pb.Finish(reason=unknown)  # type: ignore[arg-type] # not of this version
    script = [ACCEPTED, delta(0), event(finish=finish)]
    async with routed(only=InvalidBatcher(script=script)) as client:
        answer = await collect(client, prompt("a"))

    assert (answer.text, answer.finish.reason) == ("a", unknown)


async def test_implausible_numbers_do_not_change_the_bill() -> None:
    most = 2**32 - 1
    finish = pb.Finish(
        reason=pb.FINISH_REASON_STOP,
        stop_sequence="x" * 1000,
        usage=pb.Usage(
            prompt_tokens=most,
            cached_tokens=most,
            completion_tokens=most,
            replayed_tokens=most,
            wasted_tokens=most,
        ),
        bill=pb.Bill(charges=[pb.Charge(tier="only", prompt_tokens=2**64 - 1) for _ in range(3)]),
    )
    finish.timing.first_token.seconds = -1
    finish.timing.decode.seconds = 2**62
    accepted = pb.Accepted(request_id="another", model="echo", prompt_tokens=most, seed=5, score=math.nan)
    script = [event(accepted=accepted), delta(0), event(finish=finish)]
    request = prompt("a", seed=7)
    request.request_id = "mine"
    async with routed({"prices": "only=1/2"}, only=InvalidBatcher(script=script)) as client:
        for _ in range(3):
            answer = await collect(client, request)
        bill = (await client.list_tiers()).bill

    assert (answer.accepted.request_id, answer.accepted.seed) == ("mine", 7)
    assert 0 <= answer.accepted.score <= 1
    assert answer.finish.usage.completion_tokens == 1
    assert not answer.finish.stop_sequence
    assert not answer.finish.timing.ListFields()
    assert [(charge.tier, charge.completion_tokens) for charge in bill.charges] == [("only", 3)]

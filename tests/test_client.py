"""The client retries what is safe to retry, within its budget, and cancels the calls that it abandons."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import pytest

from headrace import errors
from headrace.client import Client, chat, connect
from headrace.retries import RetryBudget
from headrace.runtime.serving.server import serving
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_service_pb2
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1.generation_service_pb2_grpc import add_GenerationServiceServicer_to_server
from headrace.v1.routing_service_pb2_grpc import (
    RoutingServiceServicer,
    add_RoutingServiceServicer_to_server,
)
from tests.harness import PATIENCE, collect, eventually
from tests.multiplexed import MultiplexedServicer


class Flaky(MultiplexedServicer):
    """Fails its first calls, before or after the first event."""

    def __init__(self, failures: int, *, after_accepted: bool = False) -> None:
        self.failures = failures
        self.after_accepted = after_accepted
        self.calls = 0
        self.cancelled = 0

    async def Generate(
        self, request: pb.GenerateRequest, context: object
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.calls += 1
        failing = self.calls <= self.failures
        if failing and not self.after_accepted:
            raise errors.Draining("try again", retry_after=0.01)
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id="r"))
        if failing:
            raise errors.WorkerLost("gone")
        if request.prompt == "wait":
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        yield pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_STOP))


@asynccontextmanager
async def calling(
    servicer: MultiplexedServicer, *, retries: int = 2, patience: float = 30.0
) -> AsyncGenerator[Client, None]:
    def register(server: grpc.aio.Server) -> None:
        add_GenerationServiceServicer_to_server(servicer, server)
        if isinstance(servicer, RoutingServiceServicer):
            add_RoutingServiceServicer_to_server(servicer, server)

    services = generation_service_pb2.DESCRIPTOR.services_by_name.values()
    async with (
        serving(register, services, host="127.0.0.1", port=0, drain_seconds=0, ready=lambda: True) as server,
        connect(f"127.0.0.1:{server.port}", retries=retries, patience=patience) as client,
    ):
        yield client


async def test_a_call_that_fails_before_its_first_event_is_retried() -> None:
    servicer = Flaky(2)
    async with calling(servicer) as client:
        answer = await collect(client, chat("x"))

    assert answer.finish.reason == pb.FINISH_REASON_STOP
    assert servicer.calls == 3


async def test_a_call_that_was_accepted_is_not_retried() -> None:
    servicer = Flaky(1, after_accepted=True)
    async with calling(servicer) as client:
        with pytest.raises(errors.WorkerLost):
            await collect(client, chat("x"))

    assert servicer.calls == 1


async def test_retries_end_with_the_last_error() -> None:
    servicer = Flaky(99)
    async with calling(servicer, retries=1) as client:
        with pytest.raises(errors.Draining):
            await collect(client, chat("x"))

    assert servicer.calls == 2


async def test_the_retry_budget_protects_a_failing_server() -> None:
    servicer = Flaky(10_000)
    async with calling(servicer, retries=3) as client:
        for _ in range(20):
            with pytest.raises(errors.Draining):
                await collect(client, chat("x"))

    assert servicer.calls == 20 + 5, "five retries exhaust the budget"


async def test_leaving_the_stream_cancels_the_call() -> None:
    servicer = Flaky(0)
    async with calling(servicer) as client:
        async with aclosing(client.generate(pb.GenerateRequest(prompt="wait"), timeout=PATIENCE)) as stream:
            await anext(stream)

        await eventually(lambda: servicer.cancelled == 1)


class Reciter(MultiplexedServicer):
    """Echoes the prompt, a byte a token. Its first streams break, each after its own number of tokens."""

    def __init__(
        self,
        *breaks: int,
        model: str = "echo",
        refuses: Sequence[errors.HeadraceError] = (),
        in_silence: bool = False,
    ) -> None:
        self.breaks = breaks
        self.in_silence = in_silence
        self.model = model
        self.refuses = list(refuses)
        self.requests: list[pb.GenerateRequest] = []

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        count = len(self.requests)
        self.requests.append(request)
        if request.resume.token_ids and self.refuses:
            raise self.refuses.pop(0)
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id="r", tier="t", model=self.model))
        said = request.prompt.encode()
        had = len(request.resume.token_ids)
        for offset in range(had, len(said)):
            if count < len(self.breaks) and offset - had == self.breaks[count]:
                if self.in_silence:
                    return
                await context.abort(grpc.StatusCode.UNAVAILABLE, "as a broken connection: without details")
            delta = pb.Delta(offset=offset, token_count=1, text=chr(said[offset]))
            if request.stream.include_token_ids:
                delta.token_ids.append(said[offset])
            yield pb.GenerateResponse(delta=delta)
        yield pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_STOP))


async def test_an_answer_whose_stream_broke_is_resumed_without_a_visible_event() -> None:
    servicer = Reciter(3, 0, 5)
    async with calling(servicer) as client:
        answer = await collect(client, pb.GenerateRequest(prompt="a long way to go"))

    assert answer.text == "a long way to go"
    assert answer.ids == [], "the request did not ask for route changes"
    assert [len(request.resume.token_ids) for request in servicer.requests] == [0, 3, 3, 8]
    assert [request.resume.attempt for request in servicer.requests] == [0, 1, 2, 3]
    assert len({request.sampling.seed for request in servicer.requests}) == 1
    assert len({request.request_id for request in servicer.requests}) == 1
    first, *later = servicer.requests
    assert (first.routing.tier, first.routing.model) == ("", "")
    assert {(request.routing.tier, request.routing.model) for request in later} == {("t", "echo")}


class RecitingRouter(Reciter, RoutingServiceServicer):
    """A reciter whose streams have an answer id each, and which receives feedback."""

    def __init__(self, *breaks: int) -> None:
        super().__init__(*breaks)
        self.rated: list[str] = []

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        name = f"answer {len(self.requests)}"
        async for response in super().Generate(request, context):
            if response.HasField("accepted"):
                response.accepted.answer_id = name
            yield response

    async def Explain(self, request: object, context: object) -> routing.ExplainResponse:
        raise NotImplementedError

    async def ListTiers(self, request: object, context: object) -> routing.ListTiersResponse:
        raise NotImplementedError

    async def Feedback(self, request: routing.FeedbackRequest, context: object) -> routing.FeedbackResponse:
        self.rated.append(request.answer_id)
        return routing.FeedbackResponse()


async def test_a_resumed_answer_is_rated_by_the_id_that_its_caller_has() -> None:
    """The server that resumed it has given it an id of its own."""
    servicer = RecitingRouter(3, 2)
    async with calling(servicer) as client:
        resumed = await collect(client, pb.GenerateRequest(prompt="a long way to go"))
        whole = await collect(client, pb.GenerateRequest(prompt="short"))
        for answer in (resumed, whole):
            await client.feedback(answer_id=answer.accepted.answer_id, ok=True)

    assert [resumed.accepted.answer_id, whole.accepted.answer_id] == ["answer 0", "answer 3"]
    assert servicer.rated == ["answer 2", "answer 3"]


async def test_a_stream_that_ends_without_finish_is_resumed_whatever_its_status() -> None:
    servicer = Reciter(3, in_silence=True)
    async with calling(servicer) as client:
        answer = await collect(client, pb.GenerateRequest(prompt="a long way to go"))

    assert answer.text == "a long way to go"
    assert len(servicer.requests) == 2


@pytest.mark.parametrize("timeout", [math.inf, 1e12])
async def test_a_deadline_has_no_upper_limit(timeout: float) -> None:
    async with calling(Reciter()) as client:
        answer = await collect(client, pb.GenerateRequest(prompt="abc"), timeout=timeout)

    assert answer.text == "abc"


async def test_a_request_for_route_changes_receives_them() -> None:
    request = pb.GenerateRequest(prompt="abc", stream=pb.StreamOptions(include_route_changes=True))
    async with calling(Reciter(1)) as client, aclosing(client.generate(request, timeout=PATIENCE)) as stream:
        events = [response async for response in stream]

    assert [event.WhichOneof("event") for event in events] == [
        *("accepted", "delta", "route_change", "delta", "delta", "finish")
    ]
    assert events[2].route_change.reason == "UNAVAILABLE"
    assert events[2].route_change.attempt == 1


async def test_the_rest_of_an_answer_is_requested_again_from_a_busy_server() -> None:
    servicer = Reciter(1, refuses=[errors.Overloaded("full", retry_after=0.01)])
    async with calling(servicer) as client:
        assert (await collect(client, pb.GenerateRequest(prompt="abc"))).text == "abc"

    assert len(servicer.requests) == 3


class Hurried(Reciter):
    """Ends its first streams with SLOW_READER, each after its own number of tokens."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        count, said = len(self.requests), 0
        async for response in super().Generate(request, context):
            if count < len(self.ends) and said == self.ends[count] and response.HasField("delta"):
                raise errors.SlowReader("the caller does not read")
            said += response.delta.token_count
            yield response

    def __init__(self, *ends: int) -> None:
        super().__init__()
        self.ends = ends


async def test_an_answer_that_ended_with_slow_reader_is_resumed() -> None:
    servicer = Hurried(3, 5, 1)
    async with calling(servicer) as client:
        answer = await collect(client, pb.GenerateRequest(prompt="a long way to go"))

    assert answer.text == "a long way to go"
    assert [len(request.resume.token_ids) for request in servicer.requests] == [0, 3, 8, 9]


async def test_resuming_can_be_switched_off() -> None:
    servicer = Reciter(1)
    async with calling(servicer) as client:
        with pytest.raises(errors.Unavailable):
            async with aclosing(client.generate(pb.GenerateRequest(prompt="abc"), resume=False)) as stream:
                async for _ in stream:
                    pass

    (request,) = servicer.requests
    assert not request.sampling.HasField("seed"), "the request is sent unchanged"


async def test_an_answer_is_not_resumed_by_another_model() -> None:
    servicer = Reciter(1)
    async with calling(servicer) as client:
        with pytest.raises(errors.NoWorkers, match="begun by model 'echo'"):
            async with aclosing(
                client.generate(pb.GenerateRequest(prompt="abc"), timeout=PATIENCE)
            ) as stream:
                async for _ in stream:
                    servicer.model = "other"


async def test_an_answer_that_makes_no_progress_fails() -> None:
    servicer = Reciter(*[0] * 100)
    async with calling(servicer) as client:
        with pytest.raises(errors.Unavailable):
            await collect(client, pb.GenerateRequest(prompt="abc"))

    assert len(servicer.requests) == 7, "the first call, one free retry, and those of the budget"


async def test_answers_wait_for_a_server_that_resumes_them() -> None:
    servicer = Reciter(*[1] * 20)
    # Each of them meets a busy server and then a broken connection, several times.
    servicer.refuses = [errors.Overloaded("full", retry_after=0.01), errors.Unavailable("broken")] * 25
    async with calling(servicer) as client:
        asked = [collect(client, pb.GenerateRequest(prompt="abc")) for _ in range(20)]
        answers = await asyncio.gather(*asked)

    assert [answer.text for answer in answers] == ["abc"] * 20


async def test_an_answer_that_no_server_resumes_fails_after_the_patience() -> None:
    servicer = Reciter(1)
    servicer.refuses = [errors.Overloaded("full", retry_after=0.01)] * 1_000
    async with calling(servicer, patience=1.0) as client:
        with pytest.raises(errors.Overloaded):
            await collect(client, pb.GenerateRequest(prompt="abc"))

    assert len(servicer.requests) > 7, "more than the budget allows"


class Listening(Reciter):
    """Records the metadata of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.metadata: dict[str, str | bytes] = {}

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.metadata = dict(context.invocation_metadata())
        async for response in super().Generate(request, context):
            yield response


async def test_metadata_may_have_any_name_that_grpc_accepts() -> None:
    given = {"context": "a", "self": "b", "headers": "c", "timeout": "d", "metadata": "e", "x-user": "f~ g"}
    servicer = Listening()
    async with calling(servicer) as client:
        stream = client.generate(pb.GenerateRequest(prompt="abc"), metadata=given, timeout=PATIENCE)
        async with aclosing(stream) as responses:
            assert [response.WhichOneof("event") async for response in responses][-1] == "finish"

    assert given.items() <= servicer.metadata.items()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Upper", "x"),
        ("white space", "x"),
        ("", "x"),
        ("grpc-timeout", "1S"),
        ("x-bin", "x"),
        ("x", "new\nline"),
        ("x", "é"),
    ],
)
async def test_metadata_that_grpc_cannot_send_is_named(key: str, value: str) -> None:
    async with calling(Reciter()) as client:
        with pytest.raises(errors.InvalidRequest, match="cannot be sent"):
            await anext(client.generate(pb.GenerateRequest(prompt="abc"), metadata={key: value}))


def test_the_retry_budget_stops_at_half_and_is_refilled_by_success() -> None:
    budget = RetryBudget(tokens=10, refund=0.5)
    assert [budget.take() for _ in range(6)] == [True] * 5 + [False]
    budget.succeed()

    assert budget.take()


def test_chat_builds_a_request() -> None:
    request = chat("why?", system="be brief", temperature=0, max_tokens=8)

    assert [(turn.role, turn.content) for turn in request.chat.messages] == [
        ("system", "be brief"),
        ("user", "why?"),
    ]
    assert request.sampling.HasField("temperature")
    assert request.sampling.max_tokens == 8

"""Invalid requests and overload: the caller receives the documented error, and others are unaffected."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from headrace import errors, statuses
from headrace.batcher.text.tokens import ByteTokenizer
from headrace.channel import MAX_MESSAGE_BYTES, open_channel
from headrace.client import chat, connect
from headrace.v1 import generation_pb2 as pb
from headrace.v1.generation_service_pb2_grpc import GenerationServiceStub
from headrace.worker.engine.echo import FAULT_ID, EchoEngine
from tests.harness import Mesh, collect, eventually, prompt, running_mesh, until_healthy

GENERATE = "/headrace.v1.GenerationService/Generate"


def routed(text: str = "hello", **hints: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=text, routing=pb.Routing(**hints))  # type: ignore[arg-type]


BAD_REQUESTS: list[tuple[pb.GenerateRequest, type[errors.HeadraceError], str]] = [
    (pb.GenerateRequest(), errors.EmptyInput, "input"),
    (pb.GenerateRequest(prompt=""), errors.EmptyInput, "prompt"),
    (pb.GenerateRequest(chat=pb.Chat()), errors.EmptyInput, "chat.messages"),
    (chat("  "), errors.EmptyInput, "chat.messages[0].content"),
    (chat([("robot", "hi")]), errors.InvalidRequest, "chat.messages[0].role"),
    (prompt("x", temperature=-1), errors.InvalidSampling, "sampling.temperature"),
    (prompt("x", temperature=float("nan")), errors.InvalidSampling, "sampling.temperature"),
    (prompt("x", top_p=0), errors.InvalidSampling, "sampling.top_p"),
    (prompt("x", top_p=1.5), errors.InvalidSampling, "sampling.top_p"),
    (prompt("x", min_p=2), errors.InvalidSampling, "sampling.min_p"),
    (prompt("x", repetition_penalty=0), errors.InvalidSampling, "sampling.repetition_penalty"),
    (prompt("x", max_tokens=0), errors.InvalidSampling, "sampling.max_tokens"),
    (prompt("x", max_tokens=2, min_tokens=3), errors.InvalidSampling, "sampling.min_tokens"),
    (prompt("x", stop=[""]), errors.InvalidSampling, "sampling.stop"),
    (prompt("x", stop=["s"] * 17), errors.InvalidSampling, "sampling.stop"),
    (prompt("x", logit_bias={3: 101}), errors.InvalidSampling, "sampling.logit_bias"),
    (prompt("x", logit_bias={999_999: 1}), errors.InvalidSampling, "sampling.logit_bias"),
    (prompt("x", stop_token_ids=[3] * 65), errors.InvalidSampling, "sampling.stop_token_ids"),
    (prompt("x", stop_token_ids=[999_999]), errors.InvalidSampling, "sampling.stop_token_ids"),
    (routed(priority=10), errors.InvalidRequest, "routing.priority"),
    (routed(quality_preference=2), errors.InvalidRequest, "routing.quality_preference"),
    (routed(tier="huge"), errors.UnknownTier, "routing.tier"),
    (routed(min_tier="huge"), errors.UnknownTier, "routing.min_tier"),
    (routed(model="gpt-9"), errors.UnknownModel, "routing.model"),
    (routed(min_tier="large", max_tier="small"), errors.HintsConflict, "routing.min_tier"),
    (pb.GenerateRequest(prompt="x", request_id="r" * 129), errors.InvalidRequest, "request_id"),
    (
        pb.GenerateRequest(prompt="x", stream=pb.StreamOptions(flush_tokens=0)),
        errors.InvalidRequest,
        "stream.flush_tokens",
    ),
    (routed("p" * 4096), errors.ContextTooLong, "input"),
    (
        pb.GenerateRequest(prompt="x", resume=pb.Resume(token_ids=[97] * 4096)),
        errors.ContextTooLong,
        "resume.token_ids",
    ),
    (
        pb.GenerateRequest(prompt="x", resume=pb.Resume(attempt=2**32 - 1)),
        errors.InvalidRequest,
        "resume.attempt",
    ),
    (routed(session_id="s" * 257), errors.InvalidRequest, "routing.session_id"),
    (routed(tenant="t" * 257), errors.InvalidRequest, "routing.tenant"),
    # A quote must not make the status longer than gRPC's limit on headers.
    (routed(tier="😀" * 20_000), errors.UnknownTier, "routing.tier"),
    (chat([("r" * 100_000, "x")]), errors.InvalidRequest, "chat.messages[0].role"),
]


async def test_bad_requests_are_rejected_with_class_field_and_remedy(mesh: Mesh) -> None:
    for request, expected, field in BAD_REQUESTS:
        with pytest.raises(errors.InvalidRequest) as caught:
            await collect(mesh.client, request)

        assert type(caught.value) is expected, request
        assert caught.value.field == field
        assert len(caught.value.message) > 20, "the message names a remedy"
    await eventually(lambda: not mesh.left_behind)


async def test_batcher_and_router_reject_with_the_same_message(mesh: Mesh) -> None:
    async with connect(f"127.0.0.1:{mesh.tiers['small'].batcher.server.port}") as behind:
        for request, expected, _ in BAD_REQUESTS[:17]:
            with pytest.raises(expected) as direct:
                await collect(behind, request)
            with pytest.raises(expected) as through_router:
                await collect(mesh.client, request)

            assert direct.value.message == through_router.value.message.replace("'large'", "'small'")


async def test_the_status_carries_google_rpc_details(mesh: Mesh) -> None:
    async with open_channel(f"127.0.0.1:{mesh.port}") as channel:
        call = GenerationServiceStub(channel).Generate(prompt("x", top_p=3))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    trailing = dict(caught.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad)
    assert (info.domain, info.reason) == ("headrace", "INVALID_SAMPLING")
    assert bad.field_violations[0].field == "sampling.top_p"


async def test_text_that_is_not_utf8_is_rejected(mesh: Mesh) -> None:
    for port in (mesh.port, mesh.tiers["small"].batcher.server.port):
        async with open_channel(f"127.0.0.1:{port}") as channel:
            raw: Any = channel.unary_stream(
                GENERATE, request_serializer=None, response_deserializer=pb.GenerateResponse.FromString
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in raw(b"\x1a\x02\xff\xfe"):  # field 3, `prompt`, of two bytes
                    pass

        error = statuses.from_rpc_error(caught.value)
        assert isinstance(error, errors.InvalidText)
        assert "UTF-8" in error.message


async def test_an_oversize_message_is_rejected_by_client_and_server(mesh: Mesh) -> None:
    huge = prompt("x" * (MAX_MESSAGE_BYTES + 1))
    with pytest.raises(errors.MessageTooLarge):
        await collect(mesh.client, huge)

    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{mesh.port}", options=[("grpc.max_send_message_length", -1)]
    ) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in GenerationServiceStub(channel).Generate(huge):
                pass

    assert isinstance(statuses.from_rpc_error(caught.value), errors.MessageTooLarge)


class _Slow(ByteTokenizer):
    """A tokenizer that is slow for long prompts and has no lower bound of tokens for given bytes."""

    bound = None

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if len(text) > 10_000:
            self.entered.set()
            self.go.wait(60)
        return super().encode_text(text)


async def test_short_prompts_do_not_wait_for_the_tokenizing_of_long_ones() -> None:
    tokenizer = _Slow()
    async with running_mesh("only", tokenizer=tokenizer) as mesh:
        long = [asyncio.create_task(collect(mesh.client, prompt("x" * 2_000_000))) for _ in range(3)]
        await eventually(tokenizer.entered.is_set)
        assert (await collect(mesh.client, prompt("short"), timeout=30)).text == "short"
        tokenizer.go.set()
        for reading in long:
            with pytest.raises(errors.ContextTooLong):
                await reading


async def test_a_full_queue_rejects_immediately_with_a_delay_and_recovers() -> None:
    async with running_mesh(
        "only",
        engine=lambda: EchoEngine(max_running=1, step_seconds=0.01),
        batcher_settings={"queue_limit": 3},
    ) as mesh:
        coalescer = mesh.tiers["only"].batcher.coalescer
        busy = prompt("x", max_tokens=1000, ignore_eos=True)
        async with asyncio.TaskGroup() as tasks:
            readers = []
            for queued in (0, 0, 1, 2, 3):  # one runs, one waits at the worker
                readers.append(tasks.create_task(collect(mesh.client, busy, timeout=600)))
                await eventually(
                    lambda: (len(coalescer.live), len(coalescer.queue)) == (len(readers), queued)  # noqa: B023
                )

            with pytest.raises(errors.Overloaded) as caught:
                await collect(mesh.client, prompt("late"))
            for reader in readers:
                reader.cancel()

        assert caught.value.retry_after is not None
        assert caught.value.retry_after > 0
        assert caught.value.fields == {"queued": "3", "limit": "3"}
        await eventually(lambda: not mesh.left_behind)
        assert (await collect(mesh.client, prompt("later"))).text == "later"


class _FaultyTokenizer(ByteTokenizer):
    """A byte tokenizer that maps one letter to the id at which the echo engine fails."""

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [FAULT_ID if letter == "!" else ord(letter) for letter in text]


async def test_a_sequence_that_fails_in_the_engine_affects_no_other() -> None:
    async with running_mesh("only", tokenizer=_FaultyTokenizer()) as mesh:
        bad = asyncio.create_task(collect(mesh.client, prompt("bad!")))
        good = [asyncio.create_task(collect(mesh.client, prompt("good" * 20))) for _ in range(8)]

        with pytest.raises(errors.SequenceFault):
            await bad
        assert [(await task).text for task in good] == ["good" * 20] * 8
        await eventually(lambda: not mesh.left_behind)


class _Exploding(EchoEngine):
    """An engine whose third step raises."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def step(self, rows):  # type: ignore[no-untyped-def]
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("kernel panic")
        return super().step(rows)


async def test_an_engine_that_raises_once_is_retried_transparently(caplog: pytest.LogCaptureFixture) -> None:
    async with running_mesh("only", engine=_Exploding) as mesh:
        assert (await collect(mesh.client, prompt("abcdef"))).text == "abcdef"
        assert (await collect(mesh.client, prompt("again"))).text == "again"
    assert "engine step failed" in caplog.text


async def test_an_unexpected_exception_is_an_internal_error_without_its_details(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from headrace.router.chooser import Chooser

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret path /etc/shadow")

    monkeypatch.setattr(Chooser, "choose", broken)
    with pytest.raises(errors.InternalError) as caught:
        await collect(mesh.client, prompt("x"))

    assert "secret" not in caught.value.message
    assert "secret" in caplog.text


async def test_a_tier_without_workers_is_skipped_or_named() -> None:
    async with running_mesh() as mesh:
        small = mesh.tiers["small"]
        next(iter(small.batcher.coalescer.pool)).draining = True
        await until_healthy(mesh.client, False, True)

        moved = await collect(mesh.client, chat("Hi!"))
        assert moved.accepted.tier == "large"

        pinned = chat("Hi!")
        pinned.routing.tier = "small"
        async with connect(f"127.0.0.1:{mesh.port}", retries=0) as client:
            with pytest.raises(errors.NoWorkers) as caught:
                await collect(client, pinned)
        assert caught.value.retry_after == 1.0


async def test_an_unreachable_mesh_is_unavailable() -> None:
    async with connect("127.0.0.1:1", retries=1) as client:
        with pytest.raises(errors.Unavailable):
            await collect(client, prompt("x"))


async def test_a_worker_with_another_tokenizer_is_rejected() -> None:
    from headrace.batcher.__main__ import batcher
    from headrace.batcher.settings import Settings
    from headrace.batcher.text.tokens import ByteTokenizer
    from tests.harness import running_worker

    class Other(ByteTokenizer):
        fingerprint = "other"

    async with running_worker(EchoEngine()) as worker:
        settings = Settings(port=0, tier="t", workers=f"127.0.0.1:{worker.server.port}", fake=True)
        async with batcher(settings, Other(), "b") as running:
            await eventually(lambda: "tokenizer" in running.coalescer.pool.problem)
            async with connect(f"127.0.0.1:{running.server.port}", retries=0) as client:
                with pytest.raises(errors.NoWorkers, match="give both the same model"):
                    await collect(client, prompt("x"))

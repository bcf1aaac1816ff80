"""The message of a request is read within its limits, and an invalid one is the caller's error."""

from __future__ import annotations

import asyncio
import logging

import pytest

from headrace import errors
from headrace.runtime.serving.limits import MIB
from tests.harness import Mesh, collect, prompt
from tests.hostile.wire import DATA, GENERATE, frame, headers, message, peer
from tests.runtime.serving.by_hand import VALID, status


async def test_incomplete_messages_are_charged_up_to_their_share(small: Mesh) -> None:
    almost = message(b"x" * 500_000)[:-1]
    async with peer(small.port) as one:
        streams = [await one.call(headers(GENERATE), None) for _ in range(6)]
        for stream in streams:
            await one.body(stream, almost, end=False)
        while sum(one.answers[stream].ended for stream in streams) < 5:
            await asyncio.sleep(0.01)
        outcomes = sorted(one.outcome(stream) for stream in streams)
        assert outcomes == ["RESOURCE_EXHAUSTED"] * 5 + ["open"]  # 1 MiB each, of half of half of 4
        assert (await collect(small.client, prompt("meanwhile"))).text == "meanwhile"


async def test_a_message_beyond_the_limit_is_too_large(small: Mesh) -> None:
    with pytest.raises(errors.MessageTooLarge):
        await collect(small.client, prompt("x" * (MIB + 1)))


@pytest.mark.parametrize(
    "path",
    [
        GENERATE,
        "/headrace.v1.RoutingService/Explain",
        "/headrace.v1.AdminService/Inspect",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.channelz.v1.Channelz/GetServers",
    ],
)
async def test_bytes_that_are_not_a_message_are_the_callers_error_and_are_not_logged(
    small: Mesh, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert await status(small.port, path, message(b"\xff" * 40)) == "INVALID_ARGUMENT"

    assert not caplog.records


async def test_a_call_without_a_message_is_invalid(small: Mesh) -> None:
    assert await status(small.port, GENERATE, b"") == "INVALID_ARGUMENT"


async def test_a_call_whose_caller_leaves_before_it_is_read_is_released(small: Mesh) -> None:
    async with peer(small.port) as one:
        for _ in range(5):
            stream = await one.call(headers(GENERATE), None)
            await one.send(frame(DATA, 0, stream, VALID[:3]))
    await asyncio.sleep(0)

    assert (await collect(small.client, prompt("x"))).text == "x"

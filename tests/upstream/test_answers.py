"""What an upstream answers reaches the caller as the contract says, however it arrives."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable

import pytest

from headrace import errors
from headrace.upstream.http import events
from headrace.upstream.http.sse import MAX_EVENT_BYTES
from headrace.v1 import generation_pb2 as pb
from tests.harness import eventually
from tests.upstream.fake import (
    ANSWER,
    DONE,
    MODEL,
    ROLE,
    Exchange,
    Script,
    delta,
    event,
    fake_upstream,
    finish,
    says,
    usage,
)
from tests.upstream.tier import answer_of, ask, running_upstream

WHOLE = {
    "choices": [{"index": 0, "message": {"content": "Hello you"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3},
}


async def test_an_answer_arrives_with_its_usage_and_its_model() -> None:
    async with fake_upstream() as fake, running_upstream(fake) as tier:
        answer = await answer_of(tier, ask())

        assert answer.text == "Hello you"
        assert answer.accepted.text_only
        assert (answer.accepted.model, answer.accepted.tier) == (MODEL, "large")
        assert answer.accepted.prompt_tokens == 0
        assert answer.finish.reason == pb.FINISH_REASON_STOP
        assert (answer.finish.usage.prompt_tokens, answer.finish.usage.completion_tokens) == (7, 3)
        assert answer.finish.timing.total.ToNanoseconds() > 0
        assert answer.tokens == 3
        (seen,) = fake.seen
        assert (seen.method, seen.path) == ("POST", "/v1/chat/completions")
        assert (seen.json["model"], seen.json["stream"]) == (MODEL, True)
        assert seen.json["messages"] == [{"role": "user", "content": "Hello?"}]
        await eventually(lambda: not tier.left_behind)


def cut(size: int, kind: str = "text/event-stream") -> Script:
    """Send the usual answer in pieces of *size* bytes."""

    async def script(exchange: Exchange) -> None:
        await exchange.head(kind=kind)
        stream = b"".join(ANSWER)
        for at in range(0, len(stream), size):
            await exchange.chunk(stream[at : at + size])
            await asyncio.sleep(0)
        await exchange.chunk(b"")

    return script


async def _with_crlf(exchange: Exchange) -> None:
    await exchange.stream(*(part.replace(b"\n", b"\r\n") for part in ANSWER))


async def _with_comments(exchange: Exchange) -> None:
    await exchange.stream(b"\xef\xbb\xbf: hello\n\n", *(part + b": ping\n\n" for part in ANSWER))


async def _until_closed(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b"".join(ANSWER))
    exchange.close()


async def _compressed(exchange: Exchange) -> None:
    await exchange.head(content_encoding="gzip")
    await exchange.chunk(gzip.compress(b"".join(ANSWER)))
    await exchange.chunk(b"")


async def _kept_open(exchange: Exchange) -> None:
    await exchange.head()
    await exchange.chunk(b"".join(ANSWER[:-1]))
    await exchange.until_gone()


async def _reset_at_the_end(exchange: Exchange) -> None:
    await exchange.head()
    await exchange.chunk(b"".join(ANSWER[:-1]))
    exchange.reset()


@pytest.mark.parametrize(
    "script",
    [
        cut(100_000),
        cut(1),
        cut(17),
        _with_crlf,
        _with_comments,
        _until_closed,
        _compressed,
        says(*ANSWER[:-1]),
        says(*ANSWER[:-1], DONE.strip()),
        says(*ANSWER, event({"choices": "after the end"})),
        says(*ANSWER[:-1], b"data: {broken\n\n"),
        _kept_open,
        _reset_at_the_end,
        lambda exchange: exchange.reply(200, WHOLE),
        cut(50, kind="text/event-stream; charset=utf-8"),
    ],
    ids=[
        *("at once", "byte by byte", "in odd pieces", "with CR LF", "with comments and a byte order mark"),
        *("until closed", "gzip", "without DONE", "without an empty line at the end"),
        *("with events after DONE", "with garbage after the end", "kept open after the end"),
        *("reset after the end", "as one object", "with a charset"),
    ],
)
async def test_an_answer_is_the_same_however_it_is_sent(script: Script) -> None:
    async with fake_upstream() as fake, running_upstream(fake) as tier:
        fake.usual = script

        answer = await answer_of(tier, ask())

        assert answer.text == "Hello you"
        assert answer.finish.reason == pb.FINISH_REASON_STOP
        assert answer.finish.usage.prompt_tokens == 7
        await eventually(lambda: not tier.left_behind)


async def test_connections_are_used_again() -> None:
    async with fake_upstream() as fake, running_upstream(fake) as tier:
        await answer_of(tier, ask())  # beside the connection of the checks
        before = fake.connections
        for _ in range(5):
            await answer_of(tier, ask())

        assert fake.connections <= before + 1


async def test_a_thousand_events_in_one_chunk_arrive_in_few_messages_and_in_order() -> None:
    words = [f"{number} " for number in range(1000)]
    async with fake_upstream() as fake, running_upstream(fake) as tier:
        fake.usual = says(b"".join(map(delta, words)) + finish() + usage(7, 1000) + DONE)
        request = ask()
        request.stream.flush_tokens = 100

        answer = await answer_of(tier, request)

        assert answer.text == "".join(words)
        assert answer.tokens == 1000
        assert answer.deltas <= 12


async def test_gathered_tokens_are_sent_when_they_have_waited_long_enough() -> None:
    async with fake_upstream() as fake, running_upstream(fake) as tier:

        async def stalls(exchange: Exchange) -> None:
            await exchange.head()
            await exchange.chunk(delta("one ") + delta("two ") + delta("three"))
            await exchange.until_released()
            await exchange.chunk(finish() + usage() + DONE)
            await exchange.chunk(b"")

        fake.usual = stalls
        request = ask()
        request.stream.flush_tokens = 1024
        request.stream.flush_interval.FromMilliseconds(10)
        texts = []
        async for response in tier.client.attempt(request, timeout=60):
            texts.append(response.delta.text)
            if "".join(texts) == "one two three":
                fake.released.set()

        assert texts == ["", "one ", "two three", ""]


async def test_an_answer_without_usage_has_estimates_and_is_counted(count: Callable[..., float]) -> None:
    before = count("headrace.upstream.usage_missing", tier="large")
    async with fake_upstream() as fake, running_upstream(fake) as tier:
        fake.usual = says(*ANSWER[:-2], DONE)

        answer = await answer_of(tier, ask())

        assert (answer.finish.usage.prompt_tokens, answer.finish.usage.completion_tokens) == (0, 3)
        assert count("headrace.upstream.usage_missing", tier="large") == before + 1


async def test_reasoning_and_calls_of_tools_are_passed_on() -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "clock", "arguments": ""}}
    part = {"index": 0, "function": {"arguments": '{"zone":"UTC"}'}}
    async with fake_upstream() as fake, running_upstream(fake) as tier:
        fake.usual = says(
            ROLE,
            delta(reasoning_content="Hm."),
            delta(tool_calls=[call]),
            delta(tool_calls=[part]),
            finish("tool_calls"),
            usage(),
            DONE,
        )
        request = ask()
        request.chat.tools.append(
            pb.Tool(name="clock", parameters='{"type":"object","properties":{"zone":{"type":"string"}}}')
        )

        answer = await answer_of(tier, request)

        assert answer.reasoning == "Hm."
        assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [
            ("clock", {"zone": "UTC"})
        ]


async def test_a_raw_prompt_is_sent_to_the_other_endpoint() -> None:
    async with fake_upstream() as fake, running_upstream(fake) as tier:
        fake.usual = says(
            event({"choices": [{"index": 0, "text": "Hi"}]}),
            event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}),
            usage(2, 1),
            DONE,
        )

        answer = await answer_of(tier, pb.GenerateRequest(prompt="Say"))

        assert fake.seen[0].path == "/v1/completions"
        assert (answer.text, answer.finish.reason) == ("Hi", pb.FINISH_REASON_LENGTH)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ((delta("Hel"), b"data: {broken\n\n"), "not JSON"),
        ((delta("Hel"), b"data: " + b"x" * (MAX_EVENT_BYTES + 1)), f"more than {MAX_EVENT_BYTES} bytes"),
        ((delta("Hel"), event({"error": {"message": "the engine died", "code": 500}})), "an error 500"),
        ((delta("Hel"), DONE), "."),
        ((delta("Hel"),), "."),
    ],
    ids=["broken JSON", "a huge event", "an error", "DONE without finish", "no finish"],
)
async def test_an_answer_that_breaks_off_is_lost_and_keeps_what_was_delivered(
    sent: tuple[bytes, ...], message: str
) -> None:
    async with fake_upstream() as fake, running_upstream(fake, retries=3) as tier:
        fake.usual = says(b"".join(sent))  # in one piece: the error arrives with the text
        text = ""

        with pytest.raises(errors.UpstreamLost, match=message):
            async for response in tier.client.attempt(ask(), timeout=60):
                text += response.delta.text

        assert text == "Hel"
        assert len(fake.seen) == 1, "an answer that has begun is never requested again"
        await eventually(lambda: not tier.left_behind)


async def test_an_answer_ends_although_the_stream_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "END_SECONDS", 0.2)
    async with fake_upstream() as fake, running_upstream(fake) as tier:

        async def dribbles(exchange: Exchange) -> None:
            await exchange.head()
            await exchange.chunk(delta("Hi") + finish() + usage())
            while not exchange.gone:
                await exchange.chunk(b": still here\n\n")
                await asyncio.sleep(0.01)

        fake.usual = dribbles
        answer = await answer_of(tier, ask())

        assert (answer.text, answer.finish.usage.prompt_tokens) == ("Hi", 7)
        await fake.idle()


async def test_a_huge_answer_in_one_piece_arrives_in_messages_that_a_router_accepts() -> None:
    text = "x" * 3_000_000
    async with fake_upstream() as fake, running_upstream(fake) as tier:
        body = {"choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}]}
        fake.usual = lambda exchange: exchange.reply(200, body)
        sizes, parts = [], []
        async for response in tier.client.attempt(ask(), timeout=60):
            sizes.append(response.ByteSize())
            parts.append(response.delta.text)

        assert "".join(parts) == text
        assert max(sizes) < 500_000


async def test_a_connection_that_is_reset_midway_loses_the_answer() -> None:
    async with fake_upstream() as fake, running_upstream(fake, retries=3) as tier:

        async def breaks(exchange: Exchange) -> None:
            await exchange.head()
            await exchange.chunk(delta("Hel"))
            await exchange.until_released()
            exchange.reset()

        fake.usual = breaks
        with pytest.raises(errors.UpstreamLost):
            async for response in tier.client.attempt(ask(), timeout=60):
                if response.delta.text:
                    fake.released.set()

        assert len(fake.seen) == 1


async def test_an_upstream_that_stalls_within_an_answer_loses_it() -> None:
    async with fake_upstream() as fake, running_upstream(fake, stall_seconds=0.2) as tier:

        async def stalls(exchange: Exchange) -> None:
            await exchange.head()
            await exchange.chunk(delta("Hel"))
            await exchange.until_gone()

        fake.usual = stalls
        with pytest.raises(errors.UpstreamLost, match=r"sent nothing for 0\.2 s"):
            await answer_of(tier, ask())

        await fake.idle()

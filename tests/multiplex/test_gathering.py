"""A reader that is behind receives longer deltas, and its credit limits how far it can be behind."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.client import Client
from headrace.multiplex.shared_call import CREDIT, MAX_GATHERED
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import multiplex_pb2 as wire
from tests.harness import PATIENCE, collect, prompt
from tests.multiplex.scripted import ServerStream, answer, echoed, scripted

LONG = "abcdefgh" * 200


async def within_credit(stream: ServerStream) -> None:
    """Answer each request as far as its credit allows, and fail if the caller grants none."""
    await stream.welcome()
    sent: dict[int, int] = {}
    while True:
        for opened in stream.opened:
            events = echoed(opened)
            begin = sent.get(opened.handle, 0)
            sent[opened.handle] = end = max(min(stream.credit[opened.handle], len(events)), begin)
            await stream.write(events=events[begin:end])
        await stream.read()


async def until_all_there(stream: ServerStream) -> None:
    """Answer the first request in one message, and its second one after it: that is the last to arrive."""
    (first,) = await stream.welcome()
    await stream.write(events=echoed(first, 0))
    await stream.read_until(lambda: len(stream.opened) == 2)
    _, second = stream.opened
    await stream.write(events=echoed(first)[1:])
    await stream.write(events=echoed(second))
    await stream.hang()


async def behind(client: Client, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    """Read an answer whose reader waits, after `accepted`, until all of it has arrived."""
    async with aclosing(client.generate(request, timeout=PATIENCE, resume=False)) as stream:
        responses = [await anext(stream)]
        await collect(client, prompt("x"))
        responses += [response async for response in stream]
    return responses


async def test_a_reader_that_is_behind_receives_one_long_delta() -> None:
    async with scripted(until_all_there) as server, server.client() as client:
        accepted, delta, finish = await behind(client, prompt("abcdefgh"))

    assert accepted.HasField("accepted")
    assert (delta.delta.offset, delta.delta.token_count, delta.delta.text) == (0, 8, "abcdefgh")
    assert list(delta.delta.token_ids) == list(b"abcdefgh")
    assert list(delta.delta.logprobs) == [-float(n) for n in range(8)]
    assert finish.HasField("finish")


async def test_parts_of_calls_and_thoughts_are_gathered() -> None:
    def part(index: int, arguments: str, **first: str) -> pb.ToolCallDelta:
        return pb.ToolCallDelta(index=index, arguments=arguments, **first)

    async def script(stream: ServerStream) -> None:
        (first,) = await stream.welcome()
        await stream.write(events=echoed(first, 0))
        await stream.read_until(lambda: len(stream.opened) == 2)
        rest = echoed(first)[1:]
        parts = [
            [part(0, "{", id="a", name="f")],
            [part(0, "}"), part(1, "", id="b", name="g")],
            [part(1, '{"x": ')],
            [part(1, "1}")],
        ]
        for event, calls in zip(rest, parts, strict=False):
            event.response.delta.tool_calls.extend(calls)
            event.response.delta.reasoning = "?"
        await stream.write(events=rest)
        await stream.write(events=echoed(stream.opened[1]))
        await stream.hang()

    async with scripted(script) as server, server.client() as client:
        _, response, _ = await behind(client, prompt("abcd"))

    assert response.delta.reasoning == "????"
    assert list(response.delta.tool_calls) == [
        part(0, "{}", id="a", name="f"),
        part(1, '{"x": 1}', id="b", name="g"),
    ]


@pytest.mark.parametrize("top", [0, 3])
async def test_details_of_tokens_are_gathered_with_them_and_bound_the_length(top: int) -> None:
    most = MAX_GATHERED // (1 + top)
    text = "ab" * most

    async def script(stream: ServerStream) -> None:
        (first,) = await stream.welcome()
        await stream.write(events=echoed(first, 0))
        await stream.read_until(lambda: len(stream.opened) == 2)
        rest = echoed(first)[1:]
        for event in rest[:-1]:
            for id in event.response.delta.token_ids:
                event.response.delta.tokens.add(token=pb.TokenLogprob(id=id))
        await stream.write(events=rest)
        await stream.write(events=echoed(stream.opened[1]))
        await stream.hang()

    async with scripted(script) as server, server.client() as client:
        responses = await behind(client, prompt(text, top_logprobs=top))

    deltas = [response.delta for response in responses[1:-1]]
    assert [delta.token_count for delta in deltas] == [most, most]
    for delta in deltas:
        assert [one.token.id for one in delta.tokens] == list(delta.token_ids) == list(delta.text.encode())


async def test_parts_of_a_prompt_are_not_joined_and_take_credit_like_any_event() -> None:
    parts = 3 * CREDIT

    async def script(stream: ServerStream) -> None:
        (opened,) = await stream.welcome()
        accepted, *_, finish = echoed(opened)  # an answer without a token
        sent = 0
        made = [wire.MultiplexEvent(handle=opened.handle) for _ in range(parts)]
        for offset, event in enumerate(made):
            event.response.prompt_tokens.offset = offset
            event.response.prompt_tokens.tokens.add()
        events = [accepted, *made, finish]
        while sent < len(events):
            end = min(stream.credit[opened.handle], len(events))
            await stream.write(events=events[sent:end])
            sent = end
            if sent < len(events):
                await stream.read()
        await stream.hang()

    async with scripted(script) as server, server.client() as client:
        answer = await collect(client, prompt("x", prompt_logprobs=0))

    assert len(answer.prompt) == parts


@pytest.mark.parametrize("option", ["flush_tokens", "flush_interval"])
async def test_a_caller_that_chose_how_its_answer_is_split_receives_it_so(option: str) -> None:
    request = prompt("abcdefgh")
    if option == "flush_tokens":
        request.stream.flush_tokens = 1
    else:
        request.stream.flush_interval.FromMilliseconds(1)
    async with scripted(until_all_there) as server, server.client() as client:
        responses = await behind(client, request)

    assert [response.delta.text for response in responses[1:-1]] == list("abcdefgh")


async def test_deltas_are_gathered_up_to_a_length() -> None:
    text = "x" * (2 * MAX_GATHERED + 10)
    async with scripted(until_all_there) as server, server.client() as client:
        responses = await behind(client, prompt(text))

    assert [response.delta.token_count for response in responses[1:-1]] == [MAX_GATHERED, MAX_GATHERED, 10]
    assert "".join(response.delta.text for response in responses) == text


async def test_the_text_that_was_held_back_until_the_end_is_not_joined_to_tokens() -> None:
    async def script(stream: ServerStream) -> None:
        (first,) = await stream.welcome()
        await stream.write(events=echoed(first, 0))
        await stream.read_until(lambda: len(stream.opened) == 2)
        rest = echoed(first)[1:]
        tail = echoed(first, 1)[1:]
        tail[0].response.delta.CopyFrom(pb.Delta(offset=3, text="tail"))
        await stream.write(events=[*rest[:-1], *tail, rest[-1]])
        await stream.write(events=echoed(stream.opened[1]))
        await stream.hang()

    async with scripted(script) as server, server.client() as client:
        responses = await behind(client, prompt("abc"))

    deltas = [(one.delta.offset, one.delta.token_count, one.delta.text) for one in responses[1:-1]]
    assert deltas == [(0, 3, "abc"), (3, 0, "tail")]


@pytest.mark.parametrize("flush_tokens", [0, 1])
@pytest.mark.parametrize("pause_every", [0, 1, 7, 100])
async def test_credit_returns_as_the_answer_is_read(flush_tokens: int, pause_every: int) -> None:
    """The answer has many times the credit of a call, and the reader is ahead or behind in turn."""
    request = prompt(LONG)
    if flush_tokens:
        request.stream.flush_tokens = flush_tokens
    async with scripted(within_credit) as server, server.client() as client:
        text, count = "", 0
        async with aclosing(client.generate(request, timeout=PATIENCE)) as stream:
            async for response in stream:
                text += response.delta.text
                count += 1
                if pause_every and count % pause_every == 0:
                    await asyncio.sleep(0.001)

    assert text == LONG


async def test_a_reader_that_does_not_read_grants_no_credit() -> None:
    async with (
        scripted(within_credit) as server,
        server.client() as client,
        aclosing(client.generate(prompt(LONG), timeout=PATIENCE)) as stream,
    ):
        await anext(stream)
        assert (await collect(client, prompt(LONG))).text == LONG

        assert server.streams[0].credit[1] <= 2 * CREDIT
        text = "".join([response.delta.text async for response in stream])

    assert text == LONG


@given(cuts=st.lists(st.integers(1, 40), max_size=30), flush=st.booleans())
async def test_any_split_of_an_answer_arrives_complete(cuts: list[int], flush: bool) -> None:
    """Messages of any size, whatever is gathered of them."""
    text = "abcdefghij" * 20

    async def script(stream: ServerStream) -> None:
        (opened,) = await stream.welcome()
        events = echoed(opened)
        while events:
            size = cuts.pop() if cuts else 200
            await stream.write(events=events[:size])
            del events[:size]
            await asyncio.sleep(0)
        await stream.hang()

    request = prompt(text)
    if flush:
        request.stream.flush_tokens = 1
    async with scripted(script) as server, server.client() as client:
        got = await collect(client, request)

    assert got.text == text
    assert got.ids == list(text.encode())
    assert got.logprobs == [-float(n) for n in range(len(text))]
    assert got.deltas == len(answer(request)) - 2 if flush else got.deltas <= len(text)

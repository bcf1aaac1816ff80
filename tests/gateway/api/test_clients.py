"""Clients of OpenAI's API work with a gateway in front of a whole mesh, unchanged."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import (
    ChatCompletionChunk,
    ChatCompletionMessageParam,
    ChatCompletionNamedToolChoiceParam,
)
from pydantic import BaseModel

from headrace.gateway.__main__ import gateway
from headrace.gateway.settings import Settings
from headrace.worker.engine.echo import EchoEngine
from tests.gateway.fake_router import FakeRouter, serving_router
from tests.harness import PATIENCE, Mesh, eventually, running_mesh

TEXT = "naïve – 火星 🚀"
SIZE = len(TEXT.encode())  # a byte is a token
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": TEXT}]


@dataclass(frozen=True)
class Served:
    """A mesh, and the URL of its gateway."""

    mesh: Mesh
    url: str


@pytest.fixture(scope="module")
async def served() -> AsyncGenerator[Served, None]:
    async with (
        running_mesh(engine=lambda: EchoEngine(step_seconds=0.002)) as mesh,
        gateway(Settings(port=0, router=f"127.0.0.1:{mesh.port}")) as running,
    ):
        yield Served(mesh, f"http://127.0.0.1:{running.port}/v1")


@pytest.fixture
async def client(served: Served) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as made:
        yield made


async def test_openais_package_gets_an_answer(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="auto", messages=MESSAGES, n=2, seed=7)

    assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert answer.model == "echo"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (SIZE, 2 * SIZE)
    assert answer.usage.prompt_tokens_details is not None


async def test_openais_package_streams(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="large", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert len(chunks) > 4
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 2 * SIZE
    assert chunks[-1].model_extra is not None
    assert chunks[-1].model_extra["headrace"]["tier"] == "large"


async def test_openais_package_accumulates_a_stream(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="auto", messages=MESSAGES) as stream:
        events = [event.type async for event in stream]
        final = await stream.get_final_completion()

    assert final.choices[0].message.content == TEXT
    assert final.choices[0].finish_reason == "stop"
    assert "content.delta" in events


async def test_openais_package_ignores_the_comments_of_a_quiet_stream() -> None:
    router = FakeRouter(gate=asyncio.Event())
    seen = bytearray()

    class Recorded(httpx2.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            response = await super().handle_async_request(request)
            return httpx2.Response(response.status_code, headers=response.headers, content=record(response))

    async def record(response: httpx2.Response) -> AsyncGenerator[bytes, None]:
        async for data in response.aiter_raw():
            seen.extend(data)
            yield data

    async with (
        serving_router(router) as target,
        gateway(Settings(port=0, router=target, ping_seconds=0.03)) as running,
        openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{running.port}/v1",
            api_key="none",
            http_client=httpx2.AsyncClient(transport=Recorded()),
        ) as client,
    ):
        stream = await client.chat.completions.create(model="auto", messages=MESSAGES, stream=True)

        async def read() -> list[ChatCompletionChunk]:
            return [chunk async for chunk in stream]

        reading = asyncio.create_task(read())
        await eventually(lambda: seen.count(b": ping") > 1)
        assert router.gate is not None
        router.gate.set()
        chunks = await reading

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.encode() == b"".join(router.tokens)


async def test_openais_package_works_without_asyncio(served: Served) -> None:
    def calls() -> tuple[str | None, str, list[str]]:
        with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model="auto", messages=MESSAGES)
            with client.chat.completions.create(model="auto", messages=MESSAGES, stream=True) as stream:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return whole.choices[0].message.content, text, [model.id for model in client.models.list()]

    assert await asyncio.to_thread(calls) == (TEXT, TEXT, ["auto", "small", "large", "echo"])


async def test_openais_package_raises_its_own_errors(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="none", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="auto", messages=MESSAGES, temperature=99)
    with pytest.raises(openai.InternalServerError) as unserved:
        await client.embeddings.create(model="auto", input="a")

    assert unknown.value.code == "model_not_found"
    assert refused.value.param == "temperature"
    assert unserved.value.status_code == 501


async def test_leaving_a_stream_of_openais_package_frees_the_mesh(
    served: Served, client: openai.AsyncOpenAI
) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "word " * 500}]
    stream = await client.chat.completions.create(model="auto", messages=messages, stream=True)
    async with stream:
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break

    await eventually(lambda: not served.mesh.left_behind)


class Place(BaseModel):
    """Arguments, or an answer."""

    town: str
    days: int


PLACE = '{"town": "Röme 🚀", "days": 3}'
WEATHER = openai.pydantic_function_tool(Place, name="weather")
WRITTEN = f'<tool_call>\n{{"name": "weather", "arguments": {PLACE}}}\n</tool_call>'  # as the model writes it
NAMED: ChatCompletionNamedToolChoiceParam = {"type": "function", "function": {"name": "weather"}}


def saying(text: str) -> list[ChatCompletionMessageParam]:
    """Return a conversation that the echo engine answers with a text, as far as the form allows it."""
    return [{"role": "user", "content": text}]


async def test_openais_package_gets_an_instance_of_a_class(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.parse(
        model="auto", messages=saying(PLACE), response_format=Place, n=2
    )

    assert [choice.message.parsed for choice in answer.choices] == [Place(town="Röme 🚀", days=3)] * 2


async def test_openais_package_calls_a_tool_and_continues_with_its_result(client: openai.AsyncOpenAI) -> None:
    messages = saying("Wait. " + WRITTEN)
    async with client.chat.completions.stream(model="auto", messages=messages, tools=[WEATHER]) as stream:
        events = [event.type async for event in stream]
        first = (await stream.get_final_completion()).choices[0]
    calls = first.message.tool_calls
    assert calls
    again: Any = {"role": "assistant", "content": first.message.content, "tool_calls": [calls[0].to_dict()]}
    messages += [again, {"role": "tool", "tool_call_id": calls[0].id, "content": "Sunny."}]
    second = await client.chat.completions.create(model="auto", messages=messages, tools=[WEATHER])

    assert (first.message.content or "").strip() == "Wait."
    assert calls[0].function.parsed_arguments == Place(town="Röme 🚀", days=3)
    assert first.finish_reason == "tool_calls"
    assert events.count("tool_calls.function.arguments.done") == 1
    assert second.choices[0].message.content == "Sunny."
    assert second.choices[0].finish_reason == "stop"


async def test_calls_that_are_required_have_valid_arguments(client: openai.AsyncOpenAI) -> None:
    """The echo engine would repeat the prompt, which is no call."""
    required = await client.chat.completions.create(
        model="auto", messages=saying("Hi"), tools=[WEATHER], tool_choice="required", max_tokens=500
    )
    named = await client.chat.completions.create(
        model="auto", messages=saying(WRITTEN), tools=[WEATHER], tool_choice=NAMED
    )

    for answer, reason in ((required, "tool_calls"), (named, "stop")):
        choice = answer.choices[0]
        assert choice.message.content is None
        assert choice.finish_reason == reason
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        assert Place.model_validate_json(call.function.arguments)


async def test_text_completions_have_vllms_forms(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="small", prompt="no", extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )

    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("no", "stop")


async def test_what_cannot_be_enforced_is_refused_with_its_place(client: openai.AsyncOpenAI) -> None:
    schema: dict[str, object] = {"type": "object", "properties": {"a": {"not": {"minimum": 1}}}}
    with pytest.raises(openai.BadRequestError) as form:
        await client.chat.completions.create(
            model="auto",
            messages=MESSAGES,
            response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        )
    with pytest.raises(openai.BadRequestError) as tool:
        await client.chat.completions.create(
            model="auto",
            messages=MESSAGES,
            tools=[WEATHER, {"type": "function", "function": {"name": "f", "parameters": schema}}],
        )
    with pytest.raises(openai.BadRequestError) as grammar:
        await client.chat.completions.create(
            model="auto", messages=MESSAGES, extra_body={"structured_outputs": {"grammar": "start: ("}}
        )

    assert form.value.param == "response_format.json_schema.schema"
    assert "/properties/a" in form.value.message
    assert tool.value.param == "tools[1].function.parameters"
    assert "/properties/a" in tool.value.message
    assert grammar.value.param == "structured_outputs.grammar"


async def curl(*arguments: str) -> tuple[int | None, str]:
    """Run curl. Returns its exit status and what it printed."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sS", "--max-time", str(int(PATIENCE)), *arguments), stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    return process.returncode, printed.decode()


async def test_curl_gets_an_answer_and_its_headers(served: Served) -> None:
    body = json.dumps({"messages": MESSAGES})
    url = f"{served.url}/chat/completions"
    status, printed = await curl("-i", "-H", "Content-Type: application/json", "-d", body, url)

    head, _, answer = printed.partition("\r\n\r\n")
    assert status == 0
    assert head.startswith("HTTP/1.1 200 ")
    assert "\r\nx-headrace-tier: " in head
    assert json.loads(answer)["choices"][0]["message"]["content"] == TEXT


async def test_curl_reads_a_stream(served: Served) -> None:
    body = json.dumps({"model": "auto", "messages": MESSAGES, "stream": True})
    url = f"{served.url}/chat/completions"
    status, printed = await curl("-N", "-H", "Content-Type: application/json", "-d", body, url)

    events = printed.split("\n\n")
    assert status == 0
    assert events[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(event[6:])["choices"][0]["delta"].get("content", "") for event in events[:-2]]
    assert "".join(texts) == TEXT


async def test_many_streams_at_the_same_time_are_not_mixed_up(served: Served) -> None:
    async def ask(number: int) -> str:
        body = {"messages": [{"role": "user", "content": f"I am {number}"}], "stream": True, "n": 2}
        response = await http.post("/chat/completions", json=body)
        return response.text

    async with httpx2.AsyncClient(base_url=served.url, timeout=PATIENCE) as http:
        texts = await asyncio.gather(*(ask(number) for number in range(16)))

    for number, text in enumerate(texts):
        chunks = [json.loads(event[6:]) for event in text.split("\n\n") if event.startswith("data: {")]
        assert len({chunk["id"] for chunk in chunks}) == 1
        for index in (0, 1):
            deltas = [chunk["choices"][0] for chunk in chunks]
            mine = [delta["delta"].get("content", "") for delta in deltas if delta["index"] == index]
            assert "".join(mine) == f"I am {number}"

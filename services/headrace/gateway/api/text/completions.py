"""Answer /v1/completions: the continuation of prompts, which are text or token ids, as they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from headrace.client import Client
from headrace.gateway.api.choices import Event, answers
from headrace.gateway.api.hints import hints_of
from headrace.gateway.api.models import Models
from headrace.gateway.api.reading import ignored_header, read
from headrace.gateway.api.streaming import deliver
from headrace.gateway.api.tally import Tally
from headrace.gateway.api.text.format import TextFormat
from headrace.gateway.api.text.parameters import TextParameters, requests_of
from headrace.gateway.http.exchange import Exchange
from headrace.gateway.pace import Pace
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import tokenizer_service_pb2 as tokenizer_pb
from headrace.validation import check_request

_OF_ONE = "token ids are valid for one model only"
_AT_ONCE = 16  # calls that return the text of a prompt


class TextCompletions:
    """Text completions, answered by the mesh."""

    def __init__(self, client: Client, models: Models, pace: Pace) -> None:
        self._client = client
        self._models = models
        self._pace = pace

    async def complete(self, exchange: Exchange) -> None:
        """Answer one request. Raises Problem and HeadraceError."""
        parameters, sampling, unused = await exchange.read(_asked)
        exchange.params = parameters.params()
        parameters.release()
        hints = await hints_of(exchange, parameters, self._models, prefix="cmpl-")
        routing = hints.routing
        if not parameters.is_text:
            await self._models.pin_one(routing, _OF_ONE, metadata=exchange.metadata)
        options = pb.StreamOptions(include_token_ids=parameters.return_token_ids)
        requests = requests_of(parameters.prompt, hints.id, sampling, routing, options)
        for request in requests:
            check_request(request)
        echoed = await self._texts(parameters, routing, exchange) if parameters.echo else []
        n = parameters.choices
        events = answers(
            self._client, requests, self._pace, n=n, timeout=hints.timeout, metadata=exchange.metadata
        )
        await deliver(
            exchange,
            _without_answers(events) if parameters.echo_only else events,
            TextFormat(parameters, hints.id, echoed),
            Tally(choices=len(requests) * n, n=n),
            streams=bool(parameters.stream),
            include_usage=parameters.includes_usage,
            headers=ignored_header((*unused, *hints.ignored)),
        )

    async def _texts(self, parameters: TextParameters, routing: pb.Routing, exchange: Exchange) -> list[str]:
        """Return the text of each prompt."""
        choice = tokenizer_pb.TokenizerChoice(tier=routing.tier, model=routing.model)
        room = asyncio.Semaphore(_AT_ONCE)

        async def text_of(prompt: str | list[int]) -> str:
            if isinstance(prompt, str):
                return prompt
            request = tokenizer_pb.DetokenizeRequest(token_ids=prompt, tokenizer=choice)
            async with room:
                return (await self._client.detokenize(request, metadata=exchange.metadata)).text

        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(text_of(prompt)) for prompt in parameters.prompt]
        return [call.result() for call in calls]


def _asked(body: dict[str, Any], large: bool) -> tuple[TextParameters, pb.Sampling, list[str]]:
    """Return the parameters, how tokens are sampled, and the names of parameters that are ignored."""
    parameters = read(TextParameters, body, large=large)
    unused = parameters.unused()
    return parameters, parameters.sampling(), unused


async def _without_answers(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """Leave out the answers, which were requested only because the mesh generates at least one token."""
    async with aclosing(events):
        async for index, response in events:
            if response.HasField("delta"):
                continue
            if response.HasField("finish"):
                response.finish.reason = pb.FINISH_REASON_LENGTH
                response.finish.stop_sequence = ""
                response.finish.usage.completion_tokens = 0
            yield index, response

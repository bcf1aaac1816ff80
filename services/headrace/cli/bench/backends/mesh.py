"""Send requests to a Headrace server over gRPC as any client does, with retries and resumption."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import TYPE_CHECKING

from headrace import errors
from headrace.cli.answers import finish_name
from headrace.cli.bench.records import ENDED_EARLY, Failed
from headrace.client import chat
from headrace.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from headrace.cli.bench.prompts import Prompt
    from headrace.cli.bench.records import Record
    from headrace.client import Client


class MeshFailed(Failed):
    """A request failed with an error of Headrace or of gRPC."""

    def __init__(self, error: errors.HeadraceError) -> None:
        super().__init__(error.reason, error.message)
        self.error = error


class MeshBackend:
    """A router or batcher.

    tier, model   restrict the requests, as in `Routing`
    chat_api      whether prompts are conversations; else they are raw text to continue
    """

    name = "headrace"

    def __init__(
        self,
        client: Client,
        *,
        where: str,
        tier: str = "",
        model: str = "",
        temperature: float | None = None,
        chat_api: bool = True,
    ) -> None:
        self.where = where
        self.model = model
        self._client = client
        self._tier = tier
        self._pinned = model
        self._temperature = temperature
        self._chat_api = chat_api

    async def ask(self, prompt: Prompt, record: Record, *, timeout: float) -> None:
        """Send one request; see `Backend`."""
        times, counts, parts, now = record.times, record.counts, record.parts, time.perf_counter
        try:
            request = self._request(prompt)
            async with aclosing(self._client.generate(request, timeout=timeout)) as stream:
                async for response in stream:
                    if response.HasField("delta"):
                        if tokens := response.delta.token_count:
                            times.append(now())
                            counts.append(tokens)
                        if parts is not None:
                            parts.append(response.delta.text)
                    elif response.HasField("accepted"):
                        accepted = response.accepted
                        record.tier, record.model = accepted.tier, accepted.model
                        record.input_tokens = accepted.prompt_tokens or None
                    elif response.HasField("route_change"):
                        record.moves.append(response.route_change.reason)
                    elif response.HasField("finish"):
                        _finish(record, response.finish)
        except errors.HeadraceError as error:
            raise MeshFailed(error) from error
        if not record.finish:
            raise Failed(ENDED_EARLY, "the stream ended without a finish")
        self.model = self.model or record.model
        record.succeed()

    def text_of(self, record: Record) -> str:
        """Return the text of an answer."""
        return "".join(record.parts or ())

    def _request(self, prompt: Prompt) -> pb.GenerateRequest:
        request = chat(prompt.turns) if self._chat_api else pb.GenerateRequest(prompt=prompt.text or "")
        request.sampling.max_tokens = prompt.max_tokens
        request.sampling.ignore_eos = prompt.exact
        if self._temperature is not None:
            request.sampling.temperature = self._temperature
        request.routing.tier = self._tier
        request.routing.model = self._pinned
        request.stream.include_route_changes = True
        return request


def _finish(record: Record, finish: pb.Finish) -> None:
    record.finish = finish_name(finish.reason)
    record.input_tokens = finish.usage.prompt_tokens or record.input_tokens
    record.output_tokens = finish.usage.completion_tokens
    record.cached_tokens = finish.usage.cached_tokens
    if finish.bill.HasField("cost"):
        record.cost = finish.bill.cost
    if finish.bill.HasField("largest_tier_cost"):
        record.largest_cost = finish.bill.largest_tier_cost

"""Answer /v1/completions: the continuation of prompts, which are text or token ids, as they are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from headrace.client import Client
from headrace.gateway.api.chat import ending
from headrace.gateway.api.choices import Event, answers
from headrace.gateway.api.hints import hints_of
from headrace.gateway.api.models import Models
from headrace.gateway.api.parameters import check
from headrace.gateway.api.reading import ignored_header, read
from headrace.gateway.api.streaming import Whole, gather, json_bytes, json_text, stream
from headrace.gateway.api.tally import Tally, fingerprint
from headrace.gateway.api.text.logprobs import TextLogprobs
from headrace.gateway.api.text.parameters import TextParameters, requests_of
from headrace.gateway.http.exchange import Exchange
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import tokenizer_service_pb2 as tokenizer_pb


class TextCompletions:
    """Text completions, answered by the mesh."""

    def __init__(self, client: Client, models: Models) -> None:
        self._client = client
        self._models = models

    async def complete(self, exchange: Exchange) -> None:
        """Answer one request. Raises Problem and HeadraceError."""
        parameters = read(TextParameters, exchange.body)
        unused = parameters.unused()
        sampling = parameters.sampling()
        hints = await hints_of(exchange, parameters, self._models, prefix="cmpl-")
        routing = hints.routing
        if not parameters.texts:
            await self._models.pin_ids(routing, metadata=exchange.metadata)
        options = pb.StreamOptions(include_token_ids=parameters.return_token_ids)
        requests = requests_of(parameters.prompt, hints.id, sampling, routing, options)
        for request in requests:
            check(request)
        if parameters.stream_options is not None and not parameters.stream:
            unused.append("stream_options")
        headers = ignored_header((*unused, *hints.ignored))
        echoed = await self._echoed(parameters, routing, exchange) if parameters.echo else []
        tally = Tally(parameters.total, parameters.choices)
        reply = _Reply(parameters, hints.id, echoed)
        events = answers(
            self._client,
            requests,
            n=parameters.choices,
            timeout=hints.timeout,
            metadata=exchange.metadata,
        )
        if parameters.echo_only:
            events = _without_answers(events)
        async with aclosing(events):
            if parameters.stream:
                await stream(
                    exchange,
                    events,
                    TextChunks(reply, tally),
                    tally,
                    include_usage=parameters.includes_usage,
                    headers=headers,
                )
                return
            wholes = await gather(events, tally)
        await exchange.reply(
            reply.whole(wholes, tally), headers={**tally.headers(), **tally.cost_header(), **headers}
        )

    async def _echoed(self, parameters: TextParameters, routing: pb.Routing, exchange: Exchange) -> list[str]:
        """Return the text of each prompt."""
        choice = tokenizer_pb.TokenizerChoice(tier=routing.tier, model=routing.model)

        async def text_of(prompt: str | list[int]) -> str:
            if isinstance(prompt, str):
                return prompt
            request = tokenizer_pb.DetokenizeRequest(token_ids=prompt, tokenizer=choice)
            return (await self._client.detokenize(request, metadata=exchange.metadata)).text

        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(text_of(prompt)) for prompt in parameters.prompt]
        return [call.result() for call in calls]


async def _without_answers(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """Leave the answers out, which were requested only because the mesh generates at least one token."""
    async with aclosing(events):
        async for index, response in events:
            if response.HasField("delta"):
                continue
            if response.HasField("finish"):
                response.finish.reason = pb.FINISH_REASON_LENGTH
                response.finish.stop_sequence = ""
                response.finish.usage.completion_tokens = 0
            yield index, response


class _Reply:
    """The objects of one reply.

    logprobs, token_ids   whether choices contain them
    echoed                the text of each prompt, if the choices begin with it
    """

    def __init__(self, parameters: TextParameters, id: str, echoed: list[str]) -> None:
        self.logprobs = parameters.logprobs is not None
        self.token_ids = bool(parameters.return_token_ids)
        self.includes_usage = parameters.includes_usage
        self.n = parameters.choices
        self.echoed = echoed
        self._as_ids = bool(parameters.return_tokens_as_token_ids)
        self._with_stop = bool(parameters.include_stop_str_in_output)
        self._id = id
        self._created = int(time.time())

    def head(self, accepted: pb.Accepted) -> dict[str, object]:
        """Return what a response and each of its chunks begins with."""
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": accepted.model,
            "system_fingerprint": fingerprint(accepted.tier, accepted.model),
        }

    def whole(self, wholes: list[Whole], tally: Tally) -> dict[str, object]:
        """Return the whole response."""
        return {
            **self.head(tally.first),
            "choices": [
                self._choice(index, whole, wholes[index - index % self.n].prompt, tally.finished[index])
                for index, whole in enumerate(wholes)
            ],
            "usage": tally.usage(),
            "headrace": tally.headrace(),
        }

    def _choice(
        self, index: int, whole: Whole, prompt: list[pb.TokenLogprobs], finish: pb.Finish
    ) -> dict[str, object]:
        details = self.details()
        details.add(prompt)
        details.move(len(self.echo(index)))
        details.add(whole.tokens)
        choice: dict[str, object] = {
            "index": index,
            "text": self.echo(index) + whole.text + self.stop_text(finish),
            "logprobs": details.take() if self.logprobs else None,
            **ending(finish),
        }
        if self.token_ids:
            choice["token_ids"] = whole.ids
        return choice

    def echo(self, index: int) -> str:
        """Return what the text of a choice begins with."""
        return self.echoed[index // self.n] if self.echoed else ""

    def details(self) -> TextLogprobs:
        """Return the log-probabilities of a choice, without tokens."""
        return TextLogprobs(as_ids=self._as_ids)

    def stop_text(self, finish: pb.Finish) -> str:
        """Return the stop text, if the answer ends with it."""
        return finish.stop_sequence if self._with_stop else ""


class TextChunks:
    """The chunks of a streamed text completion. The prompts are chunks of their own, if they are echoed."""

    def __init__(self, reply: _Reply, tally: Tally) -> None:
        self._reply = reply
        self._tally = tally
        self._tail = b',"usage":null}' if reply.includes_usage else b"}"
        self._end = b',"logprobs":null,"finish_reason":null}]' + self._tail
        self._starts: dict[int, bytes] = {}  # by choice: what each chunk begins with, up to its text
        self._head: dict[str, object] = {}
        self._details: dict[int, TextLogprobs] = {}  # by choice
        self._prompts: dict[int, list[pb.TokenLogprobs]] = {}  # by the choice that received them

    def begin(self, index: int, accepted: pb.Accepted) -> bytes | None:
        """Return the chunk with the prompt, if it is echoed and its tokens are not about to come."""
        head = self._reply.head(accepted)
        self._head = self._head or head
        self._starts[index] = json_bytes(head)[:-1] + b',"choices":[{"index":%d,"text":' % index
        self._details[index] = self._reply.details()
        if not self._reply.echoed:
            return None
        if not self._reply.logprobs:
            return self._starts[index] + json_text(self._reply.echo(index)) + self._end
        first = index - index % self._reply.n
        return None if first == index else self._echo(index, self._prompts[first])

    def prompt(self, index: int, part: pb.PromptTokens) -> bytes | None:
        """Return the chunk with the prompt, once all its tokens are known."""
        tokens = self._prompts.setdefault(index, [])
        tokens.extend(part.tokens)
        complete = len(tokens) == self._tally.accepted[index].prompt_tokens
        return self._echo(index, tokens) if complete else None

    def _echo(self, index: int, tokens: list[pb.TokenLogprobs]) -> bytes:
        details, text = self._details[index], self._reply.echo(index)
        details.add(tokens)
        details.move(len(text))
        return self._chunk(index, text, {"logprobs": details.take(), "finish_reason": None})

    def delta(self, index: int, delta: pb.Delta) -> bytes | None:
        """Return the chunk for a part of an answer; None for one that has no text yet."""
        text = delta.text
        if not (self._reply.logprobs or self._reply.token_ids):
            return self._starts[index] + json_text(text) + self._end if text else None
        more: dict[str, object] = {"logprobs": None, "finish_reason": None}
        if self._reply.logprobs:
            details = self._details[index]
            details.add(delta.tokens)
            more["logprobs"] = details.take()
        if self._reply.token_ids:
            more["token_ids"] = list(delta.token_ids)
        return self._chunk(index, text, more)

    def finish(self, index: int, finish: pb.Finish, headrace: Mapping[str, object] | None) -> bytes:
        """Return the chunk for the end of an answer."""
        more = {"logprobs": None, **ending(finish)}
        return self._chunk(index, self._reply.stop_text(finish), more, headrace)

    def usage(self, usage: Mapping[str, object], headrace: Mapping[str, object]) -> bytes:
        """Return the last chunk, without choices."""
        return json_bytes({**self._head, "choices": [], "usage": usage, "headrace": headrace})

    def _chunk(
        self,
        index: int,
        text: str,
        more: Mapping[str, object],
        headrace: Mapping[str, object] | None = None,
    ) -> bytes:
        facts = b"" if headrace is None else b',"headrace":' + json_bytes(headrace)
        closed = b"," + json_bytes(more)[1:] + b"]" + facts + self._tail
        return self._starts[index] + json_text(text) + closed

"""Send the answers of a request as server-sent events, or gather them for one response.

A delta is the hot path: a gateway sends thousands per second. So the parts of a chunk that stay the same are
bytes that are made once for each choice, and only the text of the delta is encoded.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii
from typing import Protocol

from headrace.gateway.api.choices import Event
from headrace.gateway.api.tally import Tally
from headrace.gateway.http.exchange import Exchange
from headrace.v1 import generation_pb2 as pb


class Format(Protocol):
    """How an API represents answers: whole ones, and chunks as JSON; None if it has no chunk for an event.

    One event may become `several` chunks.
    """

    def whole(self, wholes: list[Whole], tally: Tally) -> dict[str, object]:
        """Return the whole response."""

    def begin(self, index: int, accepted: pb.Accepted) -> bytes | None:
        """Return the chunk for the beginning of an answer."""

    def prompt(self, index: int, part: pb.PromptTokens) -> bytes | None:
        """Return the chunk for a part of the prompt."""

    def delta(self, index: int, delta: pb.Delta) -> bytes | None:
        """Return the chunk for a part of an answer."""

    def finish(self, index: int, finish: pb.Finish, headrace: Mapping[str, object] | None) -> bytes:
        """Return the chunk for the end of an answer; *headrace* belongs to the last chunk of a stream."""

    def usage(self, usage: Mapping[str, object], headrace: Mapping[str, object]) -> bytes:
        """Return the last chunk, without choices."""


async def deliver(
    exchange: Exchange,
    events: AsyncGenerator[Event, None],
    form: Format,
    tally: Tally,
    *,
    streams: bool,
    include_usage: bool,
    headers: Mapping[str, str],
) -> None:
    """Answer with what *events* bring, as chunks or as one response, and close them.

    headers   of the response, in addition to those that say who answers
    """
    async with aclosing(events):
        if streams:
            await stream(exchange, events, form, tally, include_usage=include_usage, headers=headers)
            return
        wholes = await gather(events, tally)
    await exchange.reply(
        form.whole(wholes, tally), headers={**tally.headers(), **tally.cost_header(), **headers}
    )


async def stream(
    exchange: Exchange,
    events: AsyncIterator[Event],
    form: Format,
    tally: Tally,
    *,
    include_usage: bool,
    headers: Mapping[str, str],
) -> None:
    """Send *events* as chunks, and [DONE].

    The response starts with the first `accepted`: an error before it has a status of its own.
    """
    last: list[bytes] = []  # sent with the end
    async for index, response in events:
        event = response.WhichOneof("event")
        data: bytes | None
        if event == "delta":
            data = form.delta(index, response.delta)
            exchange.first_token()
        elif event == "accepted":
            begins = not tally.accepted
            tally.accepted[index] = response.accepted
            if begins:
                await exchange.start_events({**tally.headers(), **headers})
            data = form.begin(index, response.accepted)
        elif event == "finish":
            tally.finished[index] = response.finish
            complete = tally.complete
            facts = tally.headrace() if complete and not include_usage else None
            data = form.finish(index, response.finish, facts)
            if complete:
                last.append(data)
                continue
        elif event == "prompt_tokens":
            data = form.prompt(index, response.prompt_tokens)
        else:
            data = None
        if data is not None:
            await exchange.send_event(data)
    if include_usage:
        last.append(form.usage(tally.usage(), tally.headrace()))
    await exchange.end_events(*last, b"[DONE]")


@dataclass
class WholeCall:
    """A whole call of a tool."""

    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


@dataclass
class Whole:
    """A whole answer.

    thoughts   what the model thinks before the text
    calls      of tools, by their index
    prompt     the tokens of the prompt, if they were requested
    tokens     the details of the answer's tokens, if they were requested
    ids        of the answer's tokens, if they were requested; None if it is text alone
    """

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: dict[int, WholeCall] = field(default_factory=dict)
    prompt: list[pb.TokenLogprobs] = field(default_factory=list)
    tokens: list[pb.TokenLogprobs] = field(default_factory=list)
    ids: list[int] | None = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text of the answer."""
        return "".join(self.texts)

    def add(self, delta: pb.Delta) -> None:
        """Append a part of the answer."""
        self.texts.append(delta.text)
        if delta.reasoning:
            self.thoughts.append(delta.reasoning)
        for part in delta.tool_calls:
            call = self.calls.setdefault(part.index, WholeCall())
            call.id, call.name = call.id or part.id, call.name or part.name
            call.arguments.append(part.arguments)
        self.tokens.extend(delta.tokens)
        if self.ids is not None:
            self.ids.extend(delta.token_ids)


async def gather(events: AsyncIterator[Event], tally: Tally) -> list[Whole]:
    """Read all *events*. Returns the answers in the order of their index."""
    wholes = [Whole() for _ in range(tally.choices)]
    async for index, response in events:
        event = response.WhichOneof("event")
        whole = wholes[index]
        if event == "delta":
            whole.add(response.delta)
        elif event == "accepted":
            tally.accepted[index] = response.accepted
            if response.accepted.text_only:
                whole.ids = None
        elif event == "finish":
            tally.finished[index] = response.finish
        elif event == "prompt_tokens":
            whole.prompt.extend(response.prompt_tokens.tokens)
    return wholes


def several(chunks: Sequence[bytes]) -> bytes:
    """Return several chunks as one, which `Exchange.send_event` sends as so many events, at once."""
    return b"\n\ndata: ".join(chunks)


def json_text(text: str) -> bytes:
    """Return *text* as JSON. Four times as fast as `json.dumps`."""
    return encode_basestring_ascii(text).encode()


_JSON = json.JSONEncoder(separators=(",", ":"))


def json_bytes(value: object) -> bytes:
    """Return *value* as JSON, without spaces."""
    return _JSON.encode(value).encode()

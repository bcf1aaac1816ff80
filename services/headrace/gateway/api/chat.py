"""Answer /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from headrace.client import Client
from headrace.gateway.api.chat_parameters import ChatParameters
from headrace.gateway.api.choices import answers
from headrace.gateway.api.hints import hints_of
from headrace.gateway.api.models import Models
from headrace.gateway.api.reading import ignored_header, read
from headrace.gateway.api.streaming import Whole, deliver, json_bytes, json_text
from headrace.gateway.api.tally import Tally, ending, head
from headrace.gateway.api.token_details import chat_token
from headrace.gateway.http.exchange import Exchange
from headrace.gateway.pace import Pace
from headrace.v1 import generation_pb2 as pb
from headrace.validation import check_request


class ChatCompletions:
    """Chat completions, answered by the mesh."""

    def __init__(self, client: Client, models: Models, pace: Pace) -> None:
        self._client = client
        self._models = models
        self._pace = pace

    async def complete(self, exchange: Exchange) -> None:
        """Answer one request. Raises Problem and HeadraceError."""
        parameters = read(ChatParameters, await exchange.json())
        exchange.params = parameters.params()
        unused = parameters.unused()
        sampling, chat = parameters.sampling(), parameters.chat()
        parameters.release("messages", "chat_template_kwargs")
        hints = await hints_of(exchange, parameters, self._models, prefix="chatcmpl-")
        request = pb.GenerateRequest(
            request_id=hints.id,
            chat=chat,
            sampling=sampling,
            routing=hints.routing,
            stream=pb.StreamOptions(include_token_ids=parameters.return_token_ids),
        )
        check_request(request)
        n = parameters.choices
        await deliver(
            exchange,
            answers(
                self._client, [request], self._pace, n=n, timeout=hints.timeout, metadata=exchange.metadata
            ),
            ChatFormat(parameters, hints.id),
            Tally(choices=n, n=n),
            streams=bool(parameters.stream),
            include_usage=parameters.includes_usage,
            headers=ignored_header((*unused, *hints.ignored)),
        )


class ChatFormat:
    """Chat completions in OpenAI's shape, whole and as chunks."""

    def __init__(self, parameters: ChatParameters, id: str) -> None:
        self._logprobs = bool(parameters.logprobs)
        self._token_ids = bool(parameters.return_token_ids)
        self._tokens_as_ids = bool(parameters.return_tokens_as_token_ids)
        self._with_stop = bool(parameters.include_stop_str_in_output)
        self._id = id
        self._created = int(time.time())
        self._head: dict[str, object] = {}
        self._starts: dict[int, bytes] = {}  # of a delta's chunk, up to its text, by choice
        self._tail = b',"usage":null}' if parameters.includes_usage else b"}"
        self._end = b'},"logprobs":null,"finish_reason":null}]' + self._tail

    def whole(self, wholes: Sequence[Whole], tally: Tally) -> dict[str, object]:
        """Return the whole response."""
        return {
            **head(self._id, "chat.completion", self._created, tally.first),
            "choices": [
                self._choice(index, whole, tally.finished[index]) for index, whole in enumerate(wholes)
            ],
            "usage": tally.usage(),
            "headrace": tally.headrace(),
        }

    def begin(self, index: int, accepted: pb.Accepted) -> bytes:
        """Return the chunk with the role."""
        if not self._head:
            self._head = head(self._id, "chat.completion.chunk", self._created, accepted)
        start = json_bytes(self._head)[:-1] + b',"choices":[{"index":%d,"delta":{' % index
        self._starts[index] = start + b'"content":'
        return start + b'"role":"assistant","content":"","refusal":null' + self._end

    def prompt(self, index: int, part: pb.PromptTokens) -> None:
        """Chat completions have no tokens of the prompt."""

    def delta(self, index: int, delta: pb.Delta) -> bytes | None:
        """Return the chunk for a part of an answer; None for one that has no text yet."""
        text = delta.text
        if not (self._logprobs or self._token_ids):
            return self._starts[index] + json_text(text) + self._end if text else None
        more: dict[str, object] = {"logprobs": self._details(delta.tokens), "finish_reason": None}
        if self._token_ids:
            more["token_ids"] = list(delta.token_ids)
        return self._chunk(index, text, more, None)

    def finish(self, index: int, finish: pb.Finish, headrace: Mapping[str, object] | None) -> bytes:
        """Return the chunk for the end of an answer."""
        return self._chunk(index, self._stop_text(finish), {"logprobs": None, **ending(finish)}, headrace)

    def usage(self, usage: Mapping[str, object], headrace: Mapping[str, object]) -> bytes:
        """Return the last chunk, without choices."""
        return json_bytes({**self._head, "choices": [], "usage": usage, "headrace": headrace})

    def _choice(self, index: int, whole: Whole, finish: pb.Finish) -> dict[str, object]:
        choice: dict[str, object] = {
            "index": index,
            "message": {
                "role": "assistant",
                "content": whole.text + self._stop_text(finish),
                "refusal": None,
                "annotations": [],
            },
            "logprobs": self._details(whole.tokens),
            **ending(finish),
        }
        if self._token_ids:
            choice["token_ids"] = whole.ids
        return choice

    def _details(self, tokens: Sequence[pb.TokenLogprobs]) -> dict[str, object] | None:
        if not self._logprobs:
            return None
        return {
            "content": [chat_token(token, as_id=self._tokens_as_ids) for token in tokens],
            "refusal": None,
        }

    def _stop_text(self, finish: pb.Finish) -> str:
        return finish.stop_sequence if self._with_stop else ""

    def _chunk(
        self,
        index: int,
        text: str,
        more: Mapping[str, object],
        headrace: Mapping[str, object] | None,
    ) -> bytes:
        """Return a chunk with other fields than the usual ones."""
        start = self._starts[index]
        content = start + json_text(text) if text else start.removesuffix(b'"content":')
        facts = b"" if headrace is None else b',"headrace":' + json_bytes(headrace)
        return content + b"}," + json_bytes(more)[1:] + b"]" + facts + self._tail

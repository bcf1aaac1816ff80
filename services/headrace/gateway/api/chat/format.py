"""Represent chat completions in OpenAI's shape, whole and as chunks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from headrace.gateway.api.chat.parameters import ChatParameters
from headrace.gateway.api.streaming import Whole, json_bytes, json_text
from headrace.gateway.api.tally import Tally, ending, head
from headrace.gateway.api.token_details import chat_token
from headrace.v1 import generation_pb2 as pb


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

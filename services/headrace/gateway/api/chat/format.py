"""Represent chat completions in OpenAI's shape, whole and as chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from headrace.gateway.api.chat.parameters import ChatParameters
from headrace.gateway.api.streaming import Whole, json_bytes, json_text, several
from headrace.gateway.api.tally import Tally, ending, head
from headrace.gateway.api.token_details import chat_token
from headrace.v1 import generation_pb2 as pb

_CONTENT = b'"content":'


class ChatFormat:
    """Chat completions in OpenAI's shape, whole and as chunks.

    What a model thinks is `reasoning`, as in vLLM, and also `reasoning_content`, as in DeepSeek's API and
    earlier in vLLM: clients read one or the other.

    An answer of text alone has null as `token_ids`, which vLLM's API allows, and as `logprobs` where the
    service that computes it reports none.

    chat   the conversation
    """

    def __init__(self, parameters: ChatParameters, id: str, chat: pb.Chat) -> None:
        choice = chat.tool_choice
        self._may_call = bool(chat.tools) and choice.mode != pb.TOOL_MODE_NONE
        # With a named tool, the call is no decision of the model: as in OpenAI's API, the reason is "stop".
        self._decides = not choice.HasField("name")
        self._thoughts = parameters.include_reasoning is not False
        self._logprobs = bool(parameters.logprobs)
        self._token_ids = bool(parameters.return_token_ids)
        self._tokens_as_ids = bool(parameters.return_tokens_as_token_ids)
        self._with_stop = bool(parameters.include_stop_str_in_output)
        self._id = id
        self._created = int(time.time())
        self._head: dict[str, object] = {}
        self._opens: dict[int, bytes] = {}  # of a chunk, up to its `delta`, by choice
        self._starts: dict[int, bytes] = {}  # up to the text; empty until thoughts and details cannot come
        self._called: set[int] = set()  # choices with a call
        self._text_only: set[int] = set()  # choices without ids
        self._detailed = self._logprobs or self._token_ids
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
        if accepted.text_only:
            self._text_only.add(index)
        start = json_bytes(self._head)[:-1] + b',"choices":[{"index":%d,"delta":{' % index
        self._opens[index], self._starts[index] = start, b""
        # An answer that consists of calls has no content.
        content = b"null" if self._may_call else b'""'
        return start + b'"role":"assistant","content":' + content + b',"refusal":null' + self._end

    def prompt(self, index: int, part: pb.PromptTokens) -> None:
        """Chat completions have no tokens of the prompt."""

    def delta(self, index: int, delta: pb.Delta) -> bytes | None:
        """Return the chunks for a part of an answer; None for one that has no text yet."""
        text = delta.text
        if (start := self._starts[index]) and not (self._may_call and delta.tool_calls):
            return start + json_text(text) + self._end if text else None
        if text and not self._detailed:
            self._starts[index] = self._opens[index] + _CONTENT  # the model has thought before its text
        return self._chunks(index, delta)

    def finish(self, index: int, finish: pb.Finish, headrace: Mapping[str, object] | None) -> bytes:
        """Return the chunk for the end of an answer."""
        text = self._stop_text(finish)
        more = {"logprobs": None, **self._ending(finish, called=index in self._called)}
        return self._chunk(index, _CONTENT + json_text(text) if text else b"", more, headrace)

    def usage(self, usage: Mapping[str, object], headrace: Mapping[str, object]) -> bytes:
        """Return the last chunk, without choices."""
        return json_bytes({**self._head, "choices": [], "usage": usage, "headrace": headrace})

    def _choice(self, index: int, whole: Whole, finish: pb.Finish) -> dict[str, object]:
        text = whole.text + self._stop_text(finish)
        message: dict[str, object] = {
            "role": "assistant",
            "content": text if text or not whole.calls else None,
            "refusal": None,
            "annotations": [],
        }
        if whole.thoughts and self._thoughts:
            message["reasoning"] = message["reasoning_content"] = "".join(whole.thoughts)
        if whole.calls:
            message["tool_calls"] = [
                _call(call.id, call.name, "".join(call.arguments)) for call in whole.calls.values()
            ]
        choice: dict[str, object] = {
            "index": index,
            "message": message,
            "logprobs": self._details(whole.tokens, ids=whole.ids is not None),
            **self._ending(finish, called=bool(whole.calls)),
        }
        if self._token_ids:
            choice["token_ids"] = whole.ids
        return choice

    def _details(self, tokens: Sequence[pb.TokenLogprobs], *, ids: bool) -> dict[str, object] | None:
        """Return the log-probabilities, if there are any; *ids*: whether the tokens have ids."""
        if not (self._logprobs and (tokens or ids)):
            return None
        return {
            "content": [chat_token(token, as_id=self._tokens_as_ids and ids) for token in tokens],
            "refusal": None,
        }

    def _stop_text(self, finish: pb.Finish) -> str:
        return finish.stop_sequence if self._with_stop else ""

    def _ending(self, finish: pb.Finish, *, called: bool) -> dict[str, object]:
        return ending(finish, calls=called and self._decides)

    def _chunks(self, index: int, delta: pb.Delta) -> bytes | None:
        bodies = [*self._bodies(index, delta)]
        more: dict[str, object] | None = None
        if self._detailed:
            ids = index not in self._text_only
            more = {"logprobs": self._details(delta.tokens, ids=ids), "finish_reason": None}
            if self._token_ids:
                more["token_ids"] = list(delta.token_ids) if ids else None
            bodies = bodies or [b""]
        if not bodies:
            return None
        chunks = [self._chunk(index, bodies[0], more), *(self._chunk(index, body) for body in bodies[1:])]
        return several(chunks)

    def _bodies(self, index: int, delta: pb.Delta) -> Iterator[bytes]:
        """Return what the chunks for a part of an answer contain as `delta`."""
        if self._thoughts and (reasoning := delta.reasoning):
            thought = json_text(reasoning)
            yield b'"reasoning":' + thought + b',"reasoning_content":' + thought
        if text := delta.text:
            yield _CONTENT + json_text(text)
        for part in delta.tool_calls:
            # As OpenAI does, the first chunk of a call has no arguments, and the others nothing else.
            if part.id:
                self._called.add(index)
                first = {"index": part.index, **_call(part.id, part.name, "")}
                yield b'"tool_calls":[' + json_bytes(first) + b"]"
            if arguments := part.arguments:
                yield b'"tool_calls":[{"index":%d,"function":{"arguments":%b}}]' % (
                    part.index,
                    json_text(arguments),
                )

    def _chunk(
        self,
        index: int,
        body: bytes,
        more: Mapping[str, object] | None = None,
        headrace: Mapping[str, object] | None = None,
    ) -> bytes:
        """Return a chunk.

        body       what `delta` contains
        more       the other fields of the choice; None: the usual ones
        headrace   in the last chunk
        """
        start = self._opens[index] + body
        if more is None:
            return start + self._end
        facts = b"" if headrace is None else b',"headrace":' + json_bytes(headrace)
        return start + b"}," + json_bytes(more)[1:] + b"]" + facts + self._tail


def _call(id: str, name: str, arguments: str) -> dict[str, object]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}

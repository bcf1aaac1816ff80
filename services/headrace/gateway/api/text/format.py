"""Represent text completions in OpenAI's shape, whole and as chunks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from headrace.gateway.api.streaming import Whole, json_bytes, json_text
from headrace.gateway.api.tally import Tally, ending, head
from headrace.gateway.api.text.logprobs import TextLogprobs
from headrace.gateway.api.text.parameters import TextParameters
from headrace.v1 import generation_pb2 as pb

_KIND = "text_completion"


class TextFormat:
    """Text completions. In a stream, an echoed prompt is the first chunk of each of its choices.

    For an answer of text alone see `ChatFormat`.

    echoed   the text of each prompt, with which its choices begin; empty without echo
    """

    def __init__(self, parameters: TextParameters, id: str, echoed: Sequence[str]) -> None:
        self._logprobs = parameters.logprobs is not None
        self._token_ids = bool(parameters.return_token_ids)
        self._tokens_as_ids = bool(parameters.return_tokens_as_token_ids)
        self._with_stop = bool(parameters.include_stop_str_in_output)
        self._n = parameters.choices
        self._echoed = echoed
        self._id = id
        self._created = int(time.time())
        self._head: dict[str, object] = {}
        self._starts: dict[int, bytes] = {}  # of a chunk, up to its text, by choice
        self._details: dict[int, TextLogprobs] = {}  # by choice
        self._prompts: dict[int, list[pb.TokenLogprobs]] = {}  # by the first choice of the prompt
        self._text_only: set[int] = set()  # choices without ids
        self._lengths: dict[int, int] = {}  # of the prompt in tokens, by choice
        self._tail = b',"usage":null}' if parameters.includes_usage else b"}"
        self._end = b',"logprobs":null,"finish_reason":null}]' + self._tail

    def whole(self, wholes: Sequence[Whole], tally: Tally) -> dict[str, object]:
        """Return the whole response."""
        return {
            **head(self._id, _KIND, self._created, tally.first),
            "choices": [
                self._choice(index, whole, wholes[self._first(index)].prompt, tally.finished[index])
                for index, whole in enumerate(wholes)
            ],
            "usage": tally.usage(),
            "headrace": tally.headrace(),
        }

    def begin(self, index: int, accepted: pb.Accepted) -> bytes | None:
        """Return the chunk with the prompt, if it is echoed and nothing about it is missing."""
        # Prompts are routed one by one, so another model may answer the next one.
        own = head(self._id, _KIND, self._created, accepted)
        self._head = self._head or own
        self._starts[index] = json_bytes(own)[:-1] + b',"choices":[{"index":%d,"text":' % index
        if accepted.text_only:
            self._text_only.add(index)
        self._details[index] = TextLogprobs(as_ids=self._tokens_as_ids and not accepted.text_only)
        self._lengths[index] = accepted.prompt_tokens
        if not self._echoed:
            return None
        if not self._logprobs:
            return self._starts[index] + json_text(self._echo(index)) + self._end
        first = self._first(index)
        return None if first == index else self._prompt_chunk(index, self._prompts[first])

    def prompt(self, index: int, part: pb.PromptTokens) -> bytes | None:
        """Return the chunk with the prompt, once all its tokens are known."""
        tokens = self._prompts.setdefault(index, [])
        tokens.extend(part.tokens)
        return self._prompt_chunk(index, tokens) if len(tokens) == self._lengths[index] else None

    def delta(self, index: int, delta: pb.Delta) -> bytes | None:
        """Return the chunk for a part of an answer; None for one that has no text yet."""
        text = delta.text
        if not (self._logprobs or self._token_ids):
            return self._starts[index] + json_text(text) + self._end if text else None
        ids = index not in self._text_only
        described = self._logprobs and (ids or delta.tokens)
        more: dict[str, object] = {
            "logprobs": self._taken(index, delta.tokens) if described else None,
            "finish_reason": None,
        }
        if self._token_ids:
            more["token_ids"] = list(delta.token_ids) if ids else None
        return self._chunk(index, text, more)

    def finish(self, index: int, finish: pb.Finish, headrace: Mapping[str, object] | None) -> bytes:
        """Return the chunk for the end of an answer."""
        return self._chunk(index, self._stop_text(finish), {"logprobs": None, **ending(finish)}, headrace)

    def usage(self, usage: Mapping[str, object], headrace: Mapping[str, object]) -> bytes:
        """Return the last chunk, without choices."""
        return json_bytes({**self._head, "choices": [], "usage": usage, "headrace": headrace})

    def _choice(
        self, index: int, whole: Whole, prompt: Sequence[pb.TokenLogprobs], finish: pb.Finish
    ) -> dict[str, object]:
        choice: dict[str, object] = {
            "index": index,
            "text": self._echo(index) + whole.text + self._stop_text(finish),
            "logprobs": None,
            **ending(finish),
        }
        ids = whole.ids is not None
        if self._logprobs and (ids or whole.tokens):
            details = TextLogprobs(as_ids=self._tokens_as_ids and ids)
            details.add(prompt)
            details.move(len(self._echo(index)))
            details.add(whole.tokens)
            choice["logprobs"] = details.take()
        if self._token_ids:
            choice["token_ids"] = whole.ids
        return choice

    def _first(self, index: int) -> int:
        """Return the first choice of a choice's prompt, which receives the prompt's tokens."""
        return index - index % self._n

    def _echo(self, index: int) -> str:
        return self._echoed[index // self._n] if self._echoed else ""

    def _stop_text(self, finish: pb.Finish) -> str:
        return finish.stop_sequence if self._with_stop else ""

    def _prompt_chunk(self, index: int, tokens: Sequence[pb.TokenLogprobs]) -> bytes:
        text = self._echo(index)
        logprobs = self._taken(index, tokens)
        self._details[index].move(len(text))
        return self._chunk(index, text, {"logprobs": logprobs, "finish_reason": None})

    def _taken(self, index: int, tokens: Sequence[pb.TokenLogprobs]) -> dict[str, object]:
        details = self._details[index]
        details.add(tokens)
        return details.take()

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

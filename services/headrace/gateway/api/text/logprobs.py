"""Write the `logprobs` of a text completion: parallel lists about its tokens, as OpenAI and vLLM do."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from headrace.gateway.api.token_details import logprob_of, token_text
from headrace.v1 import generation_pb2 as pb


class TextLogprobs:
    """Collects the tokens of one choice, those of the prompt and of the answer, in their order.

    as_ids   whether tokens are written as "token_id:42" instead of their text
    """

    def __init__(self, *, as_ids: bool = False) -> None:
        self._as_ids = as_ids
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, tokens: Iterable[pb.TokenLogprobs]) -> None:
        """Append tokens."""
        for details in tokens:
            token = details.token
            name = token_text(token, as_id=self._as_ids)
            self._tokens.append(name)
            self._offsets.append(self._offset)
            self._offset += len(self._decoder.decode(token.text))
            if not token.HasField("logprob"):  # the first token of a prompt
                self._logprobs.append(None)
                self._tops.append(None)
                continue
            logprob = logprob_of(token)
            # The most likely come first, and count if two tokens have the same text.
            top: dict[str, float] = {}
            for other in details.top:
                top.setdefault(token_text(other, as_id=self._as_ids), logprob_of(other))
            top.setdefault(name, logprob)
            self._logprobs.append(logprob)
            self._tops.append(top)

    def move(self, offset: int) -> None:
        """Set where the next token starts.

        A prompt may contain the names of special tokens, which have no text among its tokens.
        """
        self._decoder.reset()
        self._offset = offset

    def take(self) -> dict[str, object]:
        """Return the object for the tokens that were added since the last call."""
        taken: dict[str, object] = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._tops,
            "text_offset": self._offsets,
        }
        self._clear()
        return taken

"""Spell tokens one by one, and describe them with their log-probabilities for callers.

The texts of consecutive tokens concatenate to the text that `detokenizer` decodes. One of them may be a part
of a character.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.batcher.text.detokenizer import Spelling
from headrace.v1 import generation_pb2 as pb


class Spellings:
    """The spellings of a tokenizer's tokens within a text, cached: some tokenizers take long for each."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._within: dict[int, bytes] = {}  # at most one per token of the vocabulary

    def exact(self, id: int, after: int | None) -> tuple[bytes, bool]:
        """Return the bytes of *id* after the token *after*, and whether later tokens follow *id* then.

        See `Spelling.spell`: like `Detokenizer`, a token without text is passed over.
        """
        piece = self._spelling.spell(id, after)
        return (piece, bool(piece)) if isinstance(piece, bytes) else (piece.encode(), True)

    def usual(self, id: int, after: int | None) -> bytes:
        """Return the bytes of *id* after some token that has text; None: at the start of a text."""
        if after is None:
            return self.exact(id, None)[0]
        text = self._within.get(id)
        if text is None:
            text = self._within[id] = self.exact(id, after)[0]
        return text


class TokenDescriber:
    """Describes the tokens of one text, in order.

    after   the last token with text before the next one; None at the start of a text
    """

    def __init__(self, spellings: Spellings, after: int | None) -> None:
        self.after = after
        self._spellings = spellings

    def describe(
        self,
        described: pb.TokenLogprobs,
        id: int,
        logprob: float | None,
        top_ids: Sequence[int],
        top_logprobs: Sequence[float],
    ) -> None:
        """Fill *described* with the next token and the most likely tokens at its place.

        logprob   None for the first token of a prompt
        """
        after = self.after
        token = described.token
        token.id = id
        text, followed = self._spellings.exact(id, after)
        token.text = text
        if logprob is not None:
            token.logprob = logprob
        if followed:
            self.after = id
        usual, add = self._spellings.usual, described.top.add
        for other, likely in zip(top_ids, top_logprobs, strict=True):
            add(id=other, logprob=likely, text=text if other == id else usual(other, after))

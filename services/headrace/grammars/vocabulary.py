"""Give llguidance the tokens of a model, as the bytes that they add to a text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import llguidance

Encode = Callable[[str], Sequence[int]]  # text to ids, without special tokens around it

# Texts after which a tokenizer that puts a space in front of a text splits another one as inside of a text.
_ANCHORS = ("\n", "=", "0")

# A grammar forces the same texts in each answer, such as the names of a schema, and each takes some 60 us.
# Those that are remembered take 10 MiB at most.
_MOST_REMEMBERED, _LONGEST_REMEMBERED = 1024, 256  # texts; characters


class Spelling(Protocol):
    """How the tokens of a tokenizer are spelled; see `headrace.models.tokenizers.spelling.TokenSpelling`."""

    special_tokens: Mapping[str, int]

    def spell(self, id: int, after: int | None) -> bytes | str:
        """Return what a token adds to a text after another token."""
        ...


class Vocabulary:
    """The tokens of one model. Takes about half a second to make for 150,000 tokens, and a few MiB.

    tokens     the bytes that each id adds to a text; empty for special tokens and unused ids. As many as the
               model has logits
    specials   names and ids of the special tokens, which grammars write as <name>
    eos_ids    tokens that end an answer, at least one; allowed where the grammar may end
    encode     tokenises texts that a grammar forces, as the model would

    size        number of tokens
    tokenizer   for llguidance's classes
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        *,
        specials: Mapping[str, int],
        eos_ids: Collection[int],
        encode: Encode,
    ) -> None:
        self.size = len(tokens)
        self.eos_ids = sorted(eos_ids)
        self.tokens = tokens
        self.tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(tokens, specials, self.eos_ids, encode)),
            n_vocab=self.size,
            eos_token=self.eos_ids,
            slices=llguidance.LLTokenizer.json_slices(),
        )


class _Tokens:
    """The tokens in the shape that `llguidance.TokenizerWrapper` reads."""

    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], specials: Mapping[str, int], eos_ids: Sequence[int], encode: Encode
    ) -> None:
        self.tokens = list(tokens)
        self.eos_token_id = eos_ids[0]
        self.special_token_ids = sorted({*specials.values(), eos_ids[0]})
        # Those of a text: others end the answer, or are no text, whatever their names are.
        barred = {*self.special_token_ids, *eos_ids}
        self._texts = {id: token for id, token in enumerate(tokens) if token and id not in barred}
        for name, id in specials.items():
            self.tokens[id] = name.encode()
        self._encode = encode
        self._by_spelling: dict[bytes, int] = {}
        self._remembered = lru_cache(_MOST_REMEMBERED)(self._ids)

    def __call__(self, text: str) -> Sequence[int]:
        """Return ids that spell the text, which llguidance requires."""
        if not isinstance(text, str):
            raise TypeError("texts only")  # so that the wrapper passes texts, not bytes
        return self._remembered(text) if len(text) <= _LONGEST_REMEMBERED else self._ids(text)

    def _ids(self, text: str) -> Sequence[int]:
        wanted = text.encode()
        if self._spelled(ids := self._encode(text)) == wanted:
            return ids
        # Tokenizers of SentencePiece put a space in front of a text.
        for anchor in _ANCHORS:
            before = list(self._encode(anchor))
            ids = list(self._encode(anchor + text))
            if ids[: len(before)] == before and self._spelled(ids[len(before) :]) == wanted:
                return ids[len(before) :]
        return list(self._longest(wanted))

    def _spelled(self, ids: Sequence[int]) -> bytes:
        """Return the text of ids, as if those that have none were not there."""
        return b"".join(self._texts.get(id, b"") for id in ids)

    def _longest(self, text: bytes) -> Iterator[int]:
        """Yield the longest token at each place of a text, up to a byte that no token spells."""
        if not self._by_spelling:
            self._by_spelling = {token: id for id, token in self._texts.items()}
        longest = max(map(len, self._by_spelling))
        while text:
            for length in range(min(longest, len(text)), 0, -1):
                if (id := self._by_spelling.get(text[:length])) is not None:
                    break
            else:
                return
            yield id
            text = text[length:]


def spelled_tokens(fast: Any, spelling: Spelling) -> list[bytes]:
    """Return the bytes that each token of a `tokenizers.Tokenizer` adds inside of a text.

    Takes about a second for 150,000 tokens.
    """
    inside = fast.encode("a", add_special_tokens=False).ids
    after = inside[-1] if inside else None
    spelled = (spelling.spell(id, after) for id in range(max(fast.get_vocab().values()) + 1))
    return [own if isinstance(own, bytes) else own.encode() for own in spelled]


def model_vocabulary(
    fast: Any, spelling: Spelling, tokens: Sequence[bytes], *, size: int, eos_ids: Collection[int]
) -> Vocabulary:
    """Return the vocabulary of a model with a `tokenizers.Tokenizer`.

    fast      from now on it splits a text that is the name of a special token like any other
    tokens    from `spelled_tokens`
    size      number of the model's logits: it may have more or fewer than the tokenizer has tokens
    eos_ids   at least one, all below *size*
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = fast.encode(text, add_special_tokens=False).ids
        return ids

    fast.encode_special_tokens = True
    padded = [*tokens[:size], *[b""] * (size - len(tokens))]
    specials = {name: id for name, id in spelling.special_tokens.items() if id < size}
    return Vocabulary(padded, specials=specials, eos_ids=eos_ids, encode=encode)


def byte_vocabulary() -> Vocabulary:
    """Return the vocabulary of the echo engine: one id per byte, then its two special ids."""
    return Vocabulary(
        [*(bytes([byte]) for byte in range(256)), b"<|end|>", b"<|fault|>"],
        specials={"<|end|>": 256, "<|fault|>": 257},
        eos_ids=[256],
        encode=lambda text: list(text.encode()),
    )

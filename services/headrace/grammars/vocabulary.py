"""Give llguidance the tokens of a model, as the bytes that they add to a text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import llguidance

Encode = Callable[[str], Sequence[int]]  # text to ids, without special tokens around it


class Vocabulary:
    """The tokens of one model. Takes about a second to make for 150,000 tokens, and a few MiB.

    tokens     the bytes that each id adds to a text; empty for special tokens and unused ids. As many as the
               model has logits
    specials   names and ids of the special tokens, which grammars write as <name>
    eos_ids    tokens that end an answer, at least one; allowed where the grammar may end
    encode     tokenises texts that a grammar forces, as the model would

    tokenizer  for llguidance's classes
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
            llguidance.TokenizerWrapper(_Tokens(tokens, specials, self.eos_ids[0], encode)),
            n_vocab=self.size,
            eos_token=self.eos_ids,
            slices=llguidance.LLTokenizer.json_slices(),
        )


class _Tokens:
    """The tokens in the shape that `llguidance.TokenizerWrapper` reads."""

    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], specials: Mapping[str, int], eos_id: int, encode: Encode
    ) -> None:
        self.tokens = list(tokens)
        self.eos_token_id = eos_id
        self.special_token_ids = sorted({*specials.values(), eos_id})
        for name, id in specials.items():
            self.tokens[id] = name.encode()
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("texts only")  # so that the wrapper passes texts, not bytes
        ids = self._encode(text)
        # llguidance requires that the tokens spell the text: some tokenizers put a space in front of it.
        if b"".join(self.tokens[id] for id in ids) == text.encode():
            return list(ids)
        return []


def byte_vocabulary() -> Vocabulary:
    """Return the vocabulary of the echo engine: one id per byte, then its two special ids."""
    return Vocabulary(
        [*(bytes([byte]) for byte in range(256)), b"<|end|>", b"<|fault|>"],
        specials={"<|end|>": 256, "<|fault|>": 257},
        eos_ids=[256],
        encode=lambda text: list(text.encode()),
    )

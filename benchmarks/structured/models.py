"""Read the vocabularies of the default models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from headrace import models
from headrace.batcher.text.tokens import Tokenizer, load_tokenizer, token_texts

MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct")


@dataclass(frozen=True)
class Words:
    """A vocabulary: the bytes of each token, and how a model encodes texts."""

    tokens: Sequence[bytes]
    specials: Mapping[str, int]
    eos_id: int
    encode: Callable[[str], Sequence[int]]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Words:
        """Return the vocabulary of a tokenizer."""
        specials = tokenizer.special_tokens
        return cls(
            token_texts(tokenizer, range(tokenizer.vocabulary_size)),
            specials,
            specials[tokenizer.roles["eos_token"]],
            lambda text: tokenizer.encode_text(text, add_special_tokens=False),
        )


def words_of(model: str) -> Words:
    """Return the vocabulary of a model; of "" the bytes."""
    if not model:
        tokens = [bytes([byte]) for byte in range(256)]
        return Words([*tokens, b"<|end|>"], {"<|end|>": 256}, 256, lambda text: list(text.encode()))
    cache = models.cache_folder()
    return Words.of(load_tokenizer(models.resolve(model, cache, weights=False), cache))

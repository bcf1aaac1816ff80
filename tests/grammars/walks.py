"""Write random answers that a grammar allows, byte by byte."""

from __future__ import annotations

import random

import llguidance
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from headrace.grammars.vocabulary import byte_vocabulary

_VOCABULARY = byte_vocabulary()
_BYTES = 300  # then a walk ends, complete or not
# Of the allowed bytes, these are taken more often: they end strings, lists and objects.
_USUAL = frozenset(b'"}],0123456789abcAB: -T\\')


def matcher(grammar: str) -> llguidance.LLMatcher:
    """Return a matcher of *grammar*, which must compile."""
    made = llguidance.LLMatcher(_VOCABULARY.tokenizer, grammar, log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def accepts(grammar: str, text: str) -> bool:
    """Whether *grammar* allows *text* as a whole."""
    made = matcher(grammar)
    return made.try_consume_tokens(list(text.encode())) == len(text.encode()) and made.is_accepting()


def walk(grammar: str, rng: random.Random) -> str | None:
    """Return a random answer; None if it does not end in time."""
    made, answer = matcher(grammar), bytearray()
    mask = allocate_token_bitmask(1, _VOCABULARY.size)
    while len(answer) < _BYTES:
        if made.is_accepting() and rng.random() < 0.5:
            return answer.decode()
        fill_next_token_bitmask(made, mask)
        assert not made.is_error(), made.get_error()
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        allowed = [int(id) for id in np.flatnonzero(bits) if id < 256]
        if not allowed:
            assert made.is_accepting(), f"nothing may follow {bytes(answer)!r}"
            return answer.decode()
        usual = [id for id in allowed if id in _USUAL]
        answer.append(rng.choice(usual if usual and rng.random() < 0.9 else allowed))
        made.consume_token(answer[-1])
    return None

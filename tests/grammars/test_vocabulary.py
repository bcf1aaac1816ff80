"""A vocabulary has the bytes of a tokenizer's tokens, and as many as the model has logits."""

from __future__ import annotations

from collections.abc import Sequence

import llguidance
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from headrace.grammars.compiling import Grammars
from headrace.grammars.matching import Masks, follow
from headrace.grammars.vocabulary import Vocabulary, model_vocabulary, spelled_tokens
from headrace.models.tokenizers.spelling import TokenSpelling


def sentencepiece() -> Tokenizer:
    """Return a tokenizer that puts a space in front of a text, and spells other characters by bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdt{}"]
    merges = [("▁", "a"), ("a", "b")]
    vocabulary = {piece: id for id, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    fast = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens([AddedToken("</s>", special=True)])
    fast.add_tokens([AddedToken("<call>", special=False)])
    return fast


def byte_level() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({letter: id for id, letter in enumerate(letters)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<end>", special=True)])
    fast.add_tokens([AddedToken("<call>", special=False)])
    return fast


def vocabulary_of(fast: Tokenizer, end: str, *, size: int) -> Vocabulary:
    spelling = TokenSpelling(fast)
    tokens = spelled_tokens(fast, spelling)
    eos_id = fast.token_to_id(end)
    assert eos_id is not None
    return model_vocabulary(fast, spelling, tokens, size=size, eos_ids=[eos_id])


def allowed(vocabulary: Vocabulary, grammar: str, ids: Sequence[int]) -> set[int]:
    masks = Masks(vocabulary, threads=1)
    bits = np.zeros((1, masks.words), np.int32)
    assert masks.fill({0: follow(Grammars(vocabulary), grammar, ids)}, bits) == {}
    return set(np.flatnonzero(np.unpackbits(bits[0].view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize(("make", "end"), [(sentencepiece, "</s>"), (byte_level, "<end>")])
@pytest.mark.parametrize("size", [1000, 300])
def test_ids_that_the_tokenizer_does_not_have_are_never_allowed(make: object, end: str, size: int) -> None:
    """A model may have more logits than its tokenizer has tokens, for the sake of alignment."""
    fast: Tokenizer = make()  # type: ignore[operator]
    vocabulary = vocabulary_of(fast, end, size=size)

    found = allowed(vocabulary, "start: /(.|\\n)*/", [])

    assert vocabulary.size == size
    assert max(found) < fast.get_vocab_size()
    assert fast.token_to_id(end) in found


@pytest.mark.parametrize(("make", "end"), [(sentencepiece, "</s>"), (byte_level, "<end>")])
@pytest.mark.parametrize("text", ["ab", "{a b}", " a", "é {", "ab<call>{t}", "b\na\n\nb", "日"])
def test_what_the_model_would_write_is_allowed_token_by_token(make: object, end: str, text: str) -> None:
    """Though the tokenizer of some models puts a space in front of a text that it splits alone."""
    fast: Tokenizer = make()  # type: ignore[operator]
    vocabulary = vocabulary_of(fast, end, size=400)
    grammar = str(llguidance.LLMatcher.grammar_from_regex(f"{text.replace('{', '[{]')}|other"))
    inside = fast.encode("a" + text, add_special_tokens=False).ids
    before = fast.encode("a", add_special_tokens=False).ids
    if inside[: len(before)] != before:
        inside = fast.encode("\n" + text, add_special_tokens=False).ids
        before = fast.encode("\n", add_special_tokens=False).ids
    ids = inside[len(before) :]

    for place, id in enumerate(ids):
        assert id in allowed(vocabulary, grammar, ids[:place])
    assert b"".join(vocabulary.tokens[id] for id in ids) == text.encode()
    assert fast.token_to_id(end) in allowed(vocabulary, grammar, ids)


@pytest.mark.parametrize("text", ["ab", "{ab", "é", "b a", "\n", " a", "x"])
def test_a_text_that_a_grammar_forces_is_spelled_by_the_tokens(text: str) -> None:
    """Whatever the tokenizer does at the start of a text: else the answer would get another space."""
    vocabulary = vocabulary_of(sentencepiece(), "</s>", size=400)

    ids = vocabulary.tokenizer.tokenize_str(text)

    assert b"".join(vocabulary.tokens[id] for id in ids) == text.encode()


def test_a_tokenizer_that_cannot_spell_a_text_gets_its_longest_tokens() -> None:
    tokens = [b"", b"a", b"ab", b"b", b"c"]
    vocabulary = Vocabulary(tokens, specials={}, eos_ids=[0], encode=lambda text: [])

    assert vocabulary.tokenizer.tokenize_str("abcab") == [2, 4, 2]


@pytest.mark.parametrize(("make", "end"), [(sentencepiece, "</s>"), (byte_level, "<end>")])
def test_a_forced_text_that_is_the_name_of_a_special_token_is_written_as_text(make: object, end: str) -> None:
    """With the special token, the answer would end, or break its grammar."""
    fast: Tokenizer = make()  # type: ignore[operator]
    text = f"{end}a"
    vocabulary = vocabulary_of(fast, end, size=400)
    grammar = str(llguidance.LLMatcher.grammar_from_regex(text))
    ids: list[int] = []

    while (found := allowed(vocabulary, grammar, ids)) != {fast.token_to_id(end)}:
        ids.append(min(found))

    assert b"".join(vocabulary.tokens[id] for id in ids) == text.encode()


@pytest.mark.parametrize("encoded", [[1, 2], [1, 3], [1, 9]], ids=["an end", "a special token", "unknown"])
def test_a_forced_text_has_no_token_that_ends_the_answer_or_has_no_text(encoded: list[int]) -> None:
    tokens = [b"</s>", b"a", b"b", b"", b"b"]
    vocabulary = Vocabulary(tokens, specials={"</s>": 0, "b": 3}, eos_ids=[0, 2], encode=lambda text: encoded)

    assert vocabulary.tokenizer.tokenize_str("ab") == [1, 4]

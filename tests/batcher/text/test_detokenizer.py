"""Decoded text is complete: no broken character, no stop text, nothing lost or repeated."""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batcher.text.detokenizer import (
    EACH_BYTE,
    REPLACEMENT,
    Detokenizer,
    Spelling,
    StopFinder,
    StopRules,
    TextStream,
    last_with_text,
)
from headrace.batcher.text.tokens import ByteTokenizer, TransformersTokenizer
from tests.batcher.text.tiny_tokenizers import BYTES as BYTE_TOKENS
from tests.batcher.text.tiny_tokenizers import FAMILIES

BYTES = ByteTokenizer()
ALPHABET = st.sampled_from("abé–火🚀 ")
TEXTS = st.text(ALPHABET, max_size=30)
WORDS = st.lists(ALPHABET | st.sampled_from(["the", " sky", "Hello"]), max_size=10).map("".join)


@lru_cache
def tokenizer(family: str) -> TransformersTokenizer:
    return TransformersTokenizer(FAMILIES[family](), None, family)


def pieces(spelling: Spelling, ids: list[int], after: int | None = None) -> list[str]:
    detokenizer = Detokenizer(spelling, after)
    return [*(detokenizer.feed(id) for id in ids), detokenizer.flush()]


def stream(stops: list[str], **options: Any) -> TextStream:
    return TextStream(Detokenizer(BYTES), StopRules(stops, **options))


def decoded(ours: TransformersTokenizer, ids: list[int]) -> str:
    """Return the text of all ids decoded at once.

    If one of several adjacent byte tokens is invalid, `tokenizers` decodes all of them as invalid, also
    complete characters that were released before. SentencePiece keeps those, and so do we.
    """
    fast = ours._fast
    if not ours._spelling._byte_fallback:
        return str(fast.decode(ids))
    tokens = [token for id in ids if (token := fast.id_to_token(id)) and token not in ours.special_tokens]
    text = ""
    for is_byte, row in groupby(tokens, lambda token: token in BYTE_TOKENS):
        if is_byte:
            text += bytes(map(BYTE_TOKENS.index, row)).decode(errors=EACH_BYTE)
        else:
            text += "".join(row).replace("▁", " ")
    return text.removeprefix(" ")


@given(ids=st.lists(st.integers(0, 257), max_size=40))
def test_pieces_concatenate_to_the_text_of_all_ids_even_for_random_bytes(ids: list[int]) -> None:
    whole = bytes(id for id in ids if id < 256).decode(errors="replace")

    assert "".join(pieces(BYTES, ids)) == whole


@pytest.mark.parametrize("family", FAMILIES)
@given(prompt=WORDS, data=st.data())
def test_pieces_of_any_tokenizer_concatenate_to_its_own_decoding_of_any_ids(
    family: str, prompt: str, data: st.DataObject
) -> None:
    """After a prompt, and at the start of a text, where many tokenizers leave out a space."""
    ours = tokenizer(family)
    before = ours.encode_text(prompt)
    ids = data.draw(st.lists(st.integers(0, ours._fast.get_vocab_size() + 2), max_size=25))

    released = "".join(pieces(ours, ids, last_with_text(ours, before)))

    assert decoded(ours, before) + released == decoded(ours, before + ids)


@given(text=WORDS)
def test_the_reference_decoding_is_the_tokenizers_own_for_complete_characters(text: str) -> None:
    ours = tokenizer("byte fallback")
    ids = ours.encode_text(text)

    assert decoded(ours, ids) == ours._fast.decode(ids) == text


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_no_more_than_an_incomplete_character_is_held_back(family: str, data: st.DataObject) -> None:
    """At most three bytes, so that a real U+FFFD and invalid bytes are released immediately."""
    ours = tokenizer(family)
    ids = data.draw(st.lists(st.integers(0, ours._fast.get_vocab_size() - 1), max_size=25))
    detokenizer = Detokenizer(ours)
    released = ""

    for count, id in enumerate(ids, 1):
        released += detokenizer.feed(id)
        whole = "".join(pieces(ours, ids[:count]))
        assert whole.startswith(released)
        assert set(whole[len(released) :]) <= {REPLACEMENT}
        assert len(whole) - len(released) <= 3


@pytest.mark.parametrize("family", ["byte level", "byte fallback"])
def test_replacement_characters_of_the_answer_are_ordinary_text(family: str) -> None:
    ours = tokenizer(family)
    detokenizer = Detokenizer(ours, after=ours.encode_text("x")[-1])

    released = [detokenizer.feed(id) for id in ours.encode_text(REPLACEMENT * 50)]

    assert "".join(released).strip() == REPLACEMENT * 50


@pytest.mark.parametrize("family", FAMILIES)
def test_the_work_for_a_token_does_not_grow_with_the_answer(family: str) -> None:
    """Counts decoded ids, over runs of the tokens that could be held back longest."""
    ours = TransformersTokenizer(FAMILIES[family](), None, family)
    fast = ours._fast
    decodes: list[int] = []

    class Counting:
        def decode(self, ids: list[int]) -> str:
            decodes.append(len(ids))
            return str(fast.decode(ids))

        def __getattr__(self, name: str) -> Any:
            return getattr(fast, name)

    ours._spelling._fast = Counting()
    vocabulary = fast.get_vocab()
    ids = [vocabulary[token] for token in ("</s>", "<0xE2>", "â", "Ċ", "▁", "e", "Ġ") if token in vocabulary]
    pieces(ours, [id for id in ids for _ in range(500)], ids[-1])

    assert max(decodes, default=0) <= 2
    assert len(decodes) <= 2 * 500 * len(ids)


@given(text=TEXTS)
def test_no_piece_of_valid_text_contains_a_replacement_character(text: str) -> None:
    detokenizer = Detokenizer(BYTES)

    pieces = [detokenizer.feed(id) for id in text.encode()]

    assert "".join(pieces) == text
    assert all(REPLACEMENT not in piece for piece in pieces)


@given(text=TEXTS, stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3), data=st.data())
def test_a_stop_text_is_found_wherever_the_pieces_are_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    finder = StopFinder(stops)
    released, stopped, rest = "", None, text
    while rest and stopped is None:
        cut = data.draw(st.integers(1, len(rest)))
        piece, stopped = finder.feed(rest[:cut])
        released, rest = released + piece, rest[cut:]
        assert text.startswith(released)
    if stopped is None:
        released += finder.flush()

    if any(stop in text for stop in stops):
        assert stopped is not None
        assert text.startswith(released + stopped)
        assert not any(stop in released for stop in stops), "nothing of a complete stop text was released"
    else:
        assert released == text


@given(text=TEXTS, stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=2), data=st.data())
def test_the_text_released_for_n_tokens_does_not_depend_on_their_grouping(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """Another worker or batcher can resume an answer because the released text follows from the ids."""
    ids = list(text.encode())
    one_by_one = stream(stops)
    released = []
    for id in ids:
        piece = one_by_one.feed([id])
        released.append(piece.text)
        if piece.stopped is not None:
            break
    cut = data.draw(st.integers(0, len(released)))

    at_once = stream(stops).feed(ids[:cut])

    assert at_once.text == "".join(released[:cut])


def test_ids_after_a_stop_text_are_not_counted() -> None:
    piece = stream(["lo w"]).feed(list(b"hello world"))

    assert (piece.text, piece.used, piece.stopped) == ("hel", 7, "lo w")


def test_a_stop_text_in_the_last_held_bytes_is_still_found() -> None:
    held = stream([REPLACEMENT])
    assert held.feed([0x61, 0xF0]).text == "a"

    assert held.flush().stopped == REPLACEMENT


def test_a_stop_text_that_starts_with_a_space_is_found_in_the_first_token_of_an_answer() -> None:
    ours = tokenizer("byte fallback")
    prompt, answer = ours.encode_text("Hello"), [ours._fast.token_to_id("▁world")]
    after = last_with_text(ours, prompt)

    assert TextStream(Detokenizer(ours, after)).feed(answer).text == " world"
    assert TextStream(Detokenizer(ours, after), StopRules([" world"])).feed(answer).stopped == " world"


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=2),
    least=st.integers(0, 30),
)
def test_a_stop_text_counts_from_min_tokens_on(text: str, stops: list[str], least: int) -> None:
    """With a byte for a token, tokens are characters."""
    ends = [at for at in range(1, len(text) + 1) if at >= least and text[:at].endswith(tuple(stops))]
    one_by_one = stream(stops, min_tokens=least)
    released, used, stopped = "", 0, None
    for id in text.encode():
        piece = one_by_one.feed([id])
        released, used, stopped = released + piece.text, used + piece.used, piece.stopped
        if stopped is not None:
            break
    else:
        released += one_by_one.flush().text

    assert used == (ends[0] if ends else len(text))
    assert released + (stopped or "") == text[:used]


def test_a_special_token_that_is_a_stop_text_ends_the_answer_although_it_has_no_text() -> None:
    ids = [*b"hello", 256, *b"world"]

    assert stream(["<end>"], ids={256: "<end>"}).feed(ids).text == "hello"
    assert stream(["<end>"], ids={256: "<end>"}).feed(ids).stopped == "<end>"
    assert stream(["<end>"], ids={256: "<end>"}, min_tokens=7).feed(ids).stopped is None


def test_held_back_text_is_released_before_a_special_token_that_ends_the_answer() -> None:
    piece = stream(["low", "<end>"], ids={256: "<end>"}).feed([*b"hello", 256])

    assert (piece.text, piece.used, piece.stopped) == ("hello", 6, "<end>")


def test_the_comparisons_per_token_are_bounded_for_many_long_stop_texts() -> None:
    """Stop texts that almost match repeatedly: the comparisons stay proportional to the text."""
    compared = 0

    class Watched(str):
        def startswith(self, *given: Any) -> bool:
            nonlocal compared
            compared += 1
            return super().startswith(*given)

    finder = StopFinder([Watched("a" * 255 + chr(ord("b") + n)) for n in range(16)])
    text = "a" * 10_000
    released = "".join(finder.feed(letter)[0] for letter in text) + finder.flush()

    assert released == text
    assert compared <= 4 * 16 * len(text)

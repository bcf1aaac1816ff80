"""Text comes out whole: no broken character, no stop text, nothing lost, nothing twice."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from headrace.batcher.detokenizer import Detokenizer, StopFinder, TextStream
from headrace.batcher.tokens import ByteTokenizer

decode = ByteTokenizer().decode
ALPHABET = st.sampled_from("abé–火🚀 ")
TEXTS = st.text(ALPHABET, max_size=30)


@given(ids=st.lists(st.integers(0, 257), max_size=40))
def test_pieces_add_up_to_the_decoding_of_all_ids_even_for_random_bytes(ids: list[int]) -> None:
    detokenizer = Detokenizer(decode)

    pieces = [detokenizer.feed(id) for id in ids]
    text = "".join(pieces) + detokenizer.flush()

    assert text == decode(ids)


def test_a_long_row_of_special_tokens_is_not_decoded_again_for_each_one_more() -> None:
    longest = 0

    def watched(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    detokenizer = Detokenizer(watched)
    ids = [*"é".encode(), *[256] * 500, *b"f", *[257] * 500, *"ü".encode()]
    text = "".join(detokenizer.feed(id) for id in ids) + detokenizer.flush()

    assert text == "éfü"
    assert longest < 30


@given(text=TEXTS)
def test_no_piece_of_real_text_holds_a_replacement_character(text: str) -> None:
    detokenizer = Detokenizer(decode)

    pieces = [detokenizer.feed(id) for id in text.encode()]

    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


@given(text=TEXTS, stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3), data=st.data())
def test_a_stop_text_is_found_wherever_the_pieces_are_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    finder = StopFinder(stops)
    said, stopped, rest = "", None, text
    while rest and stopped is None:
        cut = data.draw(st.integers(1, len(rest)))
        piece, stopped = finder.feed(rest[:cut])
        said, rest = said + piece, rest[cut:]
        assert text.startswith(said)
    if stopped is None:
        said += finder.flush()

    if any(stop in text for stop in stops):
        assert stopped is not None
        assert text.startswith(said + stopped)
        assert not any(stop in said for stop in stops), "nothing of a complete stop text was let out"
    else:
        assert said == text


@given(text=TEXTS, stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=2), data=st.data())
def test_what_n_tokens_release_does_not_depend_on_how_they_came(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """This is what lets an answer go on elsewhere: the text that was delivered follows from the ids."""
    ids = list(text.encode())
    one_by_one = TextStream(decode, stops)
    released = []
    for id in ids:
        piece = one_by_one.feed([id])
        released.append(piece.text)
        if piece.stopped is not None:
            break
    cut = data.draw(st.integers(0, len(released)))

    at_once = TextStream(decode, stops).feed(ids[:cut])

    assert at_once.text == "".join(released[:cut])


def test_ids_after_a_stop_text_are_not_counted() -> None:
    piece = TextStream(decode, ["lo w"]).feed(list(b"hello world"))

    assert (piece.text, piece.used, piece.stopped) == ("hel", 7, "lo w")


def test_a_stop_text_in_the_last_held_bytes_is_still_found() -> None:
    stream = TextStream(decode, ["\N{REPLACEMENT CHARACTER}"])
    assert stream.feed([0x61, 0xF0]).text == "a"

    assert stream.flush().stopped == "\N{REPLACEMENT CHARACTER}"

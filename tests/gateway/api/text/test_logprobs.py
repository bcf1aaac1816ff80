"""The lists about the tokens of a text completion."""

from __future__ import annotations

from headrace.gateway.api.text.logprobs import TextLogprobs
from headrace.v1 import generation_pb2 as pb


def _token(id: int, text: bytes, logprob: float | None = -1.0) -> pb.TokenLogprob:
    return pb.TokenLogprob(id=id, text=text, logprob=logprob)


def _details(token: pb.TokenLogprob, *top: pb.TokenLogprob) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(token=token, top=top)


def test_offsets_are_those_of_characters_in_the_text() -> None:
    collected = TextLogprobs()
    pieces = ("Tür".encode(), b" ", "🍕".encode()[:2], "🍕".encode()[2:], b"!")
    collected.add(_details(_token(place, piece)) for place, piece in enumerate(pieces))

    taken = collected.take()

    assert taken["tokens"] == ["Tür", " ", r"bytes:\xf0\x9f", r"bytes:\x8d\x95", "!"]
    assert taken["text_offset"] == [0, 3, 4, 4, 5]


def test_the_first_token_of_a_prompt_has_no_logprobs() -> None:
    collected = TextLogprobs()
    collected.add([_details(_token(1, b"a", None)), _details(_token(2, b"b", -0.5), _token(2, b"b", -0.5))])

    assert collected.take() == {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"b": -0.5}],
        "text_offset": [0, 1],
    }


def test_a_token_that_is_not_among_the_most_likely_is_added_to_them() -> None:
    collected = TextLogprobs()
    collected.add([_details(_token(3, b"c", -4.0), _token(1, b"a", -0.25), _token(2, b"b", -2.0))])

    assert collected.take()["top_logprobs"] == [{"a": -0.25, "b": -2.0, "c": -4.0}]


def test_of_tokens_with_the_same_text_the_more_likely_counts() -> None:
    """Harnesses compare a token with the most likely one: a smaller value there would make it greedy."""
    collected = TextLogprobs()
    collected.add([_details(_token(3, b"", -4.0), _token(1, b"", -0.25), _token(2, b"", -2.0))])

    assert collected.take()["top_logprobs"] == [{"": -0.25}]


def test_tokens_can_be_named_by_their_ids() -> None:
    collected = TextLogprobs(as_ids=True)
    collected.add([_details(_token(3, b"", -4.0), _token(1, b"", -0.25))])

    taken = collected.take()

    assert taken["tokens"] == ["token_id:3"]
    assert taken["top_logprobs"] == [{"token_id:1": -0.25, "token_id:3": -4.0}]


def test_an_impossible_token_has_a_number_that_json_can_represent() -> None:
    collected = TextLogprobs()
    collected.add([_details(_token(3, b"c", float("-inf")))])

    taken = collected.take()

    assert taken["token_logprobs"] == [-9999.0]
    assert taken["top_logprobs"] == [{"c": -9999.0}]


def test_the_next_part_continues_at_the_offset_after_the_last() -> None:
    collected = TextLogprobs()
    collected.add([_details(_token(1, b"ab"))])
    collected.take()
    collected.add([_details(_token(2, b"c"))])
    first = collected.take()
    collected.move(20)
    collected.add([_details(_token(2, b"c"))])

    assert first["text_offset"] == [2]
    assert collected.take() == {
        "tokens": ["c"],
        "token_logprobs": [-1.0],
        "top_logprobs": [{"c": -1.0}],
        "text_offset": [20],
    }

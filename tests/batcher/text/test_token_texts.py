"""The texts of single tokens concatenate to the text of all, for every family of tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batcher.inbox import Arrival
from headrace.batcher.text.answer import AnswerEvents
from headrace.batcher.text.detokenizer import Detokenizer, last_with_text
from headrace.batcher.text.token_texts import Spellings, TokenDescriber
from headrace.batcher.text.tokens import ByteTokenizer, Tokenizer
from headrace.v1 import generation_pb2 as pb
from tests.batcher.links.test_link import job
from tests.batcher.text.test_detokenizer import WORDS, tokenizer
from tests.batcher.text.tiny_tokenizers import FAMILIES


def texts(spelling: Tokenizer, ids: list[int], after: int | None) -> list[bytes]:
    describer = TokenDescriber(Spellings(spelling), after)
    made = []
    for id in ids:
        described = pb.TokenLogprobs()
        describer.describe(described, id, -1.0, (), ())
        made.append(described.token.text)
    return made


@pytest.mark.parametrize("family", FAMILIES)
@given(prompt=WORDS, answer=WORDS)
def test_texts_of_tokens_concatenate_to_the_text_of_an_answer(family: str, prompt: str, answer: str) -> None:
    """After a prompt, and at the start of a text, where many tokenizers leave out a space."""
    ours = tokenizer(family)
    ids = ours.encode_text(answer)
    for after in (last_with_text(ours, ours.encode_text(prompt)), None):
        detokenizer = Detokenizer(ours, after)
        whole = "".join([*map(detokenizer.feed, ids), detokenizer.flush()])

        assert b"".join(texts(ours, ids, after)).decode(errors=ours.decode_errors) == whole


@pytest.mark.parametrize("family", FAMILIES)
@given(prompt=WORDS, ids=st.lists(st.integers(0, 60), max_size=8))
def test_a_likely_token_has_the_text_that_it_would_have_in_place_of_the_drawn_one(
    family: str, prompt: str, ids: list[int]
) -> None:
    ours = tokenizer(family)
    for after in (last_with_text(ours, ours.encode_text(prompt)), None):
        described = pb.TokenLogprobs()
        for id in [5, *ids]:
            described.Clear()
            TokenDescriber(Spellings(ours), after).describe(described, 7, -1.0, [id, 7], [-1.0, -1.0])
            other, same = described.top

            assert other.text == texts(ours, [id], after)[0]
            assert same.text == described.token.text == texts(ours, [7], after)[0]


def test_special_tokens_have_no_text_and_bytes_of_a_character_are_kept_apart() -> None:
    ids = [*"é".encode(), 256, 65]

    assert texts(ByteTokenizer(), ids, None) == [b"\xc3", b"\xa9", b"", b"A"]


def test_a_resumed_answer_continues_after_its_last_token() -> None:
    """A prompt of special tokens has no text: without the resumed tokens, the space would be left out."""
    ours = tokenizer("byte fallback")
    special = next(iter(ours.special_tokens.values()))
    hello, world = ours.encode_text("Hello world", add_special_tokens=False)
    resumed = job()
    resumed.prompt_ids, resumed.resume_ids = [special], [hello]
    resumed.sampling.max_tokens = 9
    request = pb.GenerateRequest(sampling=pb.Sampling(top_logprobs=0))
    answer = AnswerEvents(resumed, request, ours, tier="small")
    answer.replay()

    (event,) = answer.events_for(Arrival([world], [-1.0], None))

    assert event.delta.tokens[0].token.text == b" world"
    assert event.delta.text == " world"

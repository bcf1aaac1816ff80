"""Tokenizers use the model's chat template, and decode what they encode to the same text."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import errors, models
from headrace.batcher.text.detokenizer import Detokenizer
from headrace.batcher.text.tokens import (
    ByteTokenizer,
    Tokenizer,
    TransformersTokenizer,
    load_tokenizer,
    stop_ids,
)
from headrace.batcher.turns import Turn
from tests.batcher.text.tiny_tokenizers import byte_level, saved

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system prompts here') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer with a chat template, trained for this test."""
    fast = byte_level(["</s>", "<user>", "<assistant>"])
    return saved(fast, tmp_path_factory.mktemp("tokenizer"), TEMPLATE, bos_token=None, unk_token=None)


@pytest.fixture(scope="module")
def small(folder: Path) -> TransformersTokenizer:
    return load_tokenizer(folder, folder / "cache")


def written(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of *ids* with the names of special tokens."""
    return str(tokenizer._fast.decode(ids, skip_special_tokens=False))


def answer_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of *ids* in an answer."""
    detokenizer = Detokenizer(tokenizer)
    return "".join([*(detokenizer.feed(id) for id in ids), detokenizer.flush()])


def test_a_chat_is_rendered_by_the_models_template(small: TransformersTokenizer) -> None:
    ids = small.encode_chat([Turn("user", "the sky"), Turn("assistant", "is"), Turn("user", "blue?")])

    assert written(small, ids) == "<user>the sky</s><assistant>is</s><user>blue?</s><assistant>"


def test_an_empty_turn_of_the_assistant_is_rendered(small: TransformersTokenizer) -> None:
    ids = small.encode_chat([Turn("user", "the sky"), Turn("assistant", ""), Turn("user", "blue?")])

    assert written(small, ids) == "<user>the sky</s><assistant></s><user>blue?</s><assistant>"


@pytest.mark.parametrize("start", ["", "the sea is", "the sea is ", "the </s> <"])
def test_a_continued_answer_ends_where_the_message_ends(small: TransformersTokenizer, start: str) -> None:
    turns = [Turn("user", "the sky"), Turn("assistant", start)]

    ids = small.encode_chat(turns, continue_final=True)

    assert written(small, ids) == f"<user>the sky</s><assistant>{start}"
    assert ids[-1] != small.special_tokens["</s>"]


@given(text=st.text(max_size=200) | st.sampled_from(["the sky is blue" * 40, "\n" * 500]))
def test_a_chat_has_no_fewer_tokens_than_its_rendered_text_proves(
    small: TransformersTokenizer, text: str
) -> None:
    turns = [Turn("user", text), Turn("assistant", "is"), Turn("user", text)]

    assert small.bound is not None
    assert 1 < small.bound.min_tokens(small.render_chat(turns)) <= len(small.encode_chat(turns))
    assert small.bound.min_tokens(text) <= len(small.encode_text(text))


def test_turns_that_the_template_refuses_are_an_invalid_request(small: TransformersTokenizer) -> None:
    with pytest.raises(errors.InvalidRequest, match="no system prompts here"):
        small.encode_chat([Turn("system", "be brief"), Turn("user", "hi")])


def test_special_tokens_have_no_text(small: TransformersTokenizer) -> None:
    ids = small.encode_chat([Turn("user", "the sea")])

    assert answer_text(small, ids) == "the sea"


def test_equal_folders_have_equal_fingerprints(small: TransformersTokenizer, folder: Path) -> None:
    assert small.fingerprint == models.tokenizer_fingerprint(folder)
    assert len(small.fingerprint) == 16


def test_a_model_without_a_template_accepts_prompts_only(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    bare = load_tokenizer(tmp_path, tmp_path / "cache")

    assert answer_text(bare, bare.encode_text("the sky")) == "the sky"
    with pytest.raises(errors.InvalidRequest, match="send `prompt`"):
        bare.encode_chat([Turn("user", "hi")])


def test_a_prompt_is_encoded_completely_despite_limits_in_the_tokenizer_file(tmp_path: Path) -> None:
    fast = byte_level()
    fast.enable_truncation(4)
    fast.enable_padding(length=64)
    limited = load_tokenizer(saved(fast, tmp_path / "limited"), tmp_path)

    assert (
        answer_text(limited, limited.encode_text("the sky is blue and the sea"))
        == "the sky is blue and the sea"
    )
    assert len(limited.encode_text("the")) < 4


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_long_prompt_lets_other_threads_run_while_it_is_encoded(
    small: TransformersTokenizer, kind: str
) -> None:
    """Counts turns instead of time: while the GIL is held, no other thread gets a turn."""
    text = "the sky is blue and <the> sea is green " * 20_000
    turns, encoding, done = 0, threading.Event(), threading.Event()

    class Watched:
        def encode_batch_fast(self, *given: Any, **options: Any) -> Any:
            encoding.set()
            encodings = fast.encode_batch_fast(*given, **options)
            done.set()
            return encodings

    fast = small._fast
    small._fast = small._specials._fast = Watched()
    try:
        encode = small.encode_text if kind == "text" else lambda text: small.encode_chat([Turn("user", text)])
        thread = threading.Thread(target=encode, args=(text,))
        thread.start()
        encoding.wait(60)
        while not done.is_set():
            turns += 1
            time.sleep(0.001)
        thread.join()
    finally:
        small._fast = small._specials._fast = fast

    assert turns > 3


@given(text=st.text(max_size=40))
def test_pieces_of_a_byte_level_tokenizer_concatenate_to_the_text(
    small: TransformersTokenizer, text: str
) -> None:
    assert answer_text(small, small.encode_text(text)) == text


def test_the_byte_tokenizer_uses_bytes_as_ids() -> None:
    assert ByteTokenizer().encode_chat([Turn("system", "x"), Turn("user", "é")]) == [0xC3, 0xA9]


def test_stop_ids_accept_a_special_token_but_no_text_that_contains_one(small: TransformersTokenizer) -> None:
    assert stop_ids(small, ["\n", "</s>"]) == {small.special_tokens["</s>"]: "</s>"}
    with pytest.raises(errors.InvalidSampling, match="give '</s>' alone"):
        stop_ids(small, ["</s>\n"])


@pytest.mark.model
@pytest.mark.parametrize("name", [models.SMALL, models.LARGE])
def test_pieces_of_the_default_models_concatenate_for_any_ids(name: str) -> None:
    cache = models.cache_folder()
    tokenizer = load_tokenizer(models.resolve(name, cache), cache)

    @given(ids=st.lists(st.integers(0, 49151), max_size=30))
    @settings(max_examples=150, deadline=None)
    def check(ids: list[int]) -> None:
        assert answer_text(tokenizer, ids) == tokenizer._fast.decode(ids)

    check()
    assert "Paris" in answer_text(tokenizer, tokenizer.encode_text("Paris – 巴黎 🗼"))

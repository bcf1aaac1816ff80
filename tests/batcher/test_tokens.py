"""Tokenizers: the model's own chat template, and text that comes back as it went in."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import errors, models
from headrace.batcher.detokenizer import Detokenizer
from headrace.batcher.tokens import ByteTokenizer, Tokenizer, TransformersTokenizer, load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system prompts here') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer with a chat template, trained here."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["</s>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    fast.train_from_iterator(["the sky is blue and the sea is green"] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", chat_template=TEMPLATE)  # type: ignore[no-untyped-call]
    place = tmp_path_factory.mktemp("tokenizer")
    wrapped.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def small(folder: Path) -> TransformersTokenizer:
    return load_tokenizer(folder, folder / "cache")


def test_a_chat_is_laid_out_by_the_models_template(small: TransformersTokenizer) -> None:
    ids = small.encode_chat([("user", "the sky"), ("assistant", "is"), ("user", "blue?")])

    assert small._tokenizer.decode(ids) == "<user>the sky</s><assistant>is</s><user>blue?</s><assistant>"


@given(text=st.text(max_size=200) | st.sampled_from(["the sky is blue" * 40, "\n" * 500]))
def test_a_chat_has_no_fewer_tokens_than_its_layout_proves(small: TransformersTokenizer, text: str) -> None:
    turns = [("user", text), ("assistant", "is"), ("user", text)]

    assert small.bound is not None
    assert 1 < small.bound.fewest_tokens(small.lay_out(turns)) <= len(small.encode_chat(turns))
    assert small.bound.fewest_tokens(text) <= len(small.encode_text(text))


def test_turns_that_the_template_refuses_are_the_callers_to_mend(small: TransformersTokenizer) -> None:
    with pytest.raises(errors.InvalidRequest, match="no system prompts here"):
        small.encode_chat([("system", "be brief"), ("user", "hi")])


def test_special_tokens_do_not_become_text(small: TransformersTokenizer) -> None:
    ids = small.encode_chat([("user", "the sea")])

    assert small.decode(ids) == "the sea"


def test_equal_folders_have_equal_fingerprints(small: TransformersTokenizer, folder: Path) -> None:
    assert small.fingerprint == models.tokenizer_fingerprint(folder)
    assert len(small.fingerprint) == 16


def test_a_model_without_a_template_takes_prompts_only(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    bare = load_tokenizer(tmp_path, tmp_path / "cache")

    assert bare.decode(bare.encode_text("the sky")) == "the sky"
    with pytest.raises(errors.InvalidRequest, match="send `prompt`"):
        bare.encode_chat([("user", "hi")])


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode)
    return [*(detokenizer.feed(id) for id in ids), detokenizer.flush()]


@given(text=st.text(max_size=40))
def test_pieces_of_a_byte_level_tokenizer_add_up(small: TransformersTokenizer, text: str) -> None:
    ids = small.encode_text(text)

    assert "".join(pieces(small, ids)) == small.decode(ids)


def test_bytes_are_their_own_ids() -> None:
    assert ByteTokenizer().encode_chat([("system", "x"), ("user", "é")]) == [0xC3, 0xA9]


@pytest.mark.model
@pytest.mark.parametrize("name", [models.SMALL, models.LARGE])
def test_pieces_of_the_default_models_add_up_for_any_ids(name: str) -> None:
    cache = models.cache_folder()
    tokenizer = load_tokenizer(models.resolve(name, cache), cache)

    @given(ids=st.lists(st.integers(0, 49151), max_size=30))
    @settings(max_examples=150, deadline=None)
    def check(ids: list[int]) -> None:
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)

    check()
    assert "Paris" in "".join(pieces(tokenizer, tokenizer.encode_text("Paris – 巴黎 🗼")))

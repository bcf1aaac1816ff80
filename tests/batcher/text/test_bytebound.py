"""The lower bound of tokens never exceeds the true number, for any tokenizer."""

from __future__ import annotations

import json
import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from headrace.batcher.text.bytebound import NFC_SHRINK, byte_bound
from headrace.models.tokenizers.spelling import BYTE_LETTERS

CORPUS = ["hello hello world", "    a    b", "########", "żółw żółw", "const x = 1;\n\n\n", "한글 한글"] * 20


def trained(normalizer: Any = None, pre_tokenizer: Any = None, *, alphabet: bool = True) -> Tokenizer:
    """Return a small byte-level BPE tokenizer with long tokens.

    alphabet   with a token for every byte; otherwise only for those in its corpus
    """
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizer or level
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def fallback() -> Tokenizer:
    """Return a tokenizer like Llama's: spaces written as U+2581, and a token for each byte."""
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", *letters, "▁", "h", "e", "he", "hehe", "hehehehe", "▁hehehehe"]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocabulary,
        merges=[("h", "e"), ("he", "he"), ("hehe", "hehe"), ("▁", "hehehehe")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def definition(tokenizer: Tokenizer) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(tokenizer.to_str())
    return loaded


def split(behavior: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", behavior),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BOUNDED = {
    "bytes": trained(),
    "composed": trained(normalizers.NFC()),
    "split": trained(pre_tokenizer=split("isolated")),
    "fallback": fallback(),
    "lacks bytes": trained(alphabet=False),
}
texts = st.one_of(
    st.text(max_size=80),
    st.text(st.sampled_from("# he\u2581\n\u212a\u1112\u1161\u11ab\u0301e<0x>"), max_size=200),
    st.builds(
        lambda piece, times: piece * times, st.sampled_from([*CORPUS, "\u2581hehehehe"]), st.integers(1, 20)
    ),
)


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=150)
@given(text=texts)
def test_no_text_has_fewer_tokens_than_the_bound(name: str, text: str) -> None:
    tokenizer = BOUNDED[name]
    bound = byte_bound(definition(tokenizer))

    assert bound is not None
    assert bound.min_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids)


def with_added(**flags: bool) -> Tokenizer:
    tokenizer = trained()
    tokenizer.add_special_tokens([AddedToken("<|end|>", **flags)])
    return tokenizer


def truncating() -> Tokenizer:
    tokenizer = trained()
    tokenizer.enable_truncation(16)
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        trained(normalizers.NFKC()),
        trained(normalizers.NFC(), alphabet=False),
        trained(normalizers.Strip()),
        trained(normalizers.Lowercase()),
        trained(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
        trained(normalizers.Replace("  ", " ")),
        trained(pre_tokenizer=split("removed")),
        trained(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
        with_added(rstrip=True),
        with_added(lstrip=True),
        truncating(),
        Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True)),
        Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)),
    ],
    ids=lambda tokenizer: "",
)
def test_a_tokenizer_that_may_lose_text_has_no_bound(tokenizer: Tokenizer) -> None:
    assert byte_bound(definition(tokenizer)) is None


def test_bytes_that_produce_no_token_do_not_count() -> None:
    bound = byte_bound(definition(trained(alphabet=False)))

    assert bound is not None
    assert bound.min_tokens("\x04" * 10_000) == 0
    assert bound.min_tokens("h" * 10_000) > 50


def test_added_tokens_count() -> None:
    tokenizer = trained()
    tokenizer.add_tokens(["x" * 1000])
    bound = byte_bound(definition(tokenizer))

    assert bound is not None
    assert bound.min_tokens("x" * 1000) == 1


def test_every_byte_has_a_letter() -> None:
    assert set(BYTE_LETTERS) == set(pre_tokenizers.ByteLevel.alphabet())
    assert len(BYTE_LETTERS) == 256


def test_composition_never_shrinks_text_more_than_the_bound_assumes() -> None:
    """Compares each character that NFC may produce with the longest text that it may be composed of."""
    longest: dict[str, int] = {}  # by character of a full decomposition: bytes of the longest that becomes it
    decomposed: dict[str, str] = {}
    for code in range(sys.maxunicode + 1):
        if 0xD800 <= code < 0xE000:
            continue
        letter = chr(code)
        decomposed[letter] = unicodedata.normalize("NFD", letter)
        if len(decomposed[letter]) == 1:
            part = decomposed[letter]
            longest[part] = max(longest.get(part, 0), len(letter.encode()))

    for letter, parts in decomposed.items():
        if unicodedata.normalize("NFC", letter) == letter:
            assert sum(longest[part] for part in parts) <= NFC_SHRINK * len(letter.encode()), hex(ord(letter))

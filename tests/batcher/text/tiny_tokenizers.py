"""Tiny tokenizers of each family, trained here in the form that real models use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIALS = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")
TEXT = ["the sky is blue and the sea is green <|im", "Hello world, hello [you] 1 < 2 </b>"] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(specials: Sequence[str] = SPECIALS) -> Tokenizer:
    """Return a tokenizer like that of GPT-2, Llama 3 and Qwen: each token stands for bytes."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(TEXT, trainer)
    return fast


def byte_fallback(*, scheme: str = "normalizer") -> Tokenizer:
    """Return a tokenizer like that of Llama 2 and Mistral: letters, bytes for others, a space in front.

    scheme   "normalizer": a space before each stretch between special tokens; "first": before the text only
    """
    letters = sorted({letter for text in TEXT for letter in text.replace(" ", "▁")} | {"\ufffd", "é"})
    words = [
        "▁t",
        "he",
        "▁the",
        "▁s",
        "▁H",
        "el",
        "lo",
        "▁world",
        "▁w",
        "or",
        "ld",
        "▁worl",
        "▁Hel",
        "▁Hello",
    ]
    pairs = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "s"), ("▁", "H"), ("e", "l"), ("l", "o"), ("▁", "w")]
    pairs += [("o", "r"), ("l", "d"), ("▁w", "or"), ("▁wor", "ld"), ("▁H", "el"), ("▁Hel", "lo")]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *letters, *dict.fromkeys([*words, "▁wor", "▁world"])]
    fast = Tokenizer(
        models.BPE(
            {token: id for id, token in enumerate(dict.fromkeys(tokens))},
            pairs,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if scheme == "normalizer":
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIALS])
    fast.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", fast.token_to_id("<s>"))])
    return fast


def unigram() -> Tokenizer:
    """Return a tokenizer like that of T5 and many multilingual models."""
    fast = Tokenizer(models.Unigram())
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=list(SPECIALS), unk_token="<unk>", show_progress=False
    )
    fast.train_from_iterator(TEXT, trainer)
    return fast


def word_piece() -> Tokenizer:
    """Return a tokenizer like that of BERT."""
    fast = Tokenizer(models.WordPiece(unk_token="<unk>"))
    fast.normalizer = normalizers.BertNormalizer()
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=list(SPECIALS), show_progress=False)
    fast.train_from_iterator(TEXT, trainer)
    return fast


def words() -> Tokenizer:
    """Return a tokenizer of whole words without a decoder."""
    fast = Tokenizer(models.WordLevel(unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.train_from_iterator(
        [*TEXT, *SPECIALS], trainers.WordLevelTrainer(special_tokens=list(SPECIALS), show_progress=False)
    )
    return fast


def metaspace_first() -> Tokenizer:
    """Return a tokenizer like that of Llama 2 as newer versions read it."""
    return byte_fallback(scheme="first")


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "metaspace first": metaspace_first,
    "unigram": unigram,
    "word piece": word_piece,
    "words": words,
}


def saved(fast: Tokenizer, folder: Path, template: Any = None, **options: Any) -> Path:
    """Save a model folder with this tokenizer and chat template."""
    from transformers import PreTrainedTokenizerFast

    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=template, **names)  # type: ignore[no-untyped-call]
    wrapped.save_pretrained(folder)
    return folder

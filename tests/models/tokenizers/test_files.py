"""Tokenizers are read from the files of models; invalid files are reported in one line."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from headrace.batcher.text.tokens import load_tokenizer
from headrace.models import ModelUnavailable, tokenizer_fingerprint
from tests.batcher.text.test_tokens import answer_text
from tests.batcher.text.tiny_tokenizers import byte_level, saved
from tests.harness import PATIENCE

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4\n"
SENTENCES = [f"the sky is blue and the sea is green, hello world {number}" for number in range(300)]


def merges_folder(folder: Path, **config: Any) -> Path:
    """Write a folder with vocab.json and merges.txt, as GPT-2 has."""
    folder.mkdir(parents=True)
    byte_level(["<|endoftext|>"]).model.save(str(folder))
    for name, content in config.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def sentencepiece_folder(folder: Path, kind: str = "bpe", **options: Any) -> Path:
    """Write a folder with a tokenizer.model alone, as Llama 2 was published."""
    model = io.BytesIO()
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=300,
        model_type=kind,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"config": {"model_type": "gpt2"}},
        {"config": {"model_type": "qwen2"}},
        {"config": {"model_type": "llama"}},
    ],
    ids=str,
)
def test_a_vocabulary_with_merges_is_read_as_a_tokenizer(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = merges_folder(tmp_path / "model", **config)
    tokenizer = load_tokenizer(folder, tmp_path)

    text = "the sky is blue – é 🚀"
    assert answer_text(tokenizer, tokenizer.encode_text(text)) == text
    assert len(tokenizer.encode_text("the sky")) < len("the sky")
    assert tokenizer.special_tokens == {"<|endoftext|>": tokenizer.encode_text("<|endoftext|>")[0]}


def test_the_fingerprint_of_a_vocabulary_and_merges_depends_on_both(tmp_path: Path) -> None:
    one, two = (merges_folder(tmp_path / name) for name in "ab")
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(two)

    with (two / "merges.txt").open("a") as file:
        file.write("q q\n")

    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(two)
    (two / "merges.txt").unlink()
    with pytest.raises(ModelUnavailable, match=r"nor vocab\.json with merges\.txt"):
        tokenizer_fingerprint(two)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("config", [None, {"model_type": "llama"}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "nmt_nfkc_cf", "remove_extra_whitespaces": True},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<x>"]},
    ],
    ids=str,
)
def test_a_sentencepiece_model_alone_gives_the_ids_of_sentencepiece(
    tmp_path: Path, kind: str, config: Any, options: dict[str, Any]
) -> None:
    folder = sentencepiece_folder(tmp_path / "model", kind, **options)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder, tmp_path)
    sentences = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    for text in ("hello world", " the  sky\nis", "blue – é 🚀", "a <x> b"):
        ids = tokenizer.encode_text(text)
        assert ids == [sentences.bos_id(), *sentences.encode(text)]
        assert answer_text(tokenizer, ids) == sentences.decode(sentences.encode(text))


def test_a_sentencepiece_model_that_would_be_read_incorrectly_is_rejected(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "model", add_dummy_prefix=False)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))

    with pytest.raises(ModelUnavailable, match=r"tokenizer\.model splits text differently .* convert it"):
        load_tokenizer(folder, tmp_path)


# Errors name the file, the problem and the correction.


def written(name: str, content: bytes | str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def truncated(name: str) -> Callable[[Path], None]:
    def truncate(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return truncate


def with_code(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}})
    )
    (folder / "code.py").write_text("raise SystemExit('this code ran')")


def with_code_alone(folder: Path) -> None:
    with_code(folder)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pointer": (written("tokenizer.json", LFS), r"tokenizer\.json is a git-lfs pointer.*git lfs pull"),
    "pointer of the settings": (
        written("tokenizer_config.json", LFS),
        r"tokenizer_config\.json is a git-lfs pointer",
    ),
    "empty": (written("tokenizer.json", b""), r"tokenizer\.json is empty: copy"),
    "truncated": (truncated("tokenizer.json"), r"tokenizer\.json is damaged and not valid JSON.*copy"),
    "not UTF-8": (written("tokenizer_config.json", b"\xff\xfe{}"), r"tokenizer_config\.json is damaged"),
    "no such JSON": (written("tokenizer.json", b'{"model": 3}'), r"cannot be read \(.*copy"),
    "a list": (written("tokenizer_config.json", b"[1, 2]"), r"cannot be read \(.*copy"),
    "a config that is damaged": (written("config.json", b"{"), r"cannot be read \(.*copy|config\.json"),
    "code beside a complete file": (with_code, r"code that came with the model .*not run here: give a model"),
    "code": (with_code_alone, r"code that came with the model .*not run here: give a model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_invalid_folder_is_rejected_in_one_line_with_the_correction(tmp_path: Path, fault: str) -> None:
    spoil, reported = FAULTS[fault]
    folder = saved(byte_level(), tmp_path / "model")
    spoil(folder)

    with pytest.raises(ModelUnavailable, match=reported) as caught:
        load_tokenizer(folder, tmp_path)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reported"),
    [(b"", "empty"), (b"\x00\x01", "damaged"), (LFS.encode(), "git-lfs"), (b"\x0a\xff\xff", "damaged")],
)
def test_an_invalid_sentencepiece_model_is_reported(tmp_path: Path, content: bytes, reported: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)

    with pytest.raises(ModelUnavailable, match=rf"tokenizer\.model is .*{reported}"):
        load_tokenizer(tmp_path, tmp_path)


def gguf(path: Path, *, tokens: bool) -> Path:
    """Write a gguf of a llama without weights."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_feed_forward_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b", "</s>"])
        writer.add_token_types([1, 1, 3])
        writer.add_token_merges(["a b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["no tokens", "truncated", "something else", "pointer", "empty"])
def test_a_gguf_without_a_usable_tokenizer_is_reported(tmp_path: Path, kind: str) -> None:
    path = gguf(tmp_path / "model.gguf", tokens=kind == "truncated")
    if kind == "truncated":
        truncated(path.name)(tmp_path)
    elif kind != "no tokens":
        path.write_bytes({"something else": b"x" * 5000, "pointer": LFS.encode(), "empty": b""}[kind])

    with pytest.raises(ModelUnavailable, match=r"model\.gguf .*(copy|git lfs pull|give)") as caught:
        load_tokenizer(path, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def command(model: Path, cache: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "headrace.batcher", "--port", "0", "--workers", "127.0.0.1:1"),
        *("--model", str(model), "--cache", str(cache)),
    ]


@pytest.mark.parametrize("fault", ["truncated", "code", "gguf"])
async def test_a_batcher_whose_tokenizer_cannot_be_read_exits_with_one_line(
    tmp_path: Path, fault: str
) -> None:
    """Also on a terminal, where transformers would ask whether to run the model's code."""
    folder = saved(byte_level(), tmp_path / "model")
    if fault == "gguf":
        folder = gguf(tmp_path / "model.gguf", tokens=False)
    else:
        FAULTS[fault][0](folder)
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *command(folder, tmp_path), stdin=theirs, stdout=theirs, stderr=asyncio.subprocess.PIPE
    )
    os.close(theirs)

    _, logs = await asyncio.wait_for(process.communicate(), PATIENCE)

    os.close(ours)
    assert process.returncode == 1, logs.decode()
    lines = [json.loads(line) for line in logs.decode().splitlines()]
    assert [line["level"] for line in lines].count("CRITICAL") == 1
    assert str(folder) in lines[-1]["message"]
    assert "Traceback" not in logs.decode()

"""The tokenizer of a .gguf file is read without torch, and is the one that transformers reads with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGUFWriter

from headrace.models.tokenizers.gguf import from_gguf, read_metadata
from tests.batcher.text.tiny_tokenizers import BYTES, byte_level

TEXTS = ("Hello world", "a  b\n\n c", "12345 x=7", "<|im_end|> hello", " naïve 日本 🗼", "DON'T don't")
# Architecture, kind of tokenizer and kind of pre-tokenizer: the architectures that workers support.
KINDS = [
    ("llama", "gpt2", "smollm"),
    ("llama", "gpt2", "llama-bpe"),
    ("llama", "llama", None),
    ("qwen2", "gpt2", "qwen2"),
    ("qwen3", "gpt2", "qwen2"),
    ("qwen2moe", "gpt2", "qwen2"),
    ("qwen3moe", "gpt2", "qwen2"),
    ("gemma2", "llama", None),
    ("gemma3", "llama", None),
    ("phi3", "llama", None),
    ("starcoder2", "gpt2", "starcoder"),
    ("gpt2", "gpt2", "gpt-2"),
]


def written(path: Path, architecture: str, kind: str, rules: str | None, *, bos: bool | None = None) -> Path:
    """Write a .gguf file with a tokenizer and the sizes that transformers wants of a model."""
    writer = GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_feed_forward_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        contents = json.loads(byte_level().to_str())["model"]
        tokens = sorted(contents["vocab"], key=contents["vocab"].__getitem__)
        writer.add_token_merges([" ".join(pair) for pair in contents["merges"]])
        writer.add_tokenizer_pre(rules or "default")
        types = [3 if token.startswith("<") and len(token) > 2 else 1 for token in tokens]
    else:
        words = ["▁", *"abcdehlorwxy17=", "he", "ll", "llo", "hello", "▁hello", "wo", "▁wo", "rld", "ld"]
        tokens = ["<unk>", "<s>", "</s>", *BYTES, *words, "<|im_end|>"]
        types = [2, 3, 3, *([6] * len(BYTES)), *([1] * len(words)), 3]
        writer.add_token_scores([-float(place) for place in range(len(tokens))])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.add_chat_template("{{ messages[0].content }}")
    if bos is not None:
        writer.add_add_bos_token(bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("architecture", "kind", "rules"), KINDS)
@pytest.mark.parametrize("bos", [None, True, False])
def test_the_tokenizer_is_the_one_that_transformers_reads(
    tmp_path: Path, architecture: str, kind: str, rules: str | None, bos: bool | None
) -> None:
    from transformers import AutoTokenizer

    path = written(tmp_path / "model.gguf", architecture, kind, rules, bos=bos)

    ours = from_gguf(path)

    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name, local_files_only=True)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    assert [ours(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]


def test_torch_is_not_imported(tmp_path: Path) -> None:
    """Batchers have no torch: their image is a third of a worker's."""
    path = written(tmp_path / "model.gguf", "llama", "gpt2", "smollm")
    script = f"""
import sys
sys.modules["torch"] = None  # importing it fails
from pathlib import Path
from headrace.models.tokenizers.files import read_tokenizer
files = read_tokenizer(Path({str(path)!r}), Path({str(tmp_path / "cache")!r}))
print(files.backend.decode(files.backend.encode("Hello world").ids))
"""

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout.strip()) == (0, "Hello world"), done.stderr


@pytest.mark.parametrize("length", [0, 3, 20, 60, 3000])
def test_a_file_that_ends_early_is_damaged(tmp_path: Path, length: int) -> None:
    path = written(tmp_path / "model.gguf", "llama", "gpt2", "smollm")
    assert length < path.stat().st_size
    path.write_bytes(path.read_bytes()[:length])

    with pytest.raises(ValueError, match=r"metadata|\.gguf|empty"):
        read_metadata(path)


def test_lengths_beyond_the_file_are_damage_and_reserve_no_memory(tmp_path: Path) -> None:
    """A count of 2**60 must not become a list or a string of that length."""
    path = written(tmp_path / "model.gguf", "llama", "gpt2", "smollm")
    content = path.read_bytes()
    for key in (b"tokenizer.ggml.token_type", b"tokenizer.ggml.tokens", b"tokenizer.ggml.model"):
        start = content.index(key) + len(key) + 4
        start += 4 if content[start - 4] == 9 else 0
        path.write_bytes(content[:start] + (2**60).to_bytes(8, "little") + content[start + 8 :])

        with pytest.raises(ValueError, match="metadata"):
            read_metadata(path)

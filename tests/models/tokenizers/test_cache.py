"""A tokenizer that was read before is loaded from the cache, as long as nothing has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.batcher.text.tokens import load_tokenizer
from headrace.batcher.turns import Turn
from headrace.models import ModelUnavailable
from headrace.models.tokenizers import cache, files
from tests.batcher.text.tiny_tokenizers import byte_level, saved

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(byte_level(), tmp_path / "model", TEMPLATE)


def test_the_second_start_does_not_read_the_files_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_tokenizer(model, tmp_path)
    monkeypatch.delattr(files, "_read_afresh")

    second = load_tokenizer(model, tmp_path)

    turns = [Turn("user", "the sky is blue – é 🚀")]
    assert second.encode_chat(turns) == first.encode_chat(turns)
    assert second.special_tokens == first.special_tokens
    assert second.fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "added.txt"])
def test_a_changed_file_has_another_place_in_the_cache(model: Path, tmp_path: Path, name: str) -> None:
    before = cache.location(model, tmp_path)

    with (model / name).open("a") as file:
        file.write(" ")

    assert cache.location(model, tmp_path) != before


def test_another_version_of_a_library_has_another_place_in_the_cache(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cache.location(model, tmp_path)

    monkeypatch.setattr(cache, "version", lambda name: "99.0")

    assert cache.location(model, tmp_path) != before


def test_weights_are_not_part_of_a_tokenizer(model: Path, tmp_path: Path) -> None:
    before = cache.location(model, tmp_path)

    (model / "model.safetensors").write_bytes(b"weights")

    assert cache.location(model, tmp_path) == before


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"backend": "x", "unknown": 1}'])
def test_a_damaged_file_of_the_cache_is_replaced(model: Path, tmp_path: Path, content: str) -> None:
    kept = cache.location(model, tmp_path)
    kept.parent.mkdir(parents=True)
    kept.write_text(content)

    load_tokenizer(model, tmp_path)

    assert cache.load(kept) is not None


def test_a_cache_that_cannot_be_written_is_no_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")

    load_tokenizer(model, tmp_path / "cache")


def test_invalid_files_are_not_cached(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")

    with pytest.raises(ModelUnavailable):
        load_tokenizer(folder, tmp_path / "cache")

    assert not (tmp_path / "cache").exists()

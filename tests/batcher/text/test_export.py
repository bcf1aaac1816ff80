"""A tokenizer that was exported from a .gguf file replaces the file for a batcher."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace import models
from headrace.batcher.text.export import export, main
from headrace.batcher.text.tokens import load_tokenizer
from headrace.batcher.turns import Turn
from headrace.models import FINGERPRINT_FILE, ModelUnavailable, tokenizer_fingerprint


@pytest.mark.model
def test_an_exported_tokenizer_is_that_of_the_whole_model(tmp_path: Path) -> None:
    model = models.resolve(models.SMALL, models.cache_folder(), weights=False)
    folder = tmp_path / "exported"

    export(model, folder)

    whole, alone = load_tokenizer(model, tmp_path / "a"), load_tokenizer(folder, tmp_path / "b")
    assert alone.fingerprint == whole.fingerprint
    assert alone.special_tokens == whole.special_tokens
    turns = [Turn("user", "Où est l'été? 日本 🗼")]
    assert alone.encode_chat(turns) == whole.encode_chat(turns)
    text = "def f(x):\n    return [x]"
    assert alone.encode_text(text) == whole.encode_text(text)
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size < model.stat().st_size / 10


def test_a_damaged_fingerprint_is_reported(tmp_path: Path) -> None:
    (tmp_path / FINGERPRINT_FILE).write_text("no fingerprint")

    with pytest.raises(ModelUnavailable, match="export the tokenizer again"):
        tokenizer_fingerprint(tmp_path)


def test_a_folder_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="files of its own: copy them"):
        main([str(tmp_path), str(tmp_path / "exported")])

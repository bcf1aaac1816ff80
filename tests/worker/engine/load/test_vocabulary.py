"""The vocabulary of a model is read while its weights are loaded; without one, it serves without grammars."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from headrace.worker.engine.interface import Row, SamplingParams, Token
from tests.worker.engine.grammar.cases import regex
from tests.worker.engine.load.starting import load

Folder = Callable[[str], Path]
END = 2  # of the tiny models, which have 131 tokens


@pytest.fixture
def folder(tiny_folder: Folder, tmp_path: Path) -> Path:
    """Return a model's folder with a tokenizer that has fewer tokens than the model has logits."""
    folder = tmp_path / "with-tokenizer"
    shutil.copytree(tiny_folder("llama"), folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:90]
    vocabulary = {
        "x": 0,
        "y": 1,
        "</s>": END,
        **{letter: 3 + id for id, letter in enumerate(letters) if letter not in "xy"},
    }
    fast = Tokenizer(models.BPE(vocabulary, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("</s>", special=True)])
    fast.save(str(folder / "tokenizer.json"))
    return folder


def test_a_model_with_a_tokenizer_supports_grammars(folder: Path, tmp_path: Path) -> None:
    warnings: list[str] = []

    engine = load(folder, tmp_path, warn=warnings.append)

    assert "structured" in engine.model.features
    assert engine.grammars is not None
    assert engine.grammars.vocabulary.size == engine.model.vocabulary_size == 131
    assert not [text for text in warnings if "structured" in text]
    params = SamplingParams(seed=1, max_tokens=4, temperature=0, grammar=regex("x|yy"))
    (token,) = engine.step([Row([0], 0, 2, [5, 6], 2, True, params)])
    assert isinstance(token, Token)
    assert token.id in {0, 1}
    ended = Row([1], 0, 3, [5, 6, 0], 2, True, dataclasses.replace(params, min_tokens=3))
    assert engine.step([ended]) == [Token(END)]


def test_a_model_without_a_readable_tokenizer_serves_without_grammars(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    warnings: list[str] = []

    engine = load(folder, tmp_path, warn=warnings.append)

    assert "structured" not in engine.model.features
    assert engine.grammars is None
    (warning,) = [text for text in warnings if "structured output" in text]
    assert "tokenizer" in warning
    assert "\n" not in warning

"""Load model folders as a worker does at its start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from headrace.worker.engine.interface import ModelInfo
from headrace.worker.engine.load.loading import load_engine
from headrace.worker.engine.load.refusals import LoadingError
from headrace.worker.engine.torch_engine import TorchEngine


def load(path: Path, cache: Path, **options: Any) -> TorchEngine:
    """Load a folder or file with a small engine."""
    settings = {"dtype": "float32", "max_running": 4, **options}
    engine = load_engine(path, name="tiny", cache=cache, tokenizer_fingerprint="f00d", **settings)
    assert isinstance(engine, TorchEngine)
    return engine


def changed(folder: Path, tmp_path: Path, **config: Any) -> Path:
    """Copy a model folder with another config."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return copy


def start(folder: Path, **options: Any) -> ModelInfo:
    """Load a folder, and return the description of the model."""
    return load(folder, folder.parent, **{"context_length": 300, **options}).model


def besides_tokenizer(warnings: list[str]) -> list[str]:
    """Return the warnings that are not of a folder without a tokenizer, which the tests' folders lack."""
    return [text for text in warnings if not text.startswith("structured output and calls of tools")]


def refusal(folder: Path, **options: Any) -> str:
    """Load a folder that cannot be served, and return the message, which is one line."""
    with pytest.raises(LoadingError) as refused:
        start(folder, **options)
    message = str(refused.value)
    assert "\n" not in message
    return message

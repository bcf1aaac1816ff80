"""A later start uses the stored weights of a model, and only if they are those that were checked."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headrace.worker.engine.cpu import stored_model
from headrace.worker.engine.interface import Row, SamplingParams
from headrace.worker.engine.torch_engine import TorchEngine
from tests.worker.engine.load.starting import changed, load

Folder = Callable[[str], Path]


@pytest.fixture
def folder(tiny_folder: Folder, tmp_path: Path) -> Path:
    return changed(tiny_folder("llama"), tmp_path)


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Callable[..., tuple[TorchEngine, list[str]]]:
    def start(**options: object) -> tuple[TorchEngine, list[str]]:
        """Start a worker's engine, and return it with what it reports."""
        reported: list[str] = []
        engine = load(
            folder, tmp_path / "cache", progress=reported.append, warn=reported.append,
            context_length=300, **options,
        )  # fmt: skip
        for thread in threading.enumerate():
            if thread.name == stored_model.WRITER:
                thread.join()
        return engine, reported

    return start


def stored(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache" / "laid-out").iterdir()
    return file


def logits(engine: TorchEngine) -> torch.Tensor:
    ids = [index % 131 for index in range(100)]
    row = Row(range(8), 0, 100, ids, 100, True, SamplingParams(seed=1, max_tokens=1))
    return engine.compute([row]).logits.clone()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_later_start_computes_the_same_bits_without_the_network(
    start: Callable[..., tuple[TorchEngine, list[str]]], dtype: str
) -> None:
    first, reported = start(dtype=dtype)
    later, reported_later = start(dtype=dtype)

    assert f"loading tiny in {dtype}" in reported
    assert f"reading the stored weights of tiny in {dtype}" in reported_later
    assert f"loading tiny in {dtype}" not in reported_later
    assert torch.equal(logits(first), logits(later))
    assert first.model == later.model


def test_damaged_weights_are_found_and_loaded_again(
    start: Callable[..., tuple[TorchEngine, list[str]]], tmp_path: Path
) -> None:
    first, _ = start()
    file = stored(tmp_path)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    file.write_bytes(content)

    second, reported = start()
    third, reported_later = start()

    assert any("differ from those that were checked" in sentence for sentence in reported)
    assert "loading tiny in float32" in reported
    assert "loading tiny in float32" not in reported_later
    assert torch.equal(logits(first), logits(second))
    assert torch.equal(logits(first), logits(third))


@pytest.mark.parametrize("length", [0, 100, 20_000])
def test_a_truncated_file_is_not_used(
    start: Callable[..., tuple[TorchEngine, list[str]]], tmp_path: Path, length: int
) -> None:
    start()
    file = stored(tmp_path)
    file.write_bytes(file.read_bytes()[:length])

    _, reported = start()

    assert "loading tiny in float32" in reported


def test_a_changed_file_of_the_model_is_read_again(
    start: Callable[..., tuple[TorchEngine, list[str]]], folder: Path
) -> None:
    start()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # the time changes

    _, reported = start()

    assert "loading tiny in float32" in reported


def test_a_model_with_other_settings_is_not_the_stored_one(
    start: Callable[..., tuple[TorchEngine, list[str]]],
) -> None:
    start()

    assert "loading tiny in bfloat16" in start(dtype="bfloat16")[1]
    assert "loading tiny in float32" not in start()[1]


def test_a_cache_that_cannot_be_written_delays_no_start(
    start: Callable[..., tuple[TorchEngine, list[str]]], tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "laid-out").touch()

    start()

    assert "loading tiny in float32" in start()[1]


def test_importing_the_loading_of_engines_imports_no_transformers() -> None:
    """A start with stored weights saves its seconds and its memory."""
    program = "import sys, headrace.worker.engine.load.loading; sys.exit('transformers' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

"""A gguf file is unpacked once, completely or not at all."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from headrace import models
from headrace.worker.engine.load.gguf import weights as gguf_weights
from headrace.worker.engine.load.refusals import LoadingError
from tests.worker.engine.load.starting import load


def test_concurrent_starts_unpack_a_gguf_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def unpack(path: Path, folder: Path) -> None:
        made.append(folder)
        (folder / "model.safetensors").write_bytes(path.read_bytes() * 2)

    monkeypatch.setattr(gguf_weights, "_unpack", unpack)
    source = tmp_path / "model.gguf"
    source.write_bytes(b"weights")

    def get() -> Path:
        return gguf_weights.dequantised(source, digest="ab" * 32, cache=tmp_path, progress=lambda _: None)

    threads = [threading.Thread(target=get) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(made) == 1
    assert (get() / "model.safetensors").read_bytes() == b"weightsweights"
    assert not list((tmp_path / "dequantised").glob(".unpacking-*"))

    (get() / "model.safetensors").write_bytes(b"torn")
    assert (get() / "model.safetensors").read_bytes() == b"weightsweights"
    assert len(made) == 2


def test_an_invalid_gguf_file_is_rejected_and_leaves_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 64)

    with pytest.raises(LoadingError, match=r"cannot read .*model\.gguf"):
        load(path, tmp_path)

    assert not [entry for entry in (tmp_path / "dequantised").iterdir() if entry.is_dir()]


@pytest.mark.model
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_unpacked_gguf_file_answers_like_the_file_itself(
    headrace_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = headrace_cache / "models" / "smollm2-135m-instruct" / "model.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not there: run `headrace fetch`")
    # gguf maps the file, and each of its million slices is a new map: reading it takes a third of the time.
    memory_map = np.memmap
    monkeypatch.setattr(
        np,
        "memmap",
        lambda path, **how: (
            np.fromfile(path, np.uint8) if how.keys() == {"mode"} else memory_map(path, **how)
        ),
    )
    prompt = torch.tensor([[1, 9690, 198, 2683, 359, 253, 5356]])
    direct: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )

    folder = gguf_weights.dequantised(
        path, digest=models.file_digest(path), cache=headrace_cache, progress=lambda _: None
    )
    unpacked: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    answers = [net.generate(prompt, max_new_tokens=12, do_sample=False) for net in (direct, unpacked)]
    assert torch.equal(*answers)
    assert unpacked.config.dtype == torch.float32

"""A .gguf file is written as a model folder for engines that read no such files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from headrace import models
from headrace.models import ModelUnavailable, tokenizer_fingerprint
from headrace.worker.engine.load.gguf.unpacking import main, unpack
from headrace.worker.engine.load.gguf.weights import dequantised
from headrace.worker.engine.load.refusals import LoadingError
from tests.worker.engine.load.gguf.gguf_files import llama, write_gguf


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a small .gguf file with a tokenizer."""
    network = llama()
    return write_gguf(
        tmp_path / "tiny.gguf",
        network,
        "llama",
        tokens=["t", "1", "t1", "t1t", *(f"x{number}" for number in range(network.config.vocab_size - 4))],
        keys={"tokenizer.ggml.pre": "default", "tokenizer.chat_template": "{{ messages[0].content }}"},
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    auto: Any = transformers.AutoModelForCausalLM
    state: dict[str, torch.Tensor] = auto.from_pretrained(folder, dtype="auto").state_dict()
    return state


def test_a_folder_has_the_weights_in_bfloat16_the_tokenizer_and_its_fingerprint(
    file: Path, tmp_path: Path
) -> None:
    said: list[str] = []

    assert models.readable_as_folder(file, tmp_path / "cache") == file, "it has not been unpacked"
    folder = unpack(str(file), tmp_path / "cache", said.append)

    assert folder.name == "tiny"
    assert models.readable_as_folder(file, tmp_path / "cache") == folder
    assert models.readable_as_folder(folder, tmp_path / "cache") == folder
    (source,) = (path for path in (tmp_path / "cache" / "dequantised").iterdir() if path.is_dir())
    exact, written = weights_of(source), weights_of(folder)
    assert exact.keys() == written.keys()
    for name, values in written.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, exact[name].to(torch.bfloat16))
    assert tokenizer_fingerprint(folder) == tokenizer_fingerprint(file)
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    defaults = json.loads((folder / "generation_config.json").read_text())
    assert defaults["eos_token_id"] == [2]
    assert any("bfloat16" in line for line in said)


def test_a_folder_in_the_cache_is_written_once_and_readable_for_others(file: Path, tmp_path: Path) -> None:
    first = unpack(str(file), tmp_path / "cache", print)
    written = (first / "model.safetensors").stat().st_mtime_ns
    said: list[str] = []

    again = unpack(str(file), tmp_path / "cache", said.append)

    assert (again, said) == (first, [])
    assert (again / "model.safetensors").stat().st_mtime_ns == written
    assert {path.stat().st_mode & 0o777 for path in again.iterdir()} == {0o644}
    assert again.stat().st_mode & 0o777 == 0o755

    (first / "model.safetensors").write_bytes(b"torn")
    unpack(str(file), tmp_path / "cache", said.append)
    assert (first / "model.safetensors").stat().st_size > 1000, "a damaged folder is written anew"


def test_a_named_folder_has_the_model_and_nothing_else(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "models" / "mine"

    main([str(file), str(target), "--cache", str(tmp_path / "cache")])

    assert capsys.readouterr().out.splitlines()[-1] == str(target)
    assert {path.name for path in target.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.fingerprint"),
    }
    assert [path.name for path in target.parent.iterdir()] == ["mine"]
    with pytest.raises(SystemExit, match="exists already: name a folder that does not"):
        main([str(file), str(target), "--cache", str(tmp_path / "cache")])


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="is a model folder already"):
        unpack(str(tmp_path), tmp_path / "cache", print)
    with pytest.raises(ModelUnavailable, match="is not a known model"):
        unpack("nothing", tmp_path / "cache", print)
    (damaged := tmp_path / "damaged.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(LoadingError, match="header is damaged"):
        unpack(str(damaged), tmp_path / "cache", print)
    assert not list((tmp_path / "cache" / "unpacked").rglob("config.json"))


@pytest.mark.model
def test_a_folder_answers_like_the_file_in_the_same_dtype(default_model: Path) -> None:
    folder = unpack(str(default_model), models.cache_folder(), print)
    prompt = torch.tensor([[1, 9690, 198, 2683, 359, 253, 5356]])
    auto: Any = transformers.AutoModelForCausalLM
    digest = models.file_digest(default_model)
    source = dequantised(default_model, digest=digest, cache=models.cache_folder(), progress=print)
    answers = [
        auto.from_pretrained(each, dtype=torch.bfloat16).generate(prompt, max_new_tokens=16, do_sample=False)
        for each in (source, folder)
    ]

    assert torch.equal(*answers)

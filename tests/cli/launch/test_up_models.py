"""Reports of `headrace up` on a model: why it does not start, and which weights are not used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PATIENCE = 240


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a tiny model with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path / "model"
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *"abcdefghijklmnop"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def up(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-c", "from headrace.cli import main; main()", "up", "--port", "0"),
            *("--tier", f"only={folder}", "--log-dir", str(folder.parent / "logs"), "--drain-seconds", "1"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )


def test_a_damaged_file_is_named_on_one_line(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with up(folder) as process:
        printed, _ = process.communicate(timeout=PATIENCE)

    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1
    assert line.startswith(f"error: worker-only ended with exit code 1: {path} is a git-lfs pointer")
    assert "Traceback" not in printed


def test_parts_of_a_model_that_are_not_used_are_shown(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    more: dict[str, Any] = {"vision_tower.patch.weight": torch.ones(4)}
    save_file({**load_file(path), **more}, path, {"format": "pt"})

    printed = ""
    with up(folder) as process:
        assert process.stdout is not None
        for line in process.stdout:
            printed += line
            if "GenerationService/Generate" in line:  # the last of the examples
                break
        process.send_signal(signal.SIGINT)
        printed += process.communicate(timeout=PATIENCE)[0]

    assert "worker-only: 1 weights of" in printed
    assert "vision_tower.patch.weight" in printed

"""The ids that end a turn, and the fingerprint of weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from headrace.worker.engine.interface import Row, SamplingParams, Token
from headrace.worker.engine.load import identity
from tests.worker.engine.conftest import VOCABULARY
from tests.worker.engine.load.starting import changed, load, refusal, start

Folder = Callable[[str], Path]


@pytest.mark.parametrize(
    "text", ['{"eos_token": ', '{"added_tokens_decoder": {"x": 3}}', "[]", '{"added_tokens_decoder": 5}']
)
def test_a_damaged_tokenizer_config_is_reported(text: str, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(text)

    assert str(folder / "tokenizer_config.json") in refusal(folder)


def test_ignored_end_of_turn_ids_cause_a_warning(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 131, 99999]}))
    warnings: list[str] = []

    assert start(folder, warn=warnings.append).eos_ids == {2}
    assert any("[131, 99999]" in warning for warning in warnings)


def test_turns_end_with_the_ids_that_the_folder_names_and_with_known_tokens(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    folder = changed(tiny_folder("llama"), tmp_path, eos_token_id=[2, 9])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 11}))
    added = {
        "20": {"content": "<|im_end|>", "special": True},
        "21": {"content": "<|im_start|>", "special": True},
        "22": {"content": "<end>", "special": True},
        "23": {"content": "<|endoftext|>", "special": False},
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "added_tokens_decoder": added})
    )
    tokens = {"added_tokens": [{"id": 24, "content": "<|eot_id|>", "special": True}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))

    assert load(folder, tmp_path).model.eos_ids == {2, 9, 11, 20, 22, 24}


def test_end_of_turn_ids_beyond_the_vocabulary_are_ignored(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = changed(tiny_folder("llama"), tmp_path, eos_token_id=[2, 4_000_000])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [VOCABULARY, -1]}))
    engine = load(folder, tmp_path)
    assert engine.model.eos_ids == {2}

    blocks = range(engine.model.kv_blocks)
    params = SamplingParams(seed=1, max_tokens=9, min_tokens=9)
    (token,) = engine.step([Row(blocks, 0, 3, [4, 5, 6], 3, True, params)])
    assert isinstance(token, Token)


def test_the_weights_fingerprint_depends_on_weights_config_dtype_and_kernels(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    folder = changed(tiny_folder("llama"), tmp_path)
    first = identity.weights_fingerprint(folder, "", "float32", "cpu-1")

    assert first == identity.weights_fingerprint(folder, "", "float32", "cpu-1")
    assert len(first) == 16
    others = {identity.weights_fingerprint(folder, "", "bfloat16", "cpu-1")}
    others.add(identity.weights_fingerprint(folder, "", "float32", "gpu-1"))
    others.add(identity.weights_fingerprint(tiny_folder("qwen2"), "", "float32", "cpu-1"))
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    network.get_output_embeddings().weight.data[-1] += 1
    network.save_pretrained(folder)
    others.add(identity.weights_fingerprint(folder, "", "float32", "cpu-1"))
    assert len(others | {first}) == 5

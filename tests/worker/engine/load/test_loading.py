"""How a folder becomes an engine, and which problems end the start."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from headrace.worker.engine.cpu.kernel_attention import KernelAttention
from headrace.worker.engine.flat_step import FlatStep
from headrace.worker.engine.interface import Row, SamplingParams, Token
from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel
from tests.worker.engine.conftest import ARCHITECTURES
from tests.worker.engine.load.starting import changed, load

Folder = Callable[[str], Path]
PARAMS = SamplingParams(seed=1, max_tokens=1)
CPU = torch.device("cpu")


def test_a_folder_becomes_an_engine_with_its_description(tiny_folder: Folder, tmp_path: Path) -> None:
    reported: list[str] = []

    model = load(tiny_folder("llama"), tmp_path, context_length=300, progress=reported.append).model

    assert (model.name, model.dtype, model.device, model.tokenizer_fingerprint) == (
        "tiny",
        "float32",
        "cpu",
        "f00d",
    )
    assert (model.context_length, model.vocabulary_size, model.max_running) == (300, 131, 4)
    assert model.eos_ids == {2}
    reported = [sentence for sentence in reported if "compiling" not in sentence]
    assert reported[:4] == [
        "loading tiny in float32",
        "laying out weights",
        "comparing with transformers' own forward pass",
        "measuring the memory of a step",
    ]


@pytest.mark.parametrize("name", ["nowhere", "empty", "model.gguf"])
def test_a_path_without_a_model_is_rejected(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(LoadingError, match=r"no model at .*expected a folder with config\.json"):
        load(tmp_path / name, tmp_path)


def test_a_folder_without_weights_is_rejected(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = changed(tiny_folder("llama"), tmp_path)
    (folder / "model.safetensors").unlink()

    with pytest.raises(LoadingError, match=r"has no weights: neither model\.safetensors nor"):
        load(folder, tmp_path)


def test_a_folder_with_missing_weights_is_rejected(tiny_folder: Folder, tmp_path: Path) -> None:
    """transformers would initialise them randomly and warn."""
    folder = changed(tiny_folder("llama"), tmp_path, num_hidden_layers=3)

    with pytest.raises(LoadingError, match=r"lacks 9 weights, the first of them model\.layers\.2"):
        load(folder, tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.ViTConfig(), "no language modelling head"),
    ],
    ids=["t5", "vit"],
)
def test_a_model_that_is_not_a_causal_language_model_is_rejected(
    config: Any, reason: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match=reason):
        load(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"auto_map": {"AutoConfig": "x.Y"}, "model_type": "new"}, "contains its own code"),
        ({"model_type": "new"}, "does not support"),
        ({}, "does not support"),
    ],
)
def test_models_that_transformers_does_not_support_are_rejected(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(UnsupportedModel, match=reason):
        load(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(vocab_size=131, hidden_size=32, num_hidden_layers=2, state_size=4),
        transformers.GPTJConfig(vocab_size=131, n_embd=32, n_head=2, n_layer=2, rotary_dim=8),
        transformers.BertConfig(
            vocab_size=131, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        ),
    ],
    ids=["recurrent", "own attention", "bidirectional"],
)
@pytest.mark.filterwarnings("ignore")
def test_models_that_do_not_call_our_attention_are_rejected(config: Any, tmp_path: Path) -> None:
    auto: Any = transformers.AutoModelForCausalLM
    network = auto.from_config(config)
    network.save_pretrained(tmp_path / "model")

    with pytest.raises(UnsupportedModel):
        load(tmp_path / "model", tmp_path)


@pytest.mark.parametrize("wrong", ["scale", "window", "blocks"])
def test_an_engine_that_computes_incorrectly_does_not_start(
    wrong: str, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(KernelAttention):
        def __init__(self, memory: Any, flat: FlatStep) -> None:
            if wrong == "blocks":
                flat = dataclasses.replace(flat, tables=np.ascontiguousarray(flat.tables[:, ::-1]))
            super().__init__(memory, flat)

        def __call__(self, layer: int, query: Any, keys: Any, values: Any, masking: Any) -> torch.Tensor:
            if wrong == "scale":
                masking = dataclasses.replace(masking, scale=masking.scale * 1.1)
            if wrong == "window" and masking.window is not None:
                masking = dataclasses.replace(masking, window=masking.window + 1)
            return super().__call__(layer, query, keys, values, masking)

    monkeypatch.setattr("headrace.worker.engine.cpu.kernel_attention.KernelAttention", Wrong)

    with pytest.raises(
        UnsupportedModel, match=r"differs from transformers: its logits have a relative error of"
    ):
        load(tiny_folder("gemma3"), tmp_path)


@pytest.mark.parametrize("exact", [True, False])
def test_an_engine_is_exact_only_if_the_check_shows_it(
    exact: bool, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BatchDependent(KernelAttention):
        """Rounds differently in a batch."""

        def __call__(self, *arguments: Any) -> torch.Tensor:
            out = super().__call__(*arguments)
            return out if exact or self._flat.tokens == 1 else out * (1 + 2**-20)

    monkeypatch.setattr("headrace.worker.engine.cpu.kernel_attention.KernelAttention", BatchDependent)

    assert load(tiny_folder("gpt_neox"), tmp_path).model.exact is exact


def test_attention_that_is_wrong_only_for_long_sequences_does_not_start(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the whole model uses shorter sequences."""

    class Forgetful(KernelAttention):
        def __call__(self, layer: int, query: Any, keys: Any, values: Any, masking: Any) -> torch.Tensor:
            return super().__call__(layer, query, keys, values, dataclasses.replace(masking, window=500))

    monkeypatch.setattr("headrace.worker.engine.cpu.kernel_attention.KernelAttention", Forgetful)

    with pytest.raises(UnsupportedModel, match=r"attention \(kernels\) over .* has a relative error of"):
        load(tiny_folder("gpt_neox"), tmp_path)


def test_kv_memory_holds_as_many_sequences_as_may_run_and_is_reported(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    reported: list[str] = []

    model = load(tiny_folder("llama"), tmp_path, context_length=300, progress=reported.append).model

    assert model.kv_blocks == 4 * 10  # of 32 tokens
    assert reported[-1] == "KV memory for 1280 tokens, 0.0 GiB"


def test_kv_memory_can_be_set(tiny_folder: Folder, tmp_path: Path) -> None:
    block = 2 * (2 * 32 * (16 + 16)) * 4  # layers, KV heads, tokens, numbers of a key and a value, bytes

    model = load(tiny_folder("llama"), tmp_path, context_length=300, kv_memory=100 * block / 2**30).model

    assert model.kv_blocks == 100


def test_kv_memory_smaller_than_one_sequence_is_rejected(tiny_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(LoadingError, match=r"one sequence with the whole context needs .* a shorter context"):
        load(tiny_folder("llama"), tmp_path, kv_memory=1e-6)


def test_a_model_whose_logits_are_not_finite_is_rejected(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = changed(tiny_folder("llama"), tmp_path)
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    network.get_output_embeddings().weight.data.fill_(float("nan"))
    network.save_pretrained(folder)

    with pytest.raises(UnsupportedModel, match="not finite in float32"):
        load(folder, tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "cuda:99"}, "but .*, or use --device cpu"),
        ({"dtype": "int4"}, "is not one of auto, float32, bfloat16, float16, int8"),
        ({"dtype": "int8"}, "int8 is not supported"),
        ({"context_length": 4096}, "is not between 2 and 2048"),
        ({"context_length": 1}, "is not between 2 and 2048"),
        ({"context_length": 0}, "is not between 2 and 2048"),
    ],
)
def test_settings_that_are_not_supported_are_rejected(
    options: dict[str, Any], reason: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    with pytest.raises(LoadingError, match=reason):
        load(tiny_folder("llama"), tmp_path, **options)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize("context", [2, 16, 17, 128, 255])
def test_a_context_shorter_than_the_check_at_start_is_served(
    context: int, architecture: str, tiny_folder: Folder, tiny_network: Callable[[str], Any], tmp_path: Path
) -> None:
    """The check computes longer sequences; the kernels read the rope of each position from a table."""
    engine = load(tiny_folder(architecture), tmp_path, context_length=context)
    ids = [7] * (context - 1)

    computed = engine.compute([Row([3, 1, 0, 2, 4, 5, 6, 7], 0, len(ids), ids, len(ids), True, PARAMS)])

    assert engine.model.context_length == context
    expected = tiny_network(architecture)(torch.tensor([ids])).logits[0, -1:].detach()
    assert torch.allclose(computed.logits, expected, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("limit", [64, 100, 255])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_with_a_shorter_context_than_the_check_is_served(
    kind: str, limit: int, tmp_path: Path
) -> None:
    """GPT-2 has a table of positions, which ends at its limit."""
    config: Any = transformers.GPT2Config(
        vocab_size=131, n_embd=64, n_layer=2, n_head=4, n_positions=limit, bos_token_id=1, eos_token_id=2
    )
    if kind == "llama":
        config = ARCHITECTURES["llama"]()
        config.max_position_embeddings = limit
    auto: Any = transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path / "model")

    assert load(tmp_path / "model", tmp_path).model.context_length == limit


def test_a_sequence_beyond_the_table_of_positions_is_an_error(tiny_folder: Folder, tmp_path: Path) -> None:
    engine = load(tiny_folder("llama"), tmp_path, context_length=300)

    with pytest.raises(IndexError, match="position 300 is out of range: must be from 0 to 299"):
        engine.step([Row(list(range(10)), 0, 301, [7] * 301, 301, True, PARAMS)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_supported(dtype: str, tiny_folder: Folder, tmp_path: Path) -> None:
    engine = load(tiny_folder("qwen2"), tmp_path, dtype=dtype)
    params = SamplingParams(seed=1, max_tokens=3, logprobs=True)

    (token,) = engine.step([Row([3], 0, 5, [3, 4, 5, 6, 7], 5, True, params)])

    assert engine.model.dtype == dtype
    assert isinstance(token, Token)

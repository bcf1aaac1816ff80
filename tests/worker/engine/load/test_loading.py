from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from headrace import models
from headrace.worker.engine.cpu.kernel_attention import KernelAttention
from headrace.worker.engine.flat_step import FlatStep
from headrace.worker.engine.interface import Row, SamplingParams, Token
from headrace.worker.engine.load import identity, model_config
from headrace.worker.engine.load.gguf import weights as gguf_weights
from headrace.worker.engine.load.loading import load_engine
from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel
from headrace.worker.engine.torch_engine import TorchEngine
from tests.worker.engine.conftest import ARCHITECTURES, VOCABULARY

Folder = Callable[[str], Path]
PARAMS = SamplingParams(seed=1, max_tokens=1)
CPU = torch.device("cpu")


def load(path: Path, tmp_path: Path, **options: Any) -> TorchEngine:
    settings = {"dtype": "float32", "max_running": 4, **options}
    return load_engine(path, name="tiny", cache=tmp_path, tokenizer_fingerprint="f00d", **settings)


def changed(folder: Path, tmp_path: Path, **config: Any) -> Path:
    """Copy a model folder with another config."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return copy


def test_a_folder_becomes_an_engine_that_tells_what_it_is(tiny_folder: Folder, tmp_path: Path) -> None:
    heard: list[str] = []

    model = load(tiny_folder("llama"), tmp_path, context_length=300, progress=heard.append).model

    assert (model.name, model.dtype, model.device, model.tokenizer_fingerprint) == (
        "tiny",
        "float32",
        "cpu",
        "f00d",
    )
    assert (model.context_length, model.vocabulary_size, model.max_running) == (300, 131, 4)
    assert model.eos_ids == {2}
    heard = [sentence for sentence in heard if "compiling" not in sentence]
    assert heard[:4] == [
        "loading tiny in float32",
        "laying out weights",
        "comparing with transformers' own forward pass",
        "measuring the memory of a step",
    ]


@pytest.mark.parametrize("name", ["nowhere", "empty", "model.gguf"])
def test_a_path_without_a_model_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(LoadingError, match=r"no model at .*expected a folder with config\.json"):
        load(tmp_path / name, tmp_path)


def test_a_folder_without_weights_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = changed(tiny_folder("llama"), tmp_path)
    (folder / "model.safetensors").unlink()

    with pytest.raises(LoadingError, match=r"has no weights: neither model\.safetensors nor"):
        load(folder, tmp_path)


def test_a_folder_that_lacks_some_weights_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    """transformers would make them up and warn."""
    folder = changed(tiny_folder("llama"), tmp_path, num_hidden_layers=3)

    with pytest.raises(LoadingError, match=r"lacks 9 weights, the first of them model\.layers\.2"):
        load(folder, tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.ViTConfig(), "no head to generate with"),
    ],
    ids=["t5", "vit"],
)
def test_what_is_not_a_causal_language_model_is_refused(config: Any, reason: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match=reason):
        load(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"auto_map": {"AutoConfig": "x.Y"}, "model_type": "new"}, "brings code of its own"),
        ({"model_type": "new"}, "does not know"),
        ({}, "does not know"),
    ],
)
def test_models_that_transformers_does_not_have_are_refused(
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
    ids=["recurrent", "own attention", "looks both ways"],
)
@pytest.mark.filterwarnings("ignore")
def test_models_that_do_not_attend_through_us_are_refused(config: Any, tmp_path: Path) -> None:
    auto: Any = transformers.AutoModelForCausalLM
    network = auto.from_config(config)
    network.save_pretrained(tmp_path / "model")

    with pytest.raises(UnsupportedModel):
        load(tmp_path / "model", tmp_path)


@pytest.mark.parametrize("wrong", ["scale", "window", "blocks"])
def test_an_engine_that_computes_something_else_does_not_start(
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

    with pytest.raises(UnsupportedModel, match=r"is not what transformers computes: its logits are off by"):
        load(tiny_folder("gemma3"), tmp_path)


@pytest.mark.parametrize("exact", [True, False])
def test_an_engine_is_exact_only_if_it_was_seen_to_be(
    exact: bool, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Depends(KernelAttention):
        """Rounds otherwise in company."""

        def __call__(self, *arguments: Any) -> torch.Tensor:
            out = super().__call__(*arguments)
            return out if exact or self._ragged.tokens == 1 else out * (1 + 2**-20)

    monkeypatch.setattr("headrace.worker.engine.cpu.kernel_attention.KernelAttention", Depends)

    assert load(tiny_folder("gpt_neox"), tmp_path).model.exact is exact


def test_attention_that_is_wrong_only_far_into_a_sequence_does_not_start(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequences that the whole model is tried with at start are shorter than that."""

    class Forgetful(KernelAttention):
        def __call__(self, layer: int, query: Any, keys: Any, values: Any, masking: Any) -> torch.Tensor:
            return super().__call__(layer, query, keys, values, dataclasses.replace(masking, window=500))

    monkeypatch.setattr("headrace.worker.engine.cpu.kernel_attention.KernelAttention", Forgetful)

    with pytest.raises(UnsupportedModel, match=r"attention \(kernels\) over .* is off by"):
        load(tiny_folder("gpt_neox"), tmp_path)


def test_memory_for_sequences_is_made_for_as_many_as_may_run_and_told(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    heard: list[str] = []

    model = load(tiny_folder("llama"), tmp_path, context_length=300, progress=heard.append).model

    assert model.kv_blocks == 4 * 10  # of 32 tokens
    assert heard[-1] == "KV memory for 1280 tokens, 0.0 GiB"


def test_memory_may_be_given_by_setting(tiny_folder: Folder, tmp_path: Path) -> None:
    block = 2 * (2 * 32 * (16 + 16)) * 4  # layers, KV heads, tokens, numbers of a key and a value, bytes

    model = load(tiny_folder("llama"), tmp_path, context_length=300, kv_memory=100 * block / 2**30).model

    assert model.kv_blocks == 100


def test_memory_that_holds_not_one_sequence_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(LoadingError, match=r"one sequence of the whole context takes .* a shorter context"):
        load(tiny_folder("llama"), tmp_path, kv_memory=1e-6)


def test_logits_that_are_not_finite_at_start_are_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = changed(tiny_folder("llama"), tmp_path)
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    network.get_output_embeddings().weight.data.fill_(float("nan"))
    network.save_pretrained(folder)

    with pytest.raises(UnsupportedModel, match="not finite in float32"):
        load(folder, tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "cuda:99"}, "finds . CUDA devices; use cpu"),
        ({"device": "tpu"}, "is not one of cpu, cuda"),
        ({"device": "mps"}, "is not one of cpu, cuda"),
        ({"dtype": "int4"}, "is not one of auto, float32, bfloat16, float16, int8"),
        ({"dtype": "int8"}, "int8 is not to be had"),
        ({"context_length": 4096}, "is not between 2 and 2048"),
        ({"context_length": 1}, "is not between 2 and 2048"),
        ({"context_length": 0}, "is not between 2 and 2048"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(
    options: dict[str, Any], reason: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    with pytest.raises(LoadingError, match=reason):
        load(tiny_folder("llama"), tmp_path, **options)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize("context", [2, 16, 17, 128, 255])
def test_a_context_shorter_than_the_check_at_start_is_served(
    context: int, architecture: str, tiny_folder: Folder, tiny_network: Callable[[str], Any], tmp_path: Path
) -> None:
    """The check computes longer sequences; the kernels read each position's rotation from a table."""
    engine = load(tiny_folder(architecture), tmp_path, context_length=context)
    ids = [7] * (context - 1)

    computed = engine.compute([Row([3, 1, 0, 2, 4, 5, 6, 7], 0, len(ids), ids, len(ids), True, PARAMS)])

    assert engine.model.context_length == context
    expected = tiny_network(architecture)(torch.tensor([ids])).logits[0, -1:].detach()
    assert torch.allclose(computed.logits, expected, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("limit", [64, 100, 255])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_that_holds_fewer_tokens_than_the_check_is_served(
    kind: str, limit: int, tmp_path: Path
) -> None:
    """GPT-2 has a table of positions, and none beyond its limit."""
    config: Any = transformers.GPT2Config(
        vocab_size=131, n_embd=64, n_layer=2, n_head=4, n_positions=limit, bos_token_id=1, eos_token_id=2
    )
    if kind == "llama":
        config = ARCHITECTURES["llama"]()
        config.max_position_embeddings = limit
    auto: Any = transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path / "model")

    assert load(tmp_path / "model", tmp_path).model.context_length == limit


def test_a_sequence_beyond_the_table_of_positions_is_an_error_and_not_read_past_it(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    engine = load(tiny_folder("llama"), tmp_path, context_length=300)

    with pytest.raises(IndexError, match="no position 300, only 300 from 0 on"):
        engine.step([Row(list(range(10)), 0, 301, [7] * 301, 301, True, PARAMS)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_works_too(dtype: str, tiny_folder: Folder, tmp_path: Path) -> None:
    engine = load(tiny_folder("qwen2"), tmp_path, dtype=dtype)
    params = SamplingParams(seed=1, max_tokens=3, logprobs=True)

    (token,) = engine.step([Row([3], 0, 5, [3, 4, 5, 6, 7], 5, True, params)])

    assert engine.model.dtype == dtype
    assert isinstance(token, Token)


@pytest.mark.parametrize(("asked", "served"), [(None, 1024), (1024, 1024), (700, 700)])
def test_rope_that_scales_with_the_batch_is_kept_to_its_original_length(
    asked: int | None, served: int
) -> None:
    factors = [1.0] * 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": 1024,
    }
    config = transformers.Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=4096,
        original_max_position_embeddings=1024,
        rope_parameters=rope,
    )

    assert model_config.choose_context(config, asked) == served


def test_turns_end_with_whatever_the_folder_names_or_is_known_to_mean_it(
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


def test_ids_that_end_a_turn_but_are_beyond_the_vocabulary_are_left_out(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    folder = changed(tiny_folder("llama"), tmp_path, eos_token_id=[2, 4_000_000])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [VOCABULARY, -1]}))
    engine = load(folder, tmp_path)
    assert engine.model.eos_ids == {2}

    blocks = range(engine.model.kv_blocks)
    params = SamplingParams(seed=1, max_tokens=9, min_tokens=9)
    (token,) = engine.step([Row(blocks, 0, 3, [4, 5, 6], 3, True, params)])
    assert isinstance(token, Token)


def test_the_weights_fingerprint_tells_weights_configs_and_dtypes_apart(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    folder = changed(tiny_folder("llama"), tmp_path)
    first = identity.weights_fingerprint(folder, "", "float32")

    assert first == identity.weights_fingerprint(folder, "", "float32")
    assert len(first) == 16
    others = {identity.weights_fingerprint(folder, "", "bfloat16")}
    others.add(identity.weights_fingerprint(tiny_folder("qwen2"), "", "float32"))
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    network.get_output_embeddings().weight.data[-1] += 1
    network.save_pretrained(folder)
    others.add(identity.weights_fingerprint(folder, "", "float32"))
    assert len(others | {first}) == 4


def test_a_gguf_file_is_unpacked_once_even_if_many_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def unpack(path: Path, folder: Path) -> None:
        made.append(folder)
        (folder / "model.safetensors").write_bytes(path.read_bytes() * 2)
        gguf_weights.seal(folder)

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


def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 64)

    with pytest.raises(LoadingError, match=r"cannot read .*model\.gguf"):
        load(path, tmp_path)

    assert not [entry for entry in (tmp_path / "dequantised").iterdir() if entry.is_dir()]


@pytest.mark.model
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_unpacked_gguf_answers_as_the_file_itself(
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

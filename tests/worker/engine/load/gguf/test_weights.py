"""gguf files are read completely, as llama.cpp defines them, or rejected by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from headrace.worker.engine.load.loading import load_engine
from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel
from tests.worker.engine.load.gguf.gguf_files import (
    SIZES,
    Tensors,
    llama,
    network_of,
    off,
    unpacked,
    write_gguf,
)
from tests.worker.engine.load.gguf.test_rotation import LLAMA3, llama3_factors

NETWORKS: dict[str, tuple[str, Any, Mapping[str, Any]]] = {
    "llama": ("llama", transformers.LlamaConfig(**SIZES), {"llama.rope.dimension_count": 16}),
    "llama, heads of their own width, untied, with biases": (
        "llama",
        transformers.LlamaConfig(**SIZES, head_dim=32, attention_bias=True, rms_norm_eps=0.01),
        {"llama.rope.dimension_count": 32, "llama.expert_count": 0},
    ),
    "qwen2": ("qwen2", transformers.Qwen2Config(**SIZES, tie_word_embeddings=True), {}),
    "qwen3": ("qwen3", transformers.Qwen3Config(**SIZES, head_dim=24), {}),
    "qwen2moe": (
        "qwen2moe",
        transformers.Qwen2MoeConfig(
            **SIZES,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=64,
            norm_topk_prob=False,
        ),
        {
            "qwen2moe.expert_count": 4,
            "qwen2moe.expert_used_count": 2,
            "qwen2moe.expert_feed_forward_length": 32,
            "qwen2moe.expert_shared_feed_forward_length": 64,
        },
    ),
    "qwen3moe": (
        "qwen3moe",
        transformers.Qwen3MoeConfig(
            **SIZES | {"head_dim": 16},
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            norm_topk_prob=True,
        ),
        {
            "qwen3moe.expert_count": 4,
            "qwen3moe.expert_used_count": 2,
            "qwen3moe.expert_feed_forward_length": 32,
        },
    ),
    "gemma2": (
        "gemma2",
        transformers.Gemma2Config(
            **SIZES,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=24,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0,
        ),
        {
            "gemma2.attention.sliding_window": 24,
            "gemma2.attn_logit_softcapping": 2.0,
            "gemma2.final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "gemma3",
        transformers.Gemma3TextConfig(
            **SIZES | {"num_hidden_layers": 7},
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=24,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        ),
        {
            "gemma3.attention.sliding_window": 24,
            "gemma3.rope.freq_base": 1_000_000.0,
            "gemma3.rope.scaling.type": "linear",
            "gemma3.rope.scaling.factor": 8.0,
        },
    ),
    "phi3, rotated in part, sliding": (
        "phi3",
        transformers.Phi3Config(
            **SIZES,
            sliding_window=30,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75},
        ),
        {"phi3.rope.dimension_count": 12, "phi3.attention.sliding_window": 30},
    ),
    "starcoder2": ("starcoder2", transformers.Starcoder2Config(**SIZES, tie_word_embeddings=True), {}),
    "gpt2": (
        "gpt2",
        transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=512, n_inner=96),
        {},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_gguf_file_computes_the_same_as_its_original_model(name: str, tmp_path: Path) -> None:
    architecture, config, keys = NETWORKS[name]
    network = network_of(config)
    path = write_gguf(tmp_path / "model.gguf", network, architecture, keys=keys)

    assert off(unpacked(path, tmp_path), network) < 1e-5


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"llama.attention.scale": 0.5}, "llama.attention.scale"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale"),
        ({"llama.residual_scale": 0.5}, "llama.residual_scale"),
        ({"llama.embedding_scale": 12.0}, "llama.embedding_scale"),
        ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.attention.value_length": 8}, "its key length 16 differs from its value length 8"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count differs from the head dimension"),
        ({"llama.rope.scaling.type": "su"}, "llama.rope.scaling.type is su"),
        ({"llama.rope.scaling.type": "longrope"}, "lacks rope_factors_long.weight"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "no original_context_length"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "scaled in two ways at once"),
        ({"llama.attention.head_count": [4, 2]}, "llama.attention.head_count differs between layers"),
        ({"llama.attention.causal": False}, "llama.attention.causal is False"),
        ({"something.new": 1}, "something.new"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm_rms_epsilon"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"llama.block_count": 0}, "llama.block_count is 0"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "has nan for llama.attention.layer_norm"),
        ({"llama.rope.freq_base": float("inf")}, "has inf for llama.rope.freq_base"),
        ({"llama.rope.freq_base": -1.0}, "its rope has base -1.0"),
        ({"llama.vocab_size": 97}, "vocabulary of 97, but its embedding has 96"),
        ({"general.type": "adapter", "adapter.type": "lora"}, "a LoRA adapter"),
        ({"general.type": "imatrix"}, "it holds a imatrix"),
    ],
)
def test_metadata_that_changes_results_is_never_ignored(
    keys: Mapping[str, Any], reason: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama(), "llama", keys=keys)

    with pytest.raises(LoadingError, match=rf"model\.gguf cannot be served: .*{re.escape(reason)}"):
        unpacked(path, tmp_path)

    assert not [entry for entry in (tmp_path / "dequantised").iterdir() if entry.is_dir()]


def test_an_unsupported_architecture_is_rejected_with_the_supported_ones(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama(), "falcon", tokens=())

    with pytest.raises(
        UnsupportedModel,
        match=r"its architecture 'falcon' is not supported; supported in gguf files are llama, ",
    ):
        unpacked(path, tmp_path)


@pytest.mark.parametrize(
    "name", ["blk.1.ffn_down.weight", "output_norm.weight", "token_embd.weight", "blk.0.attn_q.weight"]
)
def test_a_missing_tensor_is_rejected_by_name(name: str, tmp_path: Path) -> None:
    """transformers would initialise it randomly, and every later start would read that from the cache."""
    path = write_gguf(tmp_path / "model.gguf", llama(), "llama", change=lambda tensors: tensors.pop(name))

    with pytest.raises(LoadingError, match=rf"model\.gguf cannot be served: .*{re.escape(name)}"):
        unpacked(path, tmp_path)

    assert not [entry for entry in (tmp_path / "dequantised").iterdir() if entry.is_dir()]


def test_missing_tensors_of_experts_are_rejected(tmp_path: Path) -> None:
    architecture, config, keys = NETWORKS["qwen3moe"]
    path = write_gguf(
        tmp_path / "model.gguf",
        network_of(config),
        architecture,
        keys=keys,
        change=lambda tensors: tensors.pop("blk.1.ffn_up_exps.weight"),
    )

    with pytest.raises(LoadingError, match=r"the first of them blk\.1\.ffn_up_exps\.weight"):
        unpacked(path, tmp_path)


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_of_a_split_file_is_rejected_with_the_command_to_join(part: int, tmp_path: Path) -> None:
    def halve(tensors: Tensors) -> None:
        for name in sorted(tensors)[part::2]:
            tensors.pop(name)

    keys = {"split.no": part, "split.count": 2, "split.tensors.count": 21}
    path = write_gguf(tmp_path / "m-00001-of-00002.gguf", llama(), "llama", keys=keys, change=halve)

    with pytest.raises(
        LoadingError, match=rf"part {part + 1} of a model in 2 files; join .*llama-gguf-split --merge"
    ):
        unpacked(path, tmp_path)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "blk.2.attn_norm.weight", "blk.0.ffn_gate_inp.weight", "extra"]
)
def test_an_unknown_tensor_is_rejected_by_name(name: str, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors[name] = np.ones(64)

    path = write_gguf(
        tmp_path / "model.gguf", network_of(transformers.Qwen3Config(**SIZES)), "qwen3", change=add
    )

    with pytest.raises(LoadingError, match=rf"{re.escape(name)}|lacks .*blk\.0\.attn_k\.bias"):
        unpacked(path, tmp_path)


def test_a_tensor_with_a_wrong_shape_is_rejected_by_name(tmp_path: Path) -> None:
    def cut(tensors: Tensors) -> None:
        tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"][:-1]

    path = write_gguf(tmp_path / "model.gguf", llama(), "llama", change=cut)

    with pytest.raises(LoadingError, match=r"model\.gguf.*mlp\.up_proj\.weight: the file has \[95, 64\]"):
        unpacked(path, tmp_path)


def test_a_file_without_a_tokenizer_is_rejected(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama(), "llama", tokens=())

    with pytest.raises(LoadingError, match=r"model\.gguf has no tokenizer"):
        unpacked(path, tmp_path)


def test_end_of_turn_ids_beyond_the_vocabulary_are_dropped(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama(), "llama", keys={"tokenizer.ggml.eot_token_id": 5000})

    assert unpacked(path, tmp_path).generation_config.eos_token_id == [2]


def whole(path: Path) -> bytes:
    return write_gguf(path, llama(), "llama").read_bytes()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "is empty"),
        (
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            "git-lfs pull|git lfs pull",
        ),
        (lambda data: b"<!DOCTYPE html><html></html>", "is a web page"),
        (lambda data: b"GGML" + data[4:], "begins with b'GGML'"),
        (lambda data: data[:-4000], "is damaged, or the file is truncated"),
        (lambda data: data[:200], "is damaged, or the file is truncated"),
        (lambda data: data[:10], "is damaged, or the file is truncated"),
        (lambda data: data[:4] + b"\xff" * 4 + data[8:], "is damaged, or the file is truncated"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "is damaged, or the file is truncated"),
        (lambda data: b"GGUF" + bytes(64), "is damaged, or the file is truncated"),
    ],
)
def test_a_damaged_file_is_reported_with_the_reason_in_one_line(
    damage: Any, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(whole(tmp_path / "whole.gguf")))

    with pytest.raises(LoadingError, match=rf"model\.gguf.*({reason})") as refusal:
        load_engine(path, name="tiny", cache=tmp_path, tokenizer_fingerprint="")

    assert "\n" not in str(refusal.value)
    assert "download it again" in str(refusal.value)


def test_a_gguf_file_is_served(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "model.gguf",
        llama(rope_parameters=LLAMA3),
        "llama",
        keys={"llama.rope.freq_base": 500000.0},
        change=lambda tensors: tensors.update({"rope_freqs.weight": llama3_factors()}),
    )

    model = load_engine(path, name="tiny", cache=tmp_path, tokenizer_fingerprint="", dtype="float32").model

    assert model.context_length == 512
    assert model.eos_ids == {2}

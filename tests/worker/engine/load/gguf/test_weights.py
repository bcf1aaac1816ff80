"""gguf files are read whole, and as llama.cpp means them, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from headrace.worker.engine.load.gguf import weights as gguf_weights
from headrace.worker.engine.load.loading import load_engine
from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel
from tests.worker.engine.load.gguf.gguf_files import Tensors, randomised, write_gguf

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = torch.randint(96, (1, 200), generator=torch.Generator().manual_seed(3))
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def network_of(config: Any) -> Any:
    auto: Any = transformers.AutoModelForCausalLM
    return randomised(auto.from_config(config))


def llama(**config: Any) -> Any:
    return network_of(transformers.LlamaConfig(**SIZES | config))


def unpacked(path: Path, cache: Path) -> Any:
    folder = gguf_weights.dequantised(path, digest="d" * 64, cache=cache, progress=lambda _: None)
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def off(network: Any, reference: Any) -> float:
    """Return how far one network's logits are from another's, as a share of their norm."""
    mine, other = network(IDS).logits.double(), reference(IDS).logits.double()
    return float((mine - other).norm() / other.norm())


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
def test_a_gguf_file_computes_what_the_model_does_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    architecture, config, keys = NETWORKS[name]
    network = network_of(config)
    path = write_gguf(tmp_path / "model.gguf", network, architecture, keys=keys)

    assert off(unpacked(path, tmp_path), network) < 1e-5


def llama3_factors(width: int = 16) -> Any:
    """Factors by which llama.cpp's converter divides the frequencies of Llama 3.1, as it computes them."""
    factors = []
    for index in range(0, width, 2):
        wavelength = 2 * np.pi * LLAMA3["rope_theta"] ** (index / width)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(factors, np.float32)


ROTATIONS: dict[str, tuple[dict[str, Any], Mapping[str, Any], Any]] = {
    "llama3": (LLAMA3, {}, llama3_factors()),
    "factors of its own": (
        {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "factor": 1.0,
            "attention_factor": 1.0,
            "short_factor": [1.0, 1.0, 1.5, 2.0, 3.0, 5.0, 5.0, 7.0],
            "long_factor": [1.0, 1.0, 1.5, 2.0, 3.0, 5.0, 5.0, 7.0],
            "original_max_position_embeddings": 512,
        },
        {},
        np.array([1.0, 1.0, 1.5, 2.0, 3.0, 5.0, 5.0, 7.0], np.float32),
    ),
    "linear": (
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        None,
    ),
    "linear, in the old way": (
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
        None,
    ),
    "none": (
        {"rope_type": "default", "rope_theta": 10_000.0},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        None,
    ),
    "yarn": (
        {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
            "llama.rope.scaling.finetuned": True,
        },
        None,
    ),
    "yarn, with numbers of its own": (
        {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 0.5 * (0.1 * np.log(4.0).item() + 1),
        },
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
            "llama.rope.scaling.attn_factor": 0.5,
            "llama.rope.scaling.yarn_beta_fast": 16.0,
            "llama.rope.scaling.yarn_beta_slow": 2.0,
        },
        None,
    ),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_scaled_rotation_is_read(name: str, tmp_path: Path) -> None:
    """Answers degrade with the distance when it is not, which no short check shows."""
    rope, keys, factors = ROTATIONS[name]
    network = llama(rope_parameters=rope)

    def scale(tensors: Tensors) -> None:
        if factors is not None:
            tensors["rope_freqs.weight"] = factors

    path = write_gguf(
        tmp_path / "model.gguf",
        network,
        "llama",
        keys={"llama.rope.freq_base": rope["rope_theta"], **keys},
        change=scale,
    )

    read = unpacked(path, tmp_path)

    assert off(read, network) < 1e-5
    if rope["rope_type"] != "default":
        assert off(read, llama()) > 1e-3, "the scaling has a say in this test"


def test_the_two_sets_of_factors_of_a_long_context_are_read(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [2.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        "original_max_position_embeddings": 256,
        "attention_factor": 1.19,
        "partial_rotary_factor": 1.0,
    }
    config = transformers.Phi3Config(**SIZES, original_max_position_embeddings=256, rope_parameters=rope)
    network = network_of(config)

    def scale(tensors: Tensors) -> None:
        for kind in ("short", "long"):
            tensors[f"rope_factors_{kind}.weight"] = np.array(rope[f"{kind}_factor"], np.float32)

    path = write_gguf(
        tmp_path / "model.gguf",
        network,
        "phi3",
        keys={"phi3.rope.scaling.attn_factor": 1.19, "phi3.rope.scaling.original_context_length": 256},
        change=scale,
    )

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
        ({"llama.attention.value_length": 8}, "its keys are 16 wide and its values 8"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is not the width of a head"),
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
        ({"llama.rope.freq_base": -1.0}, "its rotation has base -1.0"),
        ({"llama.vocab_size": 97}, "vocabulary of 97, its embedding one of 96"),
        ({"general.type": "adapter", "adapter.type": "lora"}, "a LoRA adapter"),
        ({"general.type": "imatrix"}, "it holds a imatrix"),
    ],
)
def test_metadata_that_changes_the_numbers_is_never_left_out(
    keys: Mapping[str, Any], reason: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama(), "llama", keys=keys)

    with pytest.raises(LoadingError, match=rf"model\.gguf cannot be served: .*{re.escape(reason)}"):
        unpacked(path, tmp_path)

    assert not [entry for entry in (tmp_path / "dequantised").iterdir() if entry.is_dir()]


def test_an_architecture_that_is_not_read_is_refused_with_those_that_are(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama(), "falcon", tokens=())

    with pytest.raises(
        UnsupportedModel, match=r"of architecture 'falcon', and gguf files are read for llama, "
    ):
        unpacked(path, tmp_path)


@pytest.mark.parametrize(
    "name", ["blk.1.ffn_down.weight", "output_norm.weight", "token_embd.weight", "blk.0.attn_q.weight"]
)
def test_a_file_that_lacks_a_tensor_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    """transformers would fill it with random numbers, and every later start would find those in the cache."""
    path = write_gguf(tmp_path / "model.gguf", llama(), "llama", change=lambda tensors: tensors.pop(name))

    with pytest.raises(LoadingError, match=rf"model\.gguf cannot be served: .*{re.escape(name)}"):
        unpacked(path, tmp_path)

    assert not [entry for entry in (tmp_path / "dequantised").iterdir() if entry.is_dir()]


def test_half_of_the_experts_is_not_enough(tmp_path: Path) -> None:
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
def test_a_part_of_a_split_file_is_refused_with_the_way_to_join_them(part: int, tmp_path: Path) -> None:
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
def test_a_tensor_that_the_model_has_no_place_for_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors[name] = np.ones(64)

    path = write_gguf(
        tmp_path / "model.gguf", network_of(transformers.Qwen3Config(**SIZES)), "qwen3", change=add
    )

    with pytest.raises(LoadingError, match=rf"{re.escape(name)}|lacks .*blk\.0\.attn_k\.bias"):
        unpacked(path, tmp_path)


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    def cut(tensors: Tensors) -> None:
        tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"][:-1]

    path = write_gguf(tmp_path / "model.gguf", llama(), "llama", change=cut)

    with pytest.raises(LoadingError, match=r"model\.gguf.*mlp\.up_proj\.weight: the file has \[95, 64\]"):
        unpacked(path, tmp_path)


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama(), "llama", tokens=())

    with pytest.raises(LoadingError, match=r"model\.gguf has no tokenizer"):
        unpacked(path, tmp_path)


def test_ids_beyond_the_vocabulary_end_no_turn(tmp_path: Path) -> None:
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
        (lambda data: data[:-4000], "is damaged, or the file is cut off"),
        (lambda data: data[:200], "is damaged, or the file is cut off"),
        (lambda data: data[:10], "is damaged, or the file is cut off"),
        (lambda data: data[:4] + b"\xff" * 4 + data[8:], "is damaged, or the file is cut off"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "is damaged, or the file is cut off"),
        (lambda data: b"GGUF" + bytes(64), "is damaged, or the file is cut off"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong_in_one_line(
    damage: Any, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(whole(tmp_path / "whole.gguf")))

    with pytest.raises(LoadingError, match=rf"model\.gguf.*({reason})") as refusal:
        load_engine(path, name="tiny", cache=tmp_path, tokenizer_fingerprint="")

    assert "\n" not in str(refusal.value)
    assert "download it again" in str(refusal.value)


def test_a_gguf_file_is_served_and_answers_as_its_model(tmp_path: Path) -> None:
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

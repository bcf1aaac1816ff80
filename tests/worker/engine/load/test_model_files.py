"""Damaged files and weights that would be misread are rejected in one line, with the name of the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headrace.worker.engine.load.loading import load_engine
from headrace.worker.engine.load.refusals import LoadingError
from tests.worker.engine.load.starting import besides_tokenizer, refusal, start

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4096\n"


def sharded(folder: Path) -> Path:
    """Store the model in several files, with an index; return the last of them."""
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="60KB")
    return max(folder.glob("model-*.safetensors"))


def pickled(folder: Path) -> Path:
    (path := folder / "model.safetensors").unlink()
    auto: Any = transformers.AutoModelForCausalLM
    network = auto.from_config(transformers.AutoConfig.from_pretrained(folder))
    torch.save(network.state_dict(), path := folder / "pytorch_model.bin")
    return path


@pytest.mark.parametrize("which", ["model.safetensors", "a part", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(
            lambda data: LFS, "is a git-lfs pointer instead of the file; run `git lfs pull`", id="lfs"
        ),
        pytest.param(lambda data: b"", "is empty; download it again", id="empty"),
        pytest.param(lambda data: data[: len(data) // 2], "is truncated", id="half"),
        pytest.param(lambda data: data[:-1], "is truncated", id="one byte short"),
        pytest.param(lambda data: b"\xff" * len(data), "it is damaged", id="noise"),
        pytest.param(lambda data: b"<html>404</html>", "is a web page", id="web page"),
    ],
)
def test_damaged_weights_are_reported_with_file_and_reason(
    which: str, damage: Callable[[bytes], bytes], reason: str, folder: Path
) -> None:
    path = folder / "model.safetensors"
    if which != path.name:
        path = sharded(folder) if which == "a part" else pickled(folder)
    path.write_bytes(damage(path.read_bytes()))

    message = refusal(folder, allow_pickle=True)

    assert str(path) in message
    assert reason in message


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:8] + b"{" * 40 + data[48:], "its header is damaged"),
        (lambda data: data + b"more", "is damaged"),
        (lambda data: (2).to_bytes(8, "little") + b"{}", "holds no weights"),
        (lambda data: data[:3], "does not begin like a safetensors file"),
        (lambda data: (2).to_bytes(8, "little") + b"[]", "its header is damaged"),
    ],
)
def test_a_damaged_header_is_reported(damage: Callable[[bytes], bytes], reason: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))

    message = refusal(folder)

    assert str(path) in message
    assert reason in message


def test_pickled_weights_are_served_on_request_only(folder: Path) -> None:
    path = pickled(folder)

    assert f"{path} is a pickle, a format that can hold code, and is not loaded" in refusal(folder)
    assert start(folder, allow_pickle=True).vocabulary_size == 131


class Touching:
    """When it is unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_no_code_in_a_pickle_is_run(listed: bool, allow_pickle: bool, folder: Path, tmp_path: Path) -> None:
    """Not even where pickles are allowed: only tensors are read from them."""
    (folder / "model.safetensors").unlink()
    ran = tmp_path / "ran"
    torch.save({"lm_head.weight": torch.zeros(2), "x": Touching(ran)}, folder / "pytorch_model.bin")
    if listed:
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    refusal(folder, allow_pickle=allow_pickle)

    assert not ran.exists()


def test_a_config_cannot_name_other_weights(folder: Path, tmp_path: Path) -> None:
    torch.save({"x": Touching(tmp_path / "ran")}, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "pytorch_model.bin"}))

    assert "names its own file of weights" in refusal(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_with_corrupt_bytes_is_rejected(folder: Path) -> None:
    path = pickled(folder)
    data = bytearray(path.read_bytes())
    at = data.index(b"data.pkl") + 60
    data[at : at + 40] = b"\xff" * 40
    path.write_bytes(data)

    assert f"cannot load the weights in {folder}" in refusal(folder, allow_pickle=True)


def test_a_missing_part_is_reported(folder: Path) -> None:
    part = sharded(folder)
    part.unlink()

    assert f"{folder} lacks {part.name}, which model.safetensors.index.json lists (1 of " in refusal(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": {"x": 3}}', LFS.decode()]
)
def test_a_damaged_index_is_reported(text: str, folder: Path) -> None:
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text(text)

    assert str(folder / "model.safetensors.index.json") in refusal(folder)


def test_weights_under_another_name_are_mentioned(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")

    assert "has no weights" in (message := refusal(folder))
    assert "consolidated.safetensors" in message


def test_a_folder_in_place_of_a_file_is_reported(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()

    assert f"{folder / 'model.safetensors'} is a folder, but a file is expected" in refusal(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_without_read_permission_is_reported(name: str, folder: Path) -> None:
    (folder / name).chmod(0)

    assert f"cannot read {folder / name}: permission denied" in refusal(folder)


def test_weights_with_a_wrong_shape_are_reported_with_both_shapes(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = torch.ones(65)
    save_file(weights, path, {"format": "pt"})

    message = refusal(folder)

    assert "model.norm.weight: the file has [65], the config expects [64]" in message


def with_weights(folder: Path, **more: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **more}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "model.layers.0.self_attn.q_proj.weight_scale",
            "it is quantised, but config.json has no quantization_config",
        ),
        (
            "model.layers.0.self_attn.q_proj.qweight",
            "it is quantised, but config.json has no quantization_config",
        ),
        ("model.layers.0.mlp.up_proj.g_idx", "it is quantised, but config.json has no quantization_config"),
        ("model.layers.0.self_attn.q_proj.bias", "without them its answers would be wrong"),
        ("model.layers.1.mlp.down_proj.bias", "without them its answers would be wrong"),
        ("model.layers.2.input_layernorm.weight", "without them its answers would be wrong"),
        ("model.layers.0.self_attn.q_norm.weight", "without them its answers would be wrong"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "a LoRA adapter"),
        ("lm_head.bias", "without them its answers would be wrong"),
    ],
)
def test_weights_that_would_be_dropped_are_rejected_by_name(name: str, reason: str, folder: Path) -> None:
    with_weights(folder, **{name: torch.ones(64)})

    message = refusal(folder)

    assert name in message
    assert reason in message


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.cos_cached", "model.position_ids"],
)
def test_computed_buffers_are_ignored_without_a_warning(name: str, folder: Path) -> None:
    with_weights(folder, **{name: torch.ones(8)})
    warnings: list[str] = []

    start(folder, warn=warnings.append)

    assert besides_tokenizer(warnings) == []


@pytest.mark.parametrize(
    "name", ["vision_tower.patch.weight", "v_head.weight", "model.mtp_layers.0.norm.weight"]
)
def test_parts_that_do_not_affect_text_cause_a_warning(name: str, folder: Path) -> None:
    with_weights(folder, **{name: torch.ones(8)})
    warnings: list[str] = []

    start(folder, warn=warnings.append)

    (warning,) = besides_tokenizer(warnings)
    assert name in warning
    assert str(folder) in warning


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_weights_that_are_already_quantised_are_rejected(kind: torch.dtype, folder: Path) -> None:
    """transformers casts them to floats and drops the scales."""
    name = "model.layers.0.mlp.up_proj.weight"
    with_weights(folder, **{name: torch.zeros(96, 64).to(kind)})

    message = refusal(folder)

    assert f"{folder / 'model.safetensors'} holds {name} as " in message
    assert "already quantised" in message


def test_an_adapter_next_to_its_base_is_rejected(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")

    assert "holds a LoRA adapter (adapter_config.json)" in refusal(folder)


def test_an_output_layer_is_not_dropped_although_the_config_ties_it(tmp_path: Path) -> None:
    """The file has its own output layer, but the config ties it to the embedding."""
    config = transformers.LlamaConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    auto: Any = transformers.AutoModelForCausalLM
    network = auto.from_config(config)
    network.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    ids = torch.tensor([[5, 6, 7]])

    try:
        engine = load_engine(
            tmp_path / "model", name="tiny", cache=tmp_path, tokenizer_fingerprint="", dtype="float32"
        )
    except LoadingError as error:
        assert "lm_head.weight" in str(error)  # noqa: PT017
    else:
        from headrace.worker.engine.interface import Row, SamplingParams

        row = Row([0], 0, 3, [5, 6, 7], 3, True, SamplingParams(seed=1, max_tokens=1))
        expected = network.eval()(ids).logits[0, -1:].detach()
        assert torch.allclose(engine.compute([row]).logits, expected, atol=1e-3)

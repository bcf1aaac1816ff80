"""Damaged files, impossible configs, weights that would be misread: one line each, with the file's name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headrace.worker.engine.load.loading import load_engine
from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel

Folder = Callable[[str], Path]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4096\n"


@pytest.fixture
def folder(tiny_folder: Folder, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), copy)
    return copy


def start(folder: Path, **options: Any) -> Any:
    settings = {"dtype": "float32", "max_running": 4, "context_length": 300, **options}
    return load_engine(folder, name="tiny", cache=folder.parent, tokenizer_fingerprint="", **settings).model


def refusal(folder: Path) -> str:
    with pytest.raises(LoadingError) as refused:
        start(folder)
    message = str(refused.value)
    assert "\n" not in message
    return message


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
            lambda data: LFS, "is a git-lfs pointer and not the file itself; run `git lfs pull`", id="lfs"
        ),
        pytest.param(lambda data: b"", "is empty; download it again", id="empty"),
        pytest.param(lambda data: data[: len(data) // 2], "is cut off", id="half"),
        pytest.param(lambda data: data[:-1], "is cut off", id="one byte short"),
        pytest.param(lambda data: b"\xff" * len(data), "it is damaged", id="noise"),
        pytest.param(lambda data: b"<html>404</html>", "is a web page", id="web page"),
    ],
)
def test_damaged_weights_are_named_with_what_is_wrong(
    which: str, damage: Callable[[bytes], bytes], reason: str, folder: Path
) -> None:
    path = folder / "model.safetensors"
    if which != path.name:
        path = sharded(folder) if which == "a part" else pickled(folder)
    path.write_bytes(damage(path.read_bytes()))

    message = refusal(folder)

    assert str(path) in message
    assert reason in message


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:8] + b"{" * 40 + data[48:], "its header is damaged"),
        (lambda data: data + b"more", "is damaged"),
        (lambda data: (2).to_bytes(8, "little") + b"{}", "holds no weights"),
        (lambda data: data[:3], "does not begin as a safetensors file does"),
        (lambda data: (2).to_bytes(8, "little") + b"[]", "its header is damaged"),
    ],
)
def test_a_damaged_header_is_named(damage: Callable[[bytes], bytes], reason: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))

    message = refusal(folder)

    assert str(path) in message
    assert reason in message


def test_pickled_weights_that_are_whole_are_served(folder: Path) -> None:
    pickled(folder)

    assert start(folder).vocabulary_size == 131


def test_corrupt_bytes_inside_a_pickle_are_a_refusal(folder: Path) -> None:
    path = pickled(folder)
    data = bytearray(path.read_bytes())
    at = data.index(b"data.pkl") + 60
    data[at : at + 40] = b"\xff" * 40
    path.write_bytes(data)

    assert f"cannot load the weights in {folder}" in refusal(folder)


def test_a_part_that_is_missing_is_named(folder: Path) -> None:
    part = sharded(folder)
    part.unlink()

    assert f"{folder} lacks {part.name}, which model.safetensors.index.json names (1 of " in refusal(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": {"x": 3}}', LFS.decode()]
)
def test_a_damaged_index_is_named(text: str, folder: Path) -> None:
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text(text)

    assert str(folder / "model.safetensors.index.json") in refusal(folder)


def test_weights_under_another_name_are_pointed_at(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")

    assert "has no weights" in (message := refusal(folder))
    assert "consolidated.safetensors" in message


def test_a_folder_where_a_file_belongs_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()

    assert f"{folder / 'model.safetensors'} is a folder where a file is expected" in refusal(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_named(name: str, folder: Path) -> None:
    (folder / name).chmod(0)

    assert f"cannot read {folder / name}: permission denied" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("{", "is not JSON"),
        ("null", "holds a NoneType"),
        ("[1]", "holds a list"),
        (LFS.decode(), "git lfs pull"),
        ("\udcff\udcfe", "is not JSON"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(text: str, reason: str, folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))

    message = refusal(folder)

    assert str(path) in message
    assert reason in message


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"num_attention_heads": -4}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": "4"}, "num_attention_heads"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"hidden_size": 63}, "hidden"),
        ({"hidden_size": 64.5}, "hidden_size"),
        ({"hidden_size": 1 << 60}, "cannot load the weights|config.json"),
        ({"head_dim": -1}, "head_dim"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 1000}, "config.json"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"dtype": "nonsense"}, "dtype"),
        ({"torch_dtype": "Tensor"}, "torch_dtype"),
        ({"dtype": 16}, "dtype"),
        ({"hidden_act": "nonsense"}, "hidden_act"),
        ({"hidden_act": 3}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, "nonsense"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")}}, "factor"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "config.json|weights"),
        ({"rope_parameters": [1]}, "config.json"),
        ({"eos_token_id": "two"}, "eos_token_id"),
        ({"model_type": 7}, "model_type"),
        ({"layer_types": ["nonsense", "nonsense"]}, "config.json|nonsense"),
    ],
    ids=str,
)
def test_a_config_that_is_nonsense_is_refused_with_the_field(
    config: dict[str, Any], field: str, folder: Path
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))

    message = refusal(folder)

    assert any(name in message for name in field.split("|"))
    assert str(folder) in message


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_size_that_the_config_leaves_out_is_not_made_up(name: str, folder: Path) -> None:
    """With transformers' default of 32 heads, the weights of 4 fit, and answers are nonsense."""
    path = folder / "config.json"
    plain = json.loads(path.read_text())
    del plain[name]
    path.write_text(json.dumps(plain))

    assert f"{path} does not say {name}" in refusal(folder)


def test_weights_of_another_shape_are_named_with_both_shapes(folder: Path) -> None:
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
        ("model.layers.0.self_attn.q_proj.weight_scale", "it is quantised, and config.json does not say how"),
        ("model.layers.0.self_attn.q_proj.qweight", "it is quantised, and config.json does not say how"),
        ("model.layers.0.mlp.up_proj.g_idx", "it is quantised, and config.json does not say how"),
        ("model.layers.0.self_attn.q_proj.bias", "without them it would answer wrongly"),
        ("model.layers.1.mlp.down_proj.bias", "without them it would answer wrongly"),
        ("model.layers.2.input_layernorm.weight", "without them it would answer wrongly"),
        ("model.layers.0.self_attn.q_norm.weight", "without them it would answer wrongly"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "a LoRA adapter"),
        ("lm_head.bias", "without them it would answer wrongly"),
    ],
)
def test_weights_that_would_be_dropped_are_refused_by_name(name: str, reason: str, folder: Path) -> None:
    with_weights(folder, **{name: torch.ones(64)})

    message = refusal(folder)

    assert name in message
    assert reason in message


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.cos_cached", "model.position_ids"],
)
def test_what_can_be_computed_is_left_out_without_a_word(name: str, folder: Path) -> None:
    with_weights(folder, **{name: torch.ones(8)})
    warnings: list[str] = []

    start(folder, warn=warnings.append)

    assert warnings == []


@pytest.mark.parametrize(
    "name", ["vision_tower.patch.weight", "v_head.weight", "model.mtp_layers.0.norm.weight"]
)
def test_parts_that_have_no_say_in_a_text_are_a_warning(name: str, folder: Path) -> None:
    with_weights(folder, **{name: torch.ones(8)})
    warnings: list[str] = []

    start(folder, warn=warnings.append)

    (warning,) = warnings
    assert name in warning
    assert str(folder) in warning


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_weights_that_are_quantised_already_are_refused(kind: torch.dtype, folder: Path) -> None:
    """transformers casts them to floats and drops the scales."""
    name = "model.layers.0.mlp.up_proj.weight"
    with_weights(folder, **{name: torch.zeros(96, 64).to(kind)})

    message = refusal(folder)

    assert f"{folder / 'model.safetensors'} holds {name} as " in message
    assert "quantised already" in message


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8", "mxfp4", None]
)
def test_a_quantisation_config_is_refused_with_what_to_use(method: str | None, folder: Path) -> None:
    path = folder / "config.json"
    how = {"quant_method": method, "bits": 4} if method else {"bits": 4}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": how}))

    with pytest.raises(
        UnsupportedModel, match=rf"quantised already \({method or 'quantization_config'}\).*gguf file"
    ):
        start(folder)


def test_an_adapter_beside_its_base_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")

    assert "holds a LoRA adapter (adapter_config.json)" in refusal(folder)


def test_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))

    assert "holds a LoRA adapter and no model; merge it" in refusal(tmp_path)


def test_an_output_layer_that_the_config_ties_is_not_dropped(tmp_path: Path) -> None:
    """The file has an output layer of its own, and the config says that it is the embedding."""
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


@pytest.mark.parametrize(
    "text", ['{"eos_token": ', '{"added_tokens_decoder": {"x": 3}}', "[]", '{"added_tokens_decoder": 5}']
)
def test_damaged_settings_of_the_tokenizer_are_named(text: str, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(text)

    assert str(folder / "tokenizer_config.json") in refusal(folder)


def test_end_of_turn_ids_beyond_the_vocabulary_are_left_out_with_a_warning(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 131, 99999]}))
    warnings: list[str] = []

    assert start(folder, warn=warnings.append).eos_ids == {2}
    assert any("[131, 99999]" in warning for warning in warnings)

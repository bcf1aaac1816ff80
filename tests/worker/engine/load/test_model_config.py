"""What config.json may contain, and how invalid ones are rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from headrace.worker.engine.load import model_config
from headrace.worker.engine.load.refusals import UnsupportedModel
from tests.worker.engine.load.starting import refusal, start
from tests.worker.engine.load.test_model_files import LFS


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
def test_an_unreadable_config_is_reported(text: str, reason: str, folder: Path) -> None:
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
def test_an_invalid_config_is_rejected_with_the_field(
    config: dict[str, Any], field: str, folder: Path
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))

    message = refusal(folder)

    assert any(name in message for name in field.split("|"))
    assert str(folder) in message


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_missing_size_is_not_replaced_by_a_default(name: str, folder: Path) -> None:
    """With transformers' default of 32 heads, the weights of 4 heads fit, and answers are meaningless."""
    path = folder / "config.json"
    plain = json.loads(path.read_text())
    del plain[name]
    path.write_text(json.dumps(plain))

    assert f"{path} has no {name}" in refusal(folder)


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8", "mxfp4", None]
)
def test_a_quantisation_config_is_rejected_with_an_alternative(method: str | None, folder: Path) -> None:
    path = folder / "config.json"
    how = {"quant_method": method, "bits": 4} if method else {"bits": 4}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": how}))

    with pytest.raises(
        UnsupportedModel, match=rf"already quantised \({method or 'quantization_config'}\).*gguf file"
    ):
        start(folder)


def test_an_adapter_alone_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))

    assert "holds a LoRA adapter and no model; merge it" in refusal(tmp_path)


@pytest.mark.parametrize(("asked", "served"), [(None, 1024), (1024, 1024), (700, 700)])
def test_rope_that_depends_on_the_batch_is_limited_to_its_original_length(
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

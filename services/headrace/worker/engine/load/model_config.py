"""Read config.json, and reject unsupported models before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from headrace.worker.engine.load import self_check
from headrace.worker.engine.load.model_files import read_json
from headrace.worker.engine.load.refusals import SEE_MODELS, LoadingError, UnsupportedModel, as_loading_error

# The default context length, even of models that support more.
DEFAULT_CONTEXT = 8192

# Fields that must be positive integers, by the names in transformers and in older models.
_COUNTS = (
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
    ),
    *(
        "num_key_value_heads",
        "max_position_embeddings",
        "n_embd",
        "n_layer",
        "n_head",
        "n_positions",
        "d_model",
    ),
)
# Required fields: where one is missing, transformers inserts the number of some other model.
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_CORRECT = "correct it, or download the model again"


def read_config(folder: Path) -> Any:
    """Read config.json as transformers' configuration of a causal language model.

    Raises LoadingError if it is missing or invalid, UnsupportedModel if the model is not supported.
    """
    path = folder / "config.json"
    if not path.exists():
        only_adapter = (folder / "adapter_config.json").exists()
        raise LoadingError(
            f"{folder} holds a LoRA adapter and no model; merge it into its base (peft: merge_and_unload, "
            f"then save_pretrained) and use the result"
            if only_adapter
            else f"no model at {folder}: expected a folder with config.json, or a .gguf file"
        )
    plain = read_json(path)
    kind = plain.get("model_type")
    _reject_quantised(folder, plain)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if "auto_map" in plain:
            raise UnsupportedModel(
                f"{folder} contains its own code (auto_map), which Headrace does not run; "
                f"convert the model to an architecture of transformers"
            )
        raise UnsupportedModel(
            f"{folder} has model_type {kind!r}, which this version of transformers does not support; "
            f"{SEE_MODELS}"
        )
    _check_numbers(path, plain)
    _check_sizes(path, plain)
    with as_loading_error(path, _CORRECT):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{folder} is an encoder-decoder model ({kind}); only decoders are supported: {SEE_MODELS}"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(
            f"{folder} has no language modelling head: {kind} is not a causal language model; {SEE_MODELS}"
        )
    for rope in _ropes(getattr(config.get_text_config(), "rope_parameters", None) or {}):
        name = rope["rope_type"]
        if name != "default" and name not in ROPE_INIT_FUNCTIONS:
            raise LoadingError(f"{path}: rope_type {name!r} is not supported by transformers; {_CORRECT}")
    return config


def _reject_quantised(folder: Path, plain: Mapping[str, Any]) -> None:
    how = plain.get("quantization_config") or plain.get("compression_config")
    if how is None:
        return
    name = how.get("quant_method", how.get("quantization_method")) if isinstance(how, dict) else how
    raise UnsupportedModel(
        f"{folder} is already quantised ({name or 'quantization_config'}), and such weights are not "
        "supported. Use the model's original weights (Headrace quantises them with --dtype int8), or a gguf "
        "file"
    )


def _fields(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Iterate over the fields of a config and of nested configs: full name, own name and value."""
    for name, value in plain.items():
        yield prefix + name, name, value
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")


def _check_numbers(path: Path, plain: Mapping[str, Any]) -> None:
    """Reject impossible numbers. transformers checks their types and some relations."""

    def wrong(name: str, value: Any, expected: str) -> LoadingError:
        return LoadingError(f"{path}: {name} is {value!r}, but must be {expected}; {_CORRECT}")

    for full, name, value in _fields(plain):
        if isinstance(value, float) and not math.isfinite(value):
            raise wrong(full, value, "a finite number")
        if value is None:
            continue
        if name in _COUNTS and not isinstance(value, list):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise wrong(full, value, "an integer above 0")
        elif name.endswith(("_eps", "_epsilon")):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise wrong(full, value, "a number from 0 to 1")
        elif name == "rope_theta":
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise wrong(full, value, "a number above 0")
        elif name in ("dtype", "torch_dtype"):
            if not isinstance(value, str) or not isinstance(getattr(torch, value, None), torch.dtype):
                raise wrong(full, value, "the name of a torch dtype, such as bfloat16")
        elif name in _ACTIVATIONS and (not isinstance(value, str) or value not in ACT2FN):
            raise wrong(full, value, "an activation of transformers, such as silu")


def _check_sizes(path: Path, plain: Mapping[str, Any]) -> None:
    """Reject a config without the sizes of the model, or with inconsistent ones."""
    kind: Any = CONFIG_MAPPING[plain["model_type"]]
    if any(isinstance(plain.get(inner), dict) for inner in getattr(kind, "sub_configs", None) or ()):
        return  # nested configs may rely on the defaults of their family
    names = {size: getattr(kind, "attribute_map", {}).get(size, size) for size in _SIZES}
    with as_loading_error(path, _CORRECT):
        written = kind().to_dict()  # the fields that transformers saves for this type of model
    for size, own in names.items():
        if own in written and plain.get(own) is None and plain.get(size) is None:
            raise LoadingError(f"{path} has no {own}; {_CORRECT}")
    heads = plain.get(names["num_attention_heads"], plain.get("num_attention_heads"))
    shared = plain.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise LoadingError(
            f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {shared}; "
            f"{_CORRECT}"
        )


def longest_context(config: Any) -> int:
    """Return the longest context that the model supports, in tokens. Raises UnsupportedModel if too short."""
    text = config.get_text_config()
    limit = int(getattr(text, "max_position_embeddings", None) or DEFAULT_CONTEXT)
    for rope in _ropes(getattr(text, "rope_parameters", None) or {}):
        # These types scale with the longest sequence of the step: beyond the original length, a row would
        # depend on the rest of the batch, and keys in memory would be stale.
        if rope["rope_type"] in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(text, "original_max_position_embeddings", None) or limit
            limit = min(limit, int(original))
    if limit < self_check.SHORTEST:
        raise UnsupportedModel(
            f"the model supports {limit} tokens; at least {self_check.SHORTEST} are needed"
        )
    return limit


def choose_context(config: Any, requested: int | None) -> int:
    """Choose the context length. Raises LoadingError if the requested one is not supported."""
    limit = longest_context(config)
    if requested is None:
        return min(limit, DEFAULT_CONTEXT)
    # At least one token of prompt and one of answer.
    if not 2 <= requested <= limit:
        raise LoadingError(f"context length {requested} is not between 2 and {limit}, the limit of the model")
    return requested


def _ropes(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rope parameters as a list: some models have one set, others one per type of layer."""
    if "rope_type" in parameters:
        return [parameters]
    return [own for own in parameters.values() if isinstance(own, dict) and "rope_type" in own]


def architecture_of(config: Any) -> str:
    """Return the name of the class of transformers that computes a model."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)  # type: ignore[attr-defined]

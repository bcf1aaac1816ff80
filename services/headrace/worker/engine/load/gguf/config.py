"""Convert the metadata of a gguf file to the configuration of a model, without ignoring any key.

transformers has its own reader, which reads the sizes and ignores much that changes results: rope scaling,
soft caps, attention windows, the head dimension. This module reads every key of the model or rejects it by
name, so that a worker does not start with a file that it would compute incorrectly.

Names and meanings of keys are those of llama.cpp (gguf-py/gguf/constants.py, src/llama-hparams.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from headrace.worker.engine.load.gguf.metadata import Metadata
from headrace.worker.engine.load.gguf.rotation import read_rope
from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel

# The files do not contain the attention scale of Gemma. Like llama.cpp, this module infers it from the number
# of layers: the models of 27 billion parameters differ.
_GEMMA2_LARGEST_LAYERS, _GEMMA3_LARGEST_LAYERS = 46, 62


def config_from(metadata: Metadata) -> Any:
    """Return the transformers configuration that the metadata describes.

    Raises UnsupportedModel if an architecture or key is not supported, LoadingError if the file is one part
    of several, holds no model, or lacks keys.
    """
    _require_whole_model(metadata)
    if metadata.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"its architecture {metadata.architecture!r} is not supported; supported in gguf files are "
            f"{', '.join(ARCHITECTURES)}"
        )
    if "token_embd.weight" not in metadata.tensors:
        raise LoadingError("it lacks token_embd.weight; it is incomplete: download it again")
    kind, values = ARCHITECTURES[metadata.architecture](metadata)
    metadata.allow("attention.causal", True)
    metadata.allow("attention.max_alibi_bias", 0.0)
    metadata.allow("attention.clamp_kqv", 0.0)
    metadata.allow("use_parallel_residual", *((True, False) if kind == "gpt2" else (False,)))
    metadata.allow("tensor_data_layout", "Meta AI original pth", "")
    vocabulary = metadata.tensors["token_embd.weight"][0]
    named = metadata.get("vocab_size", vocabulary)
    metadata.reject_unread()
    if named != vocabulary:
        raise LoadingError(f"its metadata has a vocabulary of {named}, but its embedding has {vocabulary}")
    ids = {
        f"{name}_token_id": _within(metadata.values.get(f"tokenizer.ggml.{key}_token_id"), vocabulary)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    kind_of_config: Any = CONFIG_MAPPING[kind]
    return kind_of_config(
        vocab_size=vocabulary,
        tie_word_embeddings="output.weight" not in metadata.tensors,
        **ids,
        **values,
    )


def _within(token: int | None, vocabulary: int) -> int | None:
    return token if token is not None and 0 <= token < vocabulary else None


def _require_whole_model(metadata: Metadata) -> None:
    parts = int(metadata.values.get("split.count", 1) or 1)
    if parts > 1:
        number = int(metadata.values.get("split.no", 0)) + 1
        raise LoadingError(
            f"it is part {number} of a model in {parts} files; join them with `llama-gguf-split --merge "
            f"FIRST_PART JOINED.gguf` and use the joined file"
        )
    kind = metadata.values.get("general.type", "model")
    if kind != "model" or "adapter.type" in metadata.values:
        raise LoadingError(
            f"it holds {'a LoRA adapter' if 'adapter' in str(kind) else f'a {kind}'} and not a model; "
            f"use the model's file (merge an adapter with llama-export-lora)"
        )


def _decoder(metadata: Metadata, *, epsilon: str = "rms_norm_eps") -> dict[str, Any]:
    """Read the values that all decoders have."""
    heads = metadata.count("attention.head_count")
    hidden = metadata.count("embedding_length")
    if hidden % heads and metadata.get("attention.key_length", None) is None:
        raise LoadingError(f"its embedding length {hidden} is not a multiple of its {heads} heads")
    width = metadata.count("attention.key_length", hidden // heads)
    if (value := metadata.count("attention.value_length", width)) != width:
        raise UnsupportedModel(
            f"its key length {width} differs from its value length {value}, which is not supported"
        )
    norm = "layer_norm_epsilon" if epsilon == "norm_epsilon" else "layer_norm_rms_epsilon"
    return {
        "max_position_embeddings": metadata.count("context_length"),
        "num_hidden_layers": metadata.count("block_count"),
        "hidden_size": hidden,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", heads),
        "head_dim": width,
        epsilon: float(metadata.get(f"attention.{norm}")),
    }


def _with_rope(metadata: Metadata, values: dict[str, Any], *, theta: float = 10_000.0) -> dict[str, Any]:
    width = values["head_dim"]
    rotated = metadata.count("rope.dimension_count", width)
    rope = read_rope(metadata, rotated, values["max_position_embeddings"], theta=theta)
    if rotated != width:
        rope["partial_rotary_factor"] = rotated / width
    return values | {"rope_parameters": rope}


def _with_full_rope(metadata: Metadata, values: dict[str, Any], *, theta: float = 10_000.0) -> dict[str, Any]:
    values = _with_rope(metadata, values, theta=theta)
    if "partial_rotary_factor" in values["rope_parameters"]:
        raise UnsupportedModel(
            f"{metadata.architecture}.rope.dimension_count differs from the head dimension, which is not "
            "supported"
        )
    return values


def _dense(metadata: Metadata) -> None:
    metadata.allow("expert_count", 0)
    metadata.allow("expert_used_count", 0)


def _llama(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    _dense(metadata)
    values = _with_full_rope(metadata, _decoder(metadata))
    biased = {"attention_bias": "blk.0.attn_q.bias" in metadata.tensors}
    return "llama", values | biased | {"mlp_bias": "blk.0.ffn_gate.bias" in metadata.tensors}


def _qwen2(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    _dense(metadata)
    return "qwen2", _with_full_rope(metadata, _decoder(metadata))


def _qwen3(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    _dense(metadata)
    values = _with_full_rope(metadata, _decoder(metadata))
    return "qwen3", values | {"attention_bias": "blk.0.attn_q.bias" in metadata.tensors}


def _experts(metadata: Metadata) -> dict[str, Any]:
    metadata.allow("expert_weights_scale", 0.0, 1.0)
    metadata.allow("expert_gating_func", 1, 0)  # softmax, or not specified
    return {
        "num_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "moe_intermediate_size": metadata.count("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2moe(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    values = _with_full_rope(metadata, _decoder(metadata)) | _experts(metadata)
    metadata.allow("expert_weights_norm", False)
    shared = metadata.count("expert_shared_feed_forward_length")
    return "qwen2_moe", values | {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _qwen3moe(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    values = _with_full_rope(metadata, _decoder(metadata)) | _experts(metadata)
    metadata.allow("expert_weights_norm", True)
    metadata.allow("expert_shared_feed_forward_length", 0)
    return "qwen3_moe", values | {"norm_topk_prob": True}


def _gemma(metadata: Metadata, largest: int, *, caps: tuple[float, float]) -> dict[str, Any]:
    """Read the values that Gemma 2 and 3 share.

    largest   number of layers of the model with another attention scale
    caps      default soft caps of attention and of logits; 0 for no cap
    """
    values = _decoder(metadata)
    scale = values["head_dim"]
    if values["num_hidden_layers"] == largest:
        scale = values["hidden_size"] // values["num_attention_heads"]
    attention = float(metadata.get("attn_logit_softcapping", caps[0]))
    final = float(metadata.get("final_logit_softcapping", caps[1]))
    return values | {
        "query_pre_attn_scalar": scale,
        "sliding_window": metadata.count("attention.sliding_window"),
        "final_logit_softcapping": final or None,
        "attn_logit_softcapping": attention or None,
    }


def _gemma2(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    values = _with_full_rope(metadata, _gemma(metadata, _GEMMA2_LARGEST_LAYERS, caps=(50.0, 30.0)))
    return "gemma2", values | {"layer_types": _layer_types(metadata, values["num_hidden_layers"], 2)}


def _gemma3(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    values = _with_full_rope(
        metadata, _gemma(metadata, _GEMMA3_LARGEST_LAYERS, caps=(0.0, 0.0)), theta=1_000_000.0
    )
    whole = values["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": float(metadata.get("rope.freq_base_swa", 10_000.0))}
    return "gemma3_text", values | {
        "layer_types": _layer_types(metadata, values["num_hidden_layers"], 6),
        "rope_parameters": {"full_attention": whole, "sliding_attention": local},
    }


def _layer_types(metadata: Metadata, layers: int, every: int) -> list[str]:
    pattern = metadata.get("attention.sliding_window_pattern", every)
    if isinstance(pattern, list):
        local = [bool(one) for one in pattern]
        if len(local) != layers:
            raise LoadingError(
                f"its attention.sliding_window_pattern has {len(local)} entries for {layers} layers"
            )
    else:
        local = [pattern != 0 and (layer + 1) % pattern != 0 for layer in range(layers)]
    return ["sliding_attention" if one else "full_attention" for one in local]


def _phi3(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    _dense(metadata)
    values = _with_rope(metadata, _decoder(metadata))
    rope = values["rope_parameters"]
    if "original_max_position_embeddings" in rope:
        values["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    window = metadata.get("attention.sliding_window", 0)
    return "phi3", values | {"sliding_window": int(window) or None}


def _starcoder2(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    values = _with_full_rope(metadata, _decoder(metadata, epsilon="norm_epsilon"))
    return "starcoder2", values | {"use_bias": "blk.0.attn_q.bias" in metadata.tensors}


def _gpt2(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    return "gpt2", {
        "n_positions": metadata.count("context_length"),
        "n_layer": metadata.count("block_count"),
        "n_embd": metadata.count("embedding_length"),
        "n_inner": metadata.count("feed_forward_length"),
        "n_head": metadata.count("attention.head_count"),
        "layer_norm_epsilon": float(metadata.get("attention.layer_norm_epsilon")),
    }


ARCHITECTURES: dict[str, Callable[[Metadata], tuple[str, dict[str, Any]]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen2moe": _qwen2moe,
    "qwen3moe": _qwen3moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "starcoder2": _starcoder2,
    "gpt2": _gpt2,
}

"""Make a model's configuration from the metadata of a gguf file, with nothing left unread.

transformers has a reader of its own, which takes the sizes and leaves out much of what changes the numbers:
scaled rotation, soft caps, attention windows, the width of a head. Here every key of the model is either read
or refused by name, so a file that would be computed wrong does not start.

Names and meanings of keys are those of llama.cpp (gguf-py/gguf/constants.py, src/llama-hparams.h).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from headrace.worker.engine.refusals import LoadingError, UnsupportedModel

# Keys that change no number of the model: who made the file, its tokenizer, and how it was quantised.
_HARMLESS = ("GGUF.", "general.", "tokenizer.", "quantize.", "imatrix.", "mradermacher.", "split.")
_REQUIRED = object()
# The files do not say how Gemma's attention is scaled. llama.cpp knows it by the number of layers: those of
# 27 billion parameters differ.
_GEMMA2_LARGEST_LAYERS, _GEMMA3_LARGEST_LAYERS = 46, 62
# How llama.cpp's converter makes the factors of Llama 3.x; the file keeps only the result.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

Factors = npt.NDArray[np.float64]


class Metadata:
    """The metadata of one file: remembers which keys were read.

    values   all keys and their values
    tensors  shapes by name, in torch's order
    factors  tensors of factors that scale the rotation, by name; they belong to the metadata in all but form
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, tuple[int, ...]],
        factors: Mapping[str, Factors] | None = None,
    ) -> None:
        self.values = values
        self.tensors = tensors
        self.factors = factors or {}
        self.architecture = str(values.get("general.architecture", ""))
        self._read: set[str] = set()

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return the architecture's value of that name. Raises LoadingError if it has none and needs one."""
        key = f"{self.architecture}.{name}"
        self._read.add(key)
        if key in self.values:
            value = self.values[key]
            if isinstance(value, float) and not math.isfinite(value):
                raise LoadingError(
                    f"its metadata has {value} for {key}; the file is damaged: download it again"
                )
            return value
        if default is _REQUIRED:
            raise LoadingError(f"its metadata lacks {key}; the file is damaged, or was converted wrongly")
        return default

    def count(self, name: str, default: Any = _REQUIRED) -> int:
        """Return a number that every layer shares. Raises UnsupportedModel where layers differ."""
        value = self.get(name, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModel(
                    f"{self.architecture}.{name} differs between layers, which is not read"
                )
            value = value[0]
        if not isinstance(value, int) or value < 1:
            raise LoadingError(f"{self.architecture}.{name} is {value!r}, which is not a number above 0")
        return value

    def allow(self, name: str, *neutral: Any) -> None:
        """Accept a key that is not used, but only at values that leave the numbers as they are."""
        value = self.get(name, neutral[0])
        if value not in neutral:
            raise UnsupportedModel(f"{self.architecture}.{name} is {value}, which Headrace does not compute")

    def refuse_unread(self) -> None:
        """Raise UnsupportedModel if the file says something about the model that nobody read."""
        unread = [key for key in self.values if key not in self._read and not key.startswith(_HARMLESS)]
        if unread:
            raise UnsupportedModel(
                f"its metadata has {', '.join(sorted(unread)[:5])}, which Headrace does not read; "
                f"leaving that out could change the model's answers"
            )


def config_from(metadata: Metadata) -> Any:
    """Return the transformers configuration that the metadata describes.

    Raises UnsupportedModel for an architecture or a key that is not read, LoadingError for a file that is
    one part of several, holds no model, or lacks keys.
    """
    _refuse_what_is_no_model(metadata)
    if metadata.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"it is of architecture {metadata.architecture!r}, and gguf files are read for "
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
    metadata.refuse_unread()
    vocabulary = metadata.tensors["token_embd.weight"][0]
    named = metadata.values.get(f"{metadata.architecture}.vocab_size", vocabulary)
    if named != vocabulary:
        raise LoadingError(f"its metadata has a vocabulary of {named}, its embedding one of {vocabulary}")
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


def _refuse_what_is_no_model(metadata: Metadata) -> None:
    parts = int(metadata.values.get("split.count", 1) or 1)
    if parts > 1:
        number = int(metadata.values.get("split.no", 0)) + 1
        raise LoadingError(
            f"it is part {number} of a model in {parts} files; join them with `llama-gguf-split --merge "
            f"FIRST_PART JOINED.gguf` and name the joined file"
        )
    kind = metadata.values.get("general.type", "model")
    if kind != "model" or "adapter.type" in metadata.values:
        raise LoadingError(
            f"it holds {'a LoRA adapter' if 'adapter' in str(kind) else f'a {kind}'} and not a model; "
            f"name the model's own file (merge an adapter with llama-export-lora)"
        )


def _decoder(metadata: Metadata, *, epsilon: str = "rms_norm_eps") -> dict[str, Any]:
    """Read what all decoders have."""
    heads = metadata.count("attention.head_count")
    hidden = metadata.count("embedding_length")
    metadata.get("vocab_size", 0)  # see `config_from`
    if hidden % heads and metadata.get("attention.key_length", None) is None:
        raise LoadingError(f"its embedding length {hidden} is not a multiple of its {heads} heads")
    width = metadata.count("attention.key_length", hidden // heads)
    if (value := metadata.count("attention.value_length", width)) != width:
        raise UnsupportedModel(f"its keys are {width} wide and its values {value}, which is not read")
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


def _with_rotation(metadata: Metadata, values: dict[str, Any], *, theta: float = 10_000.0) -> dict[str, Any]:
    width = values["head_dim"]
    rotated = metadata.count("rope.dimension_count", width)
    rope = read_rotation(metadata, rotated, values["max_position_embeddings"], theta=theta)
    if rotated != width:
        rope["partial_rotary_factor"] = rotated / width
    return values | {"rope_parameters": rope}


def _whole_rotation(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    values = _with_rotation(metadata, values)
    if "partial_rotary_factor" in values["rope_parameters"]:
        raise UnsupportedModel(f"{metadata.architecture}.rope.dimension_count is not the width of a head")
    return values


def _dense(metadata: Metadata) -> None:
    metadata.allow("expert_count", 0)
    metadata.allow("expert_used_count", 0)


def _llama(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    _dense(metadata)
    values = _whole_rotation(metadata, _decoder(metadata))
    biased = {"attention_bias": "blk.0.attn_q.bias" in metadata.tensors}
    return "llama", values | biased | {"mlp_bias": "blk.0.ffn_gate.bias" in metadata.tensors}


def _qwen2(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    _dense(metadata)
    return "qwen2", _whole_rotation(metadata, _decoder(metadata))


def _qwen3(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    _dense(metadata)
    values = _whole_rotation(metadata, _decoder(metadata))
    return "qwen3", values | {"attention_bias": "blk.0.attn_q.bias" in metadata.tensors}


def _experts(metadata: Metadata) -> dict[str, Any]:
    metadata.allow("expert_weights_scale", 0.0, 1.0)
    metadata.allow("expert_gating_func", 1, 0)  # softmax, or not said
    return {
        "num_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "moe_intermediate_size": metadata.count("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2moe(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    values = _whole_rotation(metadata, _decoder(metadata)) | _experts(metadata)
    metadata.allow("expert_weights_norm", False)
    shared = metadata.count("expert_shared_feed_forward_length")
    return "qwen2_moe", values | {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _qwen3moe(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    values = _whole_rotation(metadata, _decoder(metadata)) | _experts(metadata)
    metadata.allow("expert_weights_norm", True)
    metadata.allow("expert_shared_feed_forward_length", 0)
    return "qwen3_moe", values | {"norm_topk_prob": True}


def _gemma(metadata: Metadata, largest: int, *, caps: tuple[float, float]) -> dict[str, Any]:
    """Read what Gemma 2 and 3 share.

    largest   layers of the model whose attention is scaled by another width
    caps      soft caps of attention and of logits where the file names none; 0 for no cap
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
    values = _whole_rotation(metadata, _gemma(metadata, _GEMMA2_LARGEST_LAYERS, caps=(50.0, 30.0)))
    return "gemma2", values | {"layer_types": _layer_types(metadata, values["num_hidden_layers"], 2)}


def _gemma3(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    values = _with_rotation(
        metadata, _gemma(metadata, _GEMMA3_LARGEST_LAYERS, caps=(0.0, 0.0)), theta=1_000_000.0
    )
    whole = values["rope_parameters"]
    if "partial_rotary_factor" in whole:
        raise UnsupportedModel("gemma3.rope.dimension_count is not the width of a head")
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
            raise LoadingError(f"its attention.sliding_window_pattern is for {len(local)} of {layers} layers")
    else:
        local = [pattern != 0 and (layer + 1) % pattern != 0 for layer in range(layers)]
    return ["sliding_attention" if one else "full_attention" for one in local]


def _phi3(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    _dense(metadata)
    values = _with_rotation(metadata, _decoder(metadata))
    rope = values["rope_parameters"]
    if "original_max_position_embeddings" in rope:
        values["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    window = metadata.get("attention.sliding_window", 0)
    return "phi3", values | {"sliding_window": int(window) or None}


def _starcoder2(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    values = _whole_rotation(metadata, _decoder(metadata, epsilon="norm_epsilon"))
    return "starcoder2", values | {"use_bias": "blk.0.attn_q.bias" in metadata.tensors}


def _gpt2(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    metadata.get("vocab_size", 0)
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


def read_rotation(metadata: Metadata, rotated: int, context: int, *, theta: float) -> dict[str, Any]:
    """Read how queries and keys are rotated, as transformers' `rope_parameters`.

    rotated   how many numbers of a head are rotated
    context   tokens that the model can hold
    theta     base of the frequencies where the file names none
    """
    base = float(metadata.get("rope.freq_base", theta))
    factor = float(metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 0.0))) or 1.0
    metadata.get("rope.scale_linear", 0.0)
    original = int(metadata.get("rope.scaling.original_context_length", 0)) or None
    amplify = float(
        metadata.get("rope.scaling.attn_factor", metadata.get("rope.scaling.yarn_attn_factor", 1.0))
    )
    metadata.get("rope.scaling.yarn_attn_factor", 1.0)
    metadata.get("rope.scaling.finetuned", False)  # says how the model was trained, and changes nothing
    metadata.allow("rope.scaling.alpha", 0.0)
    metadata.allow("rope.scaling.yarn_log_multiplier", 0.0)
    metadata.allow("rope.scaling.yarn_ext_factor", -1.0, 1.0)
    fast = float(metadata.get("rope.scaling.yarn_beta_fast", 32.0))
    slow = float(metadata.get("rope.scaling.yarn_beta_slow", 1.0))
    kind = metadata.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModel(f"{metadata.architecture}.rope.scaling.type is {kind}, which is not read")
    if kind == "none":
        factor = 1.0
    if not all(map(math.isfinite, (base, factor, amplify))) or base <= 0 or factor <= 0:
        raise LoadingError(f"its rotation has base {base} and factor {factor}; the file is damaged")
    plain = {"rope_type": "default", "rope_theta": base}
    own = metadata.factors.get("rope_freqs.weight")
    if "rope_factors_long.weight" in metadata.factors or "rope_factors_short.weight" in metadata.factors:
        long, short = (metadata.factors.get(f"rope_factors_{name}.weight") for name in ("long", "short"))
        if own is not None or kind == "yarn" or factor != 1.0 or long is None or short is None:
            raise UnsupportedModel("its rotation is scaled in two ways at once, which is not read")
        return _by_factors(base, short, long, original or context, amplify, rotated)
    if kind == "longrope" and own is None:
        raise LoadingError("its rotation is scaled by longrope, but it lacks rope_factors_long.weight")
    if kind == "yarn" and own is None:
        if original is None:
            raise LoadingError("its rotation is scaled by yarn, but it has no original_context_length")
        attention = amplify * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
        return plain | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": fast,
            "beta_slow": slow,
            "attention_factor": attention,
        }
    if amplify != 1.0 or (own is not None and kind == "yarn"):
        raise UnsupportedModel("its rotation is scaled in two ways at once, which is not read")
    if own is not None:
        llama3 = {**plain, "rope_type": "llama3", "factor": float(own.max()) * factor, **_LLAMA3}
        if (
            factor == 1.0
            and own.shape == (rotated // 2,)
            and np.allclose(own, _llama3_factors(llama3, rotated))
        ):
            return llama3
        return _by_factors(base, own * factor, own * factor, context, 1.0, rotated)
    return plain if factor == 1.0 else plain | {"rope_type": "linear", "factor": factor}


def _by_factors(
    base: float, short: Factors, long: Factors, original: int, attention: float, rotated: int
) -> dict[str, Any]:
    """Divide each frequency by a factor of its own."""
    for factors in (short, long):
        if factors.shape != (rotated // 2,) or not np.isfinite(factors).all() or (factors <= 0).any():
            raise LoadingError(f"the factors of its rotation are not {rotated // 2} numbers above 0")
    return {
        "rope_type": "longrope",
        "rope_theta": base,
        "factor": 1.0,
        "attention_factor": attention,
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": original,
    }


def _llama3_factors(rope: Mapping[str, Any], rotated: int) -> Factors:
    """Return what llama.cpp's converter divides each frequency of Llama 3.x by."""
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, rotated, 2) / rotated)
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: Factors = 1.0 / ((1 - smooth) / factor + smooth)
    return factors

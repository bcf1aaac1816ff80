"""Write small gguf files as llama.cpp's converter does, from networks of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, TokenType
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

Tensors = dict[str, Any]


def tensors_of(network: Any, architecture: str) -> Tensors:
    """Return a network's tensors under the names and in the layout of a gguf file."""
    kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind()
    held = {name: value.detach().float() for name, value in network.state_dict().items()}
    made: Tensors = {}
    for name, source in get_gguf_hf_weights_map(network, processor).items():
        value = held.get(source)
        if value is None or (name == "output.weight" and network.config.tie_word_embeddings):
            continue
        if "_exps" in name:
            half = value.shape[1] // 2
            value = {"gate": value[:, :half], "up_e": value[:, half:]}.get(name.split(".ffn_")[1][:4], value)
            name = f"{name.removesuffix('.weight')}.weight"
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = network.config.num_attention_heads
            heads = network.config.num_key_value_heads if ".attn_k." in name else heads
            value = value.view(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if architecture == "gpt2" and name.split(".")[-2] in (
            "attn_qkv",
            "ffn_down",
            "ffn_up",
            "attn_output",
        ):
            value = value.T if value.dim() == 2 else value
        if "ffn_gate_inp_shexp" in name:
            value = value[0]
        made[name] = value.contiguous().numpy()
    return made


def keys_of(network: Any, architecture: str) -> dict[str, Any]:
    """Return the metadata that llama.cpp's converter would write, without the rotation's scaling."""
    config = network.config
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    rms = getattr(config, "rms_norm_eps", None)
    norm = getattr(config, "norm_epsilon", None) or getattr(config, "layer_norm_epsilon", None)
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": inner,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None),
        "attention.layer_norm_rms_epsilon": rms,
        "attention.layer_norm_epsilon": norm,
        "rope.freq_base": theta,
    }
    if width := getattr(config, "head_dim", None):
        keys |= {"attention.key_length": width, "attention.value_length": width}
    return {f"{architecture}.{name}": value for name, value in keys.items() if value is not None}


def write_gguf(
    path: Path,
    network: Any,
    architecture: str,
    *,
    keys: Mapping[str, Any] | None = None,
    change: Callable[[Tensors], object] = lambda tensors: None,
    tokens: Sequence[str] | None = None,
) -> Path:
    """Write a network as a gguf file of float32.

    keys     more metadata by its whole name; a value of None leaves a key out
    change   is given the tensors, to change them
    tokens   the vocabulary's texts; made up by default, and left out where there are none
    """
    writer = GGUFWriter(path, architecture)
    size = network.config.vocab_size
    names = [f"t{index}" for index in range(size)] if tokens is None else tokens
    if names:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(names)
        writer.add_token_types([TokenType.NORMAL] * len(names))
        writer.add_token_merges(["t 1"])
        writer.add_eos_token_id(2)
    for name, value in ({**keys_of(network, architecture), **(keys or {})}).items():
        _add(writer, name, value)
    tensors = tensors_of(network, architecture)
    change(tensors)
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, name: str, value: Any) -> None:
    match value:
        case None:
            pass
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case _:
            writer.add_array(name, value)


def randomised(network: Any) -> Any:
    """Fill all parameters with noise: norms and biases are ones and zeros at first."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=random) * 0.2
            parameter.copy_(noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return network.eval()

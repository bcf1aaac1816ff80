"""Fixtures: tiny models with random weights, and the default models if they are fetched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from headrace.worker.engine.load.loading import load_engine
from headrace.worker.engine.torch_engine import TorchEngine

VOCABULARY = 131
EOS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # large, so that attention influences the logits
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**_COMMON, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(
        **_COMMON, sliding_window=24, query_pre_attn_scalar=16, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**_COMMON, "num_hidden_layers": 3, "num_key_value_heads": 1},
        sliding_window=24,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "mistral": lambda: transformers.MistralConfig(**_COMMON, sliding_window=24),
    "qwen3": lambda: transformers.Qwen3Config(**{**_COMMON, "num_attention_heads": 6, "head_dim": 24}),
    "gemma2_wide": lambda: transformers.Gemma2Config(
        **{
            **_COMMON,
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 256,
        },
        sliding_window=40,
        query_pre_attn_scalar=200,
    ),
    "phi3": lambda: transformers.Phi3Config(**{**_COMMON, "num_key_value_heads": 4}),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **{k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "head_dim")}
    ),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models gain nothing from more threads, and waiting threads slow down other processes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a model folder of an architecture, once per test session."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            torch.manual_seed(7)
            auto: Any = transformers.AutoModelForCausalLM
            network = auto.from_config(ARCHITECTURES[architecture]())
            made[architecture] = tmp_path_factory.mktemp(architecture)
            network.save_pretrained(made[architecture])
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def tiny_network(tiny_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """Load such a model with transformers alone, as the reference for our engine."""
    loaded: dict[str, Any] = {}

    def load(architecture: str) -> Any:
        if architecture not in loaded:
            auto: Any = transformers.AutoModelForCausalLM
            loaded[architecture] = auto.from_pretrained(
                tiny_folder(architecture), dtype=torch.float32, attn_implementation="eager"
            ).eval()
        return loaded[architecture]

    return load


@pytest.fixture
def tiny_engine(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., TorchEngine]:
    """Load such a model into our engine."""

    def load(architecture: str = "llama", **options: Any) -> TorchEngine:
        settings: dict[str, Any] = {"dtype": "float32", "context_length": 1024, "max_running": 6, **options}
        engine = load_engine(
            tiny_folder(architecture), name="tiny", cache=tmp_path, tokenizer_fingerprint="tiny", **settings
        )
        assert isinstance(engine, TorchEngine)
        return engine

    return load


@pytest.fixture(scope="session")
def headrace_cache() -> Path:
    """The folder of fetched models."""
    return Path(os.environ.get("HEADRACE_CACHE") or Path.home() / ".cache" / "headrace")


@pytest.fixture(params=["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def default_model(request: pytest.FixtureRequest, headrace_cache: Path) -> Path:
    """The gguf file of each default model; skips models that are not fetched."""
    path: Path = headrace_cache / "models" / request.param / "model.gguf"
    if not path.is_file():
        pytest.skip(f"{path} does not exist: run `headrace fetch`")
    return path

"""The whole way from a folder to the engine of a GPU.

Without a CUDA device, Triton's interpreter runs the kernels on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from headrace.worker.engine.interface import Row, SamplingParams, Token
from headrace.worker.engine.load import loading, self_check
from headrace.worker.engine.load.devices import Target
from headrace.worker.engine.load.refusals import UnsupportedModel
from tests.worker.engine.gpu.device import DEVICE, HAS_CUDA
from tests.worker.engine.load.starting import besides_tokenizer

pytest.importorskip("triton")
pytestmark = [pytest.mark.cuda] if HAS_CUDA else []

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, query_pre_attn_scalar=16, sliding_window=24),
}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Load a tiny model as on a GPU, with a shorter self-check; on a CPU, small slices of scored prompts."""
    if not HAS_CUDA:
        from headrace.worker.engine.gpu import likelihoods

        monkeypatch.setattr(likelihoods, "SCORED_TOKENS", 8)
        monkeypatch.setattr(loading, "choose_device", lambda _: Target(DEVICE, gpu=True))
    monkeypatch.setattr(self_check, "GPU_CONTEXT", self_check.SHORTEST)
    monkeypatch.setattr(self_check, "ANSWER", 2)

    def make(kind: str, **options: Any) -> Any:
        torch.manual_seed(7)
        auto: Any = transformers.AutoModelForCausalLM
        auto.from_config(CONFIGS[kind]()).save_pretrained(tmp_path / "model")
        settings = {"dtype": "float32", "context_length": 40, "max_running": 2, "step_tokens": 32, **options}
        return loading.load_engine(
            tmp_path / "model",
            name="tiny",
            cache=tmp_path,
            tokenizer_fingerprint="f00d",
            device="cuda",
            kv_memory=1 / 1024,
            **settings,
        )

    return make


def test_a_folder_becomes_an_engine_of_a_gpu(load: Callable[..., Any]) -> None:
    reported: list[str] = []

    engine = load("llama", progress=reported.append)

    model = engine.model
    assert type(engine).__name__ == "GpuEngine"
    assert (model.context_length, model.block_tokens, model.exact) == (40, 32, False)
    # A block has keys and values of 32 tokens, 16 float32 each.
    assert model.kv_blocks == 2**20 // (2 * 32 * 16 * 4)
    assert reported[:4] == [
        "loading tiny in float32",
        "laying out weights",
        "comparing with transformers' own forward pass",
        "measuring the memory of a step",
    ]
    ids = [5, 6, 7]
    (token,) = engine.launch([Row([3, 1], 0, 3, ids, 3, True, SamplingParams(seed=1, max_tokens=1))]).wait()
    assert isinstance(token, Token)


# On CUDA, sums of torch's own code for Gemma 2, as in norms, may depend on the number of rows.
@pytest.mark.parametrize("kind", ["llama"] if HAS_CUDA else CONFIGS)
def test_an_exact_engine_gives_the_same_results_in_steps_of_all_sizes(
    kind: str, load: Callable[..., Any]
) -> None:
    assert load(kind, exact=True).model.exact


def test_an_engine_that_is_not_exact_although_it_should_be_is_reported(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "check_model", lambda *_, **__: False)
    warned: list[str] = []

    engine = load("llama", exact=True, warn=warned.append)

    assert not engine.model.exact
    (warning,) = besides_tokenizer(warned)
    assert "not batch-invariant on this device, although --exact was requested" in warning


def test_an_engine_that_computes_incorrectly_does_not_start(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from headrace.worker.engine.gpu.kernels.activation import silu_multiply

    def wrong(gate_up: torch.Tensor, out: torch.Tensor) -> None:
        silu_multiply(gate_up, out)
        out *= 1.2

    monkeypatch.setattr("headrace.worker.engine.gpu.decoder.silu_multiply", wrong)

    with pytest.raises(UnsupportedModel, match="differs from transformers: its logits have a relative error"):
        load("llama")

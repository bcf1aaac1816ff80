"""The CUDA code on a CPU: everything but the kernel and the capture, with a kernel in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from headrace.worker.engine.attention_kinds import flash
from headrace.worker.engine.gpu import cuda
from headrace.worker.engine.gpu.static_decodes import StaticDecodes
from headrace.worker.engine.gpu.varlen import BLOCK_TOKENS, window_of
from headrace.worker.engine.gpu.varlen_forward import VarlenForward
from headrace.worker.engine.interface import Fault, ModelInfo, Row, Token
from headrace.worker.engine.load import loading
from headrace.worker.engine.torch_engine import TorchEngine
from headrace.worker.engine.transformers_attention import IMPLEMENTATION, observe_layers, paged_attention
from tests.worker.engine.conftest import VOCABULARY
from tests.worker.engine.test_torch_engine import (
    GREEDY,
    Engine,
    Network,
    answer,
    answer_together,
    blocks_of,
    embedding_of,
    generated,
    prompt_of,
)

CPU = torch.device("cpu")


def attend_varlen(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    key_counts: torch.Tensor,
    tables: torch.Tensor,
    max_query: int,
    max_keys: int,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    """Compute the same as `cuda.attend_varlen`, and check its arguments."""
    assert all(index.dtype == torch.int32 for index in (offsets, key_offsets, key_counts, tables))
    assert key_offsets.tolist() == [0, *torch.cumsum(key_counts, 0).tolist()]
    assert query.shape[0] == offsets[-1]
    assert keys.shape[1] % 256 == 0
    out = torch.full((query.shape[0], query.shape[1], values.shape[3]), float("nan"))
    group = query.shape[1] // keys.shape[2]
    for row, length in enumerate(key_counts.tolist()):
        begin, end = offsets[row], offsets[row + 1]
        assert end - begin <= max_query
        assert length <= max_keys
        own_keys, own_values = (
            stored[tables[row].long()].flatten(0, 1)[:length].repeat_interleave(group, 1)
            for stored in (keys, values)
        )
        at = torch.arange(length - (end - begin), length)[:, None]
        places = torch.arange(length)
        left, right = window
        hidden = (places < at - left) & (left >= 0) | (places > at + right) & (right >= 0)
        products = torch.einsum("qhd,khd->hqk", query[begin:end], own_keys) * scale
        weights = products.masked_fill(hidden, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, own_values)
    return out


class Pool:
    """A fake `GraphPool`: replays by calling the captured function."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


@pytest.fixture
def flash_engine(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[TorchEngine, Pool]]:
    """Make an engine of a tiny model with the code for CUDA, in float32."""
    monkeypatch.setattr(cuda, "attend_varlen", attend_varlen)
    transformers.AttentionInterface.register(IMPLEMENTATION, paged_attention)

    def make(architecture: str) -> tuple[TorchEngine, Pool]:
        auto: Any = transformers.AutoModelForCausalLM
        network = auto.from_pretrained(
            tiny_folder(architecture), dtype=torch.float32, attn_implementation=IMPLEMENTATION
        ).eval()
        model = ModelInfo(
            name="tiny",
            revision="",
            dtype="float32",
            device="cpu",
            tokenizer_fingerprint="",
            weights_fingerprint="",
            context_length=1024,
            vocabulary_size=VOCABULARY,
            eos_ids=frozenset(),
            max_running=6,
            block_tokens=BLOCK_TOKENS,
            kv_blocks=24,
            exact=False,
        )
        memory = flash(CPU, torch.float32).make_memory(observe_layers(network), model.kv_blocks + 1)
        pool = Pool()
        decodes = StaticDecodes(
            network,
            memory,
            max_rows=model.max_running,
            context_length=model.context_length,
            vocabulary=VOCABULARY,
            capture=pool.capture,
        )
        return TorchEngine(VarlenForward(network, memory, decodes), model), pool

    return make


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "mistral", "phi3"])
def test_random_schedules_answer_like_generate(
    architecture: str, flash_engine: Callable[..., tuple[TorchEngine, Pool]], tiny_network: Network
) -> None:
    (engine, pool), network = flash_engine(architecture), tiny_network(architecture)
    prompts = [prompt_of(length) for length in (1, 7, 90, 255, 300)]
    expected = [generated(network, prompt, 10) for prompt in prompts]
    before = pool.replayed

    for seed in range(3):
        assert answer_together(engine, prompts, 10, params=[GREEDY] * 5, seed=seed) == expected

    assert pool.captured == 4  # for 1, 2, 4 and 6 rows
    assert pool.replayed > before


def test_only_steps_of_decodes_are_replayed(
    flash_engine: Callable[..., tuple[TorchEngine, Pool]], tiny_network: Network
) -> None:
    engine, pool = flash_engine("llama")
    prompt = prompt_of(40)
    before = pool.replayed

    assert answer(engine, prompt, 9) == generated(tiny_network("llama"), prompt, 9)

    assert pool.replayed == before + 8


def test_a_model_that_cannot_be_captured_is_computed_without_graphs(
    tiny_engine: Engine, tiny_network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[str] = []

    class Failing(Pool):
        def __init__(self, _: torch.device) -> None:
            super().__init__()

        def capture(self, run: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda, "attend_varlen", attend_varlen)
    monkeypatch.setattr(cuda, "GraphPool", Failing)
    monkeypatch.setattr(loading, "choose_kind", lambda layers, device, dtype: flash(device, dtype))
    engine = tiny_engine("gpt_neox", progress=reported.append)
    prompt = prompt_of(40)

    assert answer(engine, prompt, 9) == generated(tiny_network("gpt_neox"), prompt, 9)

    assert any("GPTNeoXForCausalLM computes without CUDA graphs" in line for line in reported)


def test_padding_rows_write_only_to_the_spare_block(
    flash_engine: Callable[..., tuple[TorchEngine, Pool]], tiny_network: Network
) -> None:
    """Three rows run as four; the fourth writes only to the spare block."""
    engine, _ = flash_engine("llama")
    forward: Any = engine._forward
    assert isinstance(forward, VarlenForward)
    assert isinstance(forward._decodes, StaticDecodes)
    memory = forward._memory
    assert memory.blocks == engine.model.kv_blocks + 1
    keys, _ = memory[0]
    prompts = [prompt_of(length) for length in (5, 6, 7)]
    ids = [list(prompt) for prompt in prompts]
    tables = [blocks_of(engine, i) for i in range(3)]
    first = engine.step(
        [Row(t, 0, len(own), own, len(own), True, GREEDY) for t, own in zip(tables, ids, strict=True)]
    )
    for own, token in zip(ids, first, strict=True):
        assert isinstance(token, Token)
        own.append(token.id)
    before = keys.clone()

    second = engine.step(
        [
            Row(t, len(own) - 1, len(own), own, len(own) - 1, True, GREEDY)
            for t, own in zip(tables, ids, strict=True)
        ]
    )

    changed = (keys != before).flatten(2).any(-1).nonzero().tolist()
    assert sorted(changed) == sorted([t[0], len(own) - 1] for t, own in zip(tables, ids, strict=True))
    for prompt, own, token in zip(prompts, ids, second, strict=True):
        assert isinstance(token, Token)
        assert [own[-1], token.id] == generated(tiny_network("llama"), prompt, 2)


def test_a_row_whose_logits_are_not_finite_fails_alone(
    flash_engine: Callable[..., tuple[TorchEngine, Pool]],
) -> None:
    engine, _ = flash_engine("llama")
    embedding_of(engine).weight.data[99] = float("nan")

    results = engine.step(
        [
            Row(blocks_of(engine, 0), 0, 1, [99], 1, True, GREEDY),
            Row(blocks_of(engine, 1), 0, 1, [5], 1, True, GREEDY),
        ]
    )

    assert isinstance(results[0], Fault)
    assert isinstance(results[1], Token)


def test_a_failed_step_on_an_asynchronous_device_still_calls_the_callback(
    flash_engine: Callable[..., tuple[TorchEngine, Pool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On such a device, the callback is called after the launch."""
    engine, _ = flash_engine("llama")
    events: list[str] = []
    forward = engine._forward

    def launch(flat: Any) -> torch.Tensor:
        events.append("launch")
        if len(events) > 3:
            raise RuntimeError("out of memory")
        return forward(flat)

    def wait(self: cuda.Fetch) -> torch.Tensor:
        events.append("wait")
        return self._host

    monkeypatch.setattr(engine, "_forward", launch)
    monkeypatch.setattr(engine, "_overlaps", True)
    monkeypatch.setattr(cuda.Fetch, "wait", wait)
    row = Row(blocks_of(engine, 0), 0, 3, [4, 5, 6], 3, True, GREEDY)

    engine.step([row], lambda: events.append("callback"))
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step([row], lambda: events.append("callback"))

    assert events == ["launch", "callback", "wait", "launch", "callback"]


@pytest.mark.parametrize(
    ("window", "max_query", "expected"),
    [(None, 1, (-1, -1)), (None, 9, (-1, 0)), (24, 1, (23, -1)), (24, 9, (23, 0)), (1, 9, (0, 0))],
)
def test_a_window_counts_the_token_itself(
    window: int | None, max_query: int, expected: tuple[int, int]
) -> None:
    assert window_of(window, max_query) == expected

"""Tests that need a CUDA device: the kernel, the graphs, and overlap with the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headrace.worker.engine import attention_kinds
from headrace.worker.engine.flat_step import flatten
from headrace.worker.engine.gpu import cuda
from headrace.worker.engine.gpu.varlen_forward import VarlenForward
from headrace.worker.engine.interface import Fault, Row, SamplingParams, Token
from headrace.worker.engine.kv_memory import LayerShape
from headrace.worker.engine.load import self_check
from headrace.worker.engine.load.free_memory import free_bytes, peak_bytes
from headrace.worker.engine.transformers_attention import LayerAttention, Masking
from tests.worker.engine.test_torch_engine import (
    GREEDY,
    Engine,
    Network,
    answer,
    answer_together,
    blocks_of,
    embedding_of,
    prompt_of,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch built without CUDA"),
]

DEVICE = torch.device("cuda", 0)
ON_CUDA: dict[str, Any] = {"device": "cuda:0", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    "layer",
    [
        LayerAttention(LayerShape(3, 64, 64), 9, Masking(0.125)),
        LayerAttention(LayerShape(2, 128, 128), 14, Masking(0.09)),
        LayerAttention(LayerShape(2, 72, 72), 2, Masking(0.1)),
        LayerAttention(LayerShape(1, 256, 256), 4, Masking(0.06, window=300)),
        LayerAttention(LayerShape(4, 16, 16), 4, Masking(0.25, window=24)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_over_blocks_computes_attention(layer: LayerAttention, dtype: torch.dtype) -> None:
    """Long sequences in scattered blocks, chunks and decodes."""
    assert cuda.flash_unsupported_reason(DEVICE, dtype, layer.shape.key_dim, layer.shape.value_dim) is None

    # Raises if it is wrong; whether it is batch-invariant depends on the device.
    self_check.check_attention(attention_kinds.flash(DEVICE, dtype), {0: layer}, DEVICE, dtype)


def test_old_content_of_blocks_does_not_matter() -> None:
    """FlashAttention must not read NaN after the last token of a sequence."""
    layer = LayerAttention(LayerShape(2, 64, 64), 4, Masking(0.125))
    kind = attention_kinds.flash(DEVICE, torch.bfloat16)
    memory = kind.make_memory({0: layer}, 4)
    for tensor in memory[0]:
        tensor.fill_(float("nan"))
    query, keys = (torch.randn(40, heads, 64, device=DEVICE, dtype=torch.bfloat16) for heads in (4, 2))
    rows = [Row([2, 1], 0, 40, [0] * 40, 40, True, GREEDY)]

    out = kind.begin(memory, flatten(rows, kind.block_tokens))(0, query, keys, keys, layer.masking)

    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "mistral", "phi3"])
def test_an_engine_on_cuda_passes_the_self_check_and_uses_graphs(
    architecture: str, tiny_engine: Engine
) -> None:
    engine = tiny_engine(architecture, **ON_CUDA)

    forward = engine._forward
    assert isinstance(forward, VarlenForward)
    assert forward._decodes is not None
    assert engine.model.block_tokens == 256


@pytest.mark.parametrize("architecture", ["gemma2", "llama"])
def test_float32_and_soft_caps_use_plain_torch(
    architecture: str, tiny_engine: Engine, tiny_network: Network
) -> None:
    engine, network = tiny_engine(architecture, device="cuda:0", dtype="float32"), tiny_network(architecture)
    ids = prompt_of(300)
    with torch.inference_mode():
        expected = network(torch.tensor([ids])).logits[0, -1]

    logits = engine.compute([Row(blocks_of(engine, 0), 0, 300, ids, 300, True, GREEDY)]).logits[0]

    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-2, atol=1e-2)


def test_replayed_steps_compute_the_same_as_launched_ones(tiny_engine: Engine) -> None:
    """Rows that pad a step do not affect the others."""
    engine = tiny_engine("llama", **ON_CUDA)
    forward: Any = engine._forward
    ids = [prompt_of(n) for n in (3, 100, 300)]
    engine.step(
        [Row(blocks_of(engine, i), 0, len(own), own, len(own), True, GREEDY) for i, own in enumerate(ids)]
    )
    rows = [
        Row(blocks_of(engine, i), len(own), len(own) + 1, [*own, 7], len(own), True, GREEDY)
        for i, own in enumerate(ids)
    ]

    replayed = engine.compute(rows).logits.float().clone()
    forward._decodes = None
    launched = engine.compute(rows).logits.float()

    assert (replayed - launched).norm() <= 2e-2 * launched.norm()


def test_random_schedules_give_equal_answers(tiny_engine: Engine) -> None:
    engine = tiny_engine("llama", **ON_CUDA)
    prompts = [prompt_of(length) for length in (1, 7, 90, 255, 300)]
    params = [GREEDY] * 5
    if not engine.model.exact:
        pytest.skip("this device's kernels are not exact")
    alone = [answer(engine, prompt, 10) for prompt in prompts]

    assert answer_together(engine, prompts, 10, params=params) == alone


def test_a_row_whose_logits_are_not_finite_fails_alone(tiny_engine: Engine) -> None:
    engine = tiny_engine("llama", **ON_CUDA)
    embedding_of(engine).weight.data[99] = float("nan")

    results = engine.step(
        [
            Row(blocks_of(engine, 0), 0, 1, [99], 1, True, GREEDY),
            Row(blocks_of(engine, 1), 0, 1, [5], 1, True, GREEDY),
        ]
    )

    assert isinstance(results[0], Fault)
    assert isinstance(results[1], Token)


@pytest.mark.parametrize("chunk", [1, 30])
@pytest.mark.parametrize(
    "filters", [{}, {"top_p": 0.9, "top_k": 20}, {"frequency_penalty": 1.0, "logprobs": True}]
)
def test_a_step_is_launched_without_waiting_for_the_device(
    chunk: int, filters: dict[str, Any], tiny_engine: Engine
) -> None:
    """In torch's sync debug mode, any call that waits raises, until the callback of the step."""
    engine = tiny_engine("llama", **ON_CUDA)
    params = SamplingParams(seed=1, max_tokens=9, temperature=1.0, ignore_eos=True, **filters)
    ids = prompt_of(chunk)
    rows = [Row(blocks_of(engine, 0), 0, chunk, ids, chunk, True, params)]
    engine.step(rows)  # allocates workspaces

    torch.cuda.set_sync_debug_mode("error")
    try:
        (token,) = engine.step(rows, lambda: torch.cuda.set_sync_debug_mode("default"))
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert isinstance(token, Token)


def test_the_callback_overlaps_with_the_device(tiny_engine: Engine) -> None:
    engine = tiny_engine("llama", **ON_CUDA)
    done: list[bool] = []
    forward = engine._forward
    over: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def slow(flat: Any) -> torch.Tensor:
        torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]
        logits = forward(flat)
        over.record()
        return logits

    engine._forward = slow

    engine.step(
        [Row(blocks_of(engine, 0), 0, 3, [4, 5, 6], 3, True, GREEDY)], lambda: done.append(over.query())
    )

    assert done == [False]


def test_a_fetch_returns_results_of_earlier_work() -> None:
    numbers = torch.ones(1 << 20, device=DEVICE).cumsum(0)

    assert cuda.Fetch(numbers).wait()[-1] == 1 << 20


def test_memory_is_measured_on_the_device() -> None:
    def run() -> None:
        torch.ones(64 << 20, dtype=torch.uint8, device=DEVICE)

    before = free_bytes(DEVICE)

    assert peak_bytes(DEVICE, run) == 64 << 20
    assert free_bytes(DEVICE) <= before + (1 << 20)


def test_the_device_is_usable_after_a_failed_capture() -> None:
    def waits() -> None:
        torch.ones(3, device=DEVICE).sum().item()

    pool = cuda.GraphPool(DEVICE)
    with pytest.raises(RuntimeError):
        pool.capture(waits)

    out = torch.zeros(3, device=DEVICE)
    source = torch.ones(3, device=DEVICE)

    def doubles() -> None:
        out.copy_(source * 2)

    replay = cuda.GraphPool(DEVICE).capture(doubles)
    source.fill_(21)
    replay()
    assert out.tolist() == [42, 42, 42]

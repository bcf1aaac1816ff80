"""Tests that need a CUDA device: graphs, copies, overlap, memory, and whole engines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.worker.engine.gpu import cuda, probes
from headrace.worker.engine.gpu.engine import GpuEngine
from headrace.worker.engine.interface import Row, SamplingParams, Token
from headrace.worker.engine.load.free_memory import free_bytes, peak_bytes
from headrace.worker.engine.load.loading import load_engine
from tests.worker.engine.gpu.decoder_cases import Model, network_of, prompts
from tests.worker.engine.gpu.device import DEVICE, needs_cuda
from tests.worker.engine.gpu.model_steps import Part
from tests.worker.engine.test_torch_engine import (
    GREEDY,
    WARM,
    Network,
    answer,
    answer_together,
    blocks_of,
    generated,
    prompt_of,
)

Engine = Callable[..., Any]

pytestmark = [pytest.mark.cuda, needs_cuda]


@pytest.fixture
def cuda_engine(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Any]:
    """Load a tiny model into the engine of a GPU."""

    def load(architecture: str, **options: Any) -> GpuEngine:
        engine = load_engine(
            tiny_folder(architecture),
            name="tiny",
            cache=tmp_path,
            tokenizer_fingerprint="tiny",
            device="cuda:0",
            **{"dtype": "bfloat16", "context_length": 1024, "max_running": 6, "kv_memory": 1 / 64, **options},
        )
        assert isinstance(engine, GpuEngine)
        return engine

    return load


# The first of this file, which is the first of a run with a GPU: all other tests would wait for its turn.
@pytest.mark.quiet  # other processes take memory of the device, too
def test_memory_is_measured_on_the_device() -> None:
    def run() -> None:
        torch.ones(64 << 20, dtype=torch.uint8, device=DEVICE)

    before = free_bytes(DEVICE)

    assert peak_bytes(DEVICE, run) == 64 << 20
    assert free_bytes(DEVICE) <= before + (1 << 20)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3"])
def test_an_engine_passes_its_self_check_and_uses_graphs(
    architecture: str, exact: bool, cuda_engine: Engine
) -> None:
    engine: Any = cuda_engine(architecture, exact=exact)

    assert engine.uncaptured == ""
    assert exact or not engine.model.exact


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_exact_engine_is_batch_invariant(architecture: str, dtype: str, cuda_engine: Engine) -> None:
    """The self-check finds it so, and random schedules agree."""
    engine = cuda_engine(architecture, exact=True, dtype=dtype)
    prompts = [prompt_of(length) for length in (1, 7, 90, 255, 300)]
    params = [GREEDY, WARM, WARM, GREEDY, WARM]
    alone = [answer(engine, prompt, 10, params=own) for prompt, own in zip(prompts, params, strict=True)]

    assert engine.model.exact
    for seed in range(3):
        assert answer_together(engine, prompts, 10, params=params, seed=seed) == alone


@pytest.mark.parametrize("architecture", ["gemma2", "llama"])
def test_float32_and_soft_caps_are_computed_by_the_kernels(
    architecture: str, cuda_engine: Engine, tiny_network: Network
) -> None:
    engine, network = cuda_engine(architecture, dtype="float32"), tiny_network(architecture)
    prompts = [prompt_of(length) for length in (5, 300)]

    for prompt in prompts:
        assert answer(engine, prompt, 6) == generated(network, prompt, 6)


@pytest.mark.parametrize("chunk", [1, 30])
@pytest.mark.parametrize(
    "filters", [{}, {"top_p": 0.9, "top_k": 20}, {"frequency_penalty": 1.0, "logprobs": True}]
)
def test_a_step_is_launched_without_waiting_for_the_device(
    chunk: int, filters: dict[str, Any], cuda_engine: Engine
) -> None:
    """In torch's sync debug mode, any call that waits raises."""
    engine: Any = cuda_engine("llama")
    params = SamplingParams(seed=1, max_tokens=9, temperature=1.0, ignore_eos=True, **filters)
    ids = prompt_of(chunk)
    row = Row(blocks_of(engine, 0), 0, chunk, ids, chunk, True, params)
    engine.launch([row]).wait()  # allocates workspaces, uploads parameters

    with cuda.waiting_forbidden():
        step = engine.launch([row])

    assert isinstance(step.wait()[0], Token)


def test_a_launch_returns_before_the_device_has_computed(cuda_engine: Engine) -> None:
    engine: Any = cuda_engine("llama")
    row = Row(blocks_of(engine, 0), 0, 3, [4, 5, 6], 3, True, GREEDY)
    # The engine keeps the results of one step, so two steps pin all memory that results need. To pin more may
    # wait for the device.
    engine.launch([row]).wait()
    expected = engine.launch([row]).wait()
    torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]

    step = engine.launch([row])
    over = torch.cuda.current_stream(DEVICE).query()

    assert not over
    assert step.wait() == expected


@pytest.mark.parametrize("exact", [False, True])
@torch.inference_mode()
def test_a_captured_step_computes_whatever_its_inputs_are_filled_with(exact: bool) -> None:
    """Nothing in a step waits for the device, and nothing depends on the numbers in its inputs."""
    ids, other = prompts(400, 40)
    model = Model(network_of("wide qwen3", torch.bfloat16), exact=exact)
    model(Part(0, ids, 0, 398))
    model(Part(1, other, 0, 38))
    captured = model.step(Part(1, other, 38, 39), padding=1)
    logits = model.decoder(captured.ids, captured)  # of each step, see `DeviceForward`

    def compute() -> None:
        model.decoder(captured.ids, captured)

    replay = cuda.GraphPool(DEVICE).capture(compute)

    for part in (Part(0, ids, 398, 399), Part(1, other, 39, 40), Part(0, ids, 399, 400)):
        step = model.step(part, padding=1)
        for name in step.__slots__[1:]:
            getattr(captured, name).copy_(getattr(step, name))
        logits.zero_()
        replay()
        replayed = logits[0].clone()
        assert torch.equal(replayed, model.decoder(step.ids, step)[0])


def test_a_fetch_returns_results_of_earlier_work() -> None:
    numbers = torch.ones(1 << 20, device=DEVICE).cumsum(0)

    assert cuda.Fetch(numbers).wait()[-1] == 1 << 20


def test_a_host_buffer_is_not_overwritten_before_it_is_copied() -> None:
    buffer = cuda.HostBuffer(1 << 20, DEVICE)
    target = torch.zeros(1 << 20, dtype=torch.int32, device=DEVICE)
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
    buffer.array().fill(1)
    buffer.copy_to(target, 1 << 20)

    buffer.array().fill(2)

    assert bool((target == 1).all())


def test_a_share_of_the_memory_limits_what_can_be_allocated() -> None:
    _, total = torch.cuda.mem_get_info(DEVICE)
    try:
        probes.limit_memory(DEVICE, 0.2)

        free = free_bytes(DEVICE)

        assert free <= 0.2 * total
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(free + (64 << 20), dtype=torch.uint8, device=DEVICE)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def test_work_that_waits_is_recognised_before_it_is_captured() -> None:
    def waits() -> None:
        torch.ones(3, device=DEVICE).sum().item()

    out, source = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)

    def doubles() -> None:
        out.copy_(source * 2)

    pool = cuda.GraphPool(DEVICE)

    remaining = iter([1])

    def breaks() -> None:
        if next(remaining, None) is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert pool.waits(waits)
    assert not pool.waits(doubles)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pool.waits(breaks)
    replay = pool.capture(doubles)
    source.fill_(21)
    replay()
    assert out.tolist() == [42, 42, 42]


def test_an_illegal_access_is_recognised_as_the_end_of_the_device() -> None:
    """In a process of its own, because the device of that process cannot be used afterwards."""
    program = """
import torch
from headrace.worker.engine.gpu.cuda import as_broken
from headrace.worker.engine.interface import EngineBroken
try:
    torch.zeros(4, device="cuda")[torch.tensor([1 << 40], device="cuda")].sum().item()
except Exception as error:
    assert isinstance(as_broken(error), EngineBroken), error
    print("recognised")
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )

    assert "recognised" in ran.stdout, ran.stderr

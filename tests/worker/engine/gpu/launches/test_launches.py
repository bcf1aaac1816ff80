"""The engine of a GPU on a device that computes nothing: devices, types and layouts; and launches compile."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import unset_fake_temporarily

from headrace.worker.engine import attention_kinds
from headrace.worker.engine.gpu.engine import GpuEngine
from headrace.worker.engine.interface import ModelInfo, Row, SamplingParams, Token
from headrace.worker.engine.load import gpu_assembly, kv_sizing
from headrace.worker.engine.load.devices import Plan, Target
from headrace.worker.engine.transformers_attention import IMPLEMENTATION, observe_layers, paged_attention
from tests.worker.engine.conftest import ARCHITECTURES
from tests.worker.engine.gpu.device import HAS_CUDA
from tests.worker.engine.gpu.launches.fake_cuda import CUDA, Recorder, fake_cuda, fake_network

pytestmark = pytest.mark.skipif(HAS_CUDA, reason="the other tests of this folder use the real device")

PARAMS = SamplingParams(seed=3, max_tokens=99, temperature=0.7, top_p=0.9, top_k=20, logprobs=True)
PENALISED = SamplingParams(
    seed=4, max_tokens=99, temperature=0.0, repetition_penalty=1.2, logit_bias={5: 1.0}, min_tokens=3
)


@dataclass
class Sizes:
    """Limits of the engine that is built."""

    max_running: int = 4
    step_tokens: int = 160
    context: int = 600
    blocks: int = 100


def build(
    config: Any, *, dtype: torch.dtype, exact: bool, graphs: bool = True, sizes: Sizes | None = None
) -> GpuEngine:
    """Build an engine as a worker does after it has loaded a network; inside `fake_cuda`."""
    sizes = sizes or Sizes()
    transformers.AttentionInterface.register(IMPLEMENTATION, paged_attention)
    network = fake_network(config, dtype, IMPLEMENTATION)
    layers = observe_layers(network)
    vocabulary = network.get_output_embeddings().weight.shape[0]
    plan = Plan(Target(CUDA, gpu=True), sizes.step_tokens, exact, positions=sizes.context)
    kind = attention_kinds.triton(layers, CUDA, dtype)
    weights = gpu_assembly.prepare(network, layers, plan, lambda _: None)
    model = ModelInfo(
        name="fake",
        revision="",
        dtype=str(dtype),
        device=str(CUDA),
        tokenizer_fingerprint="",
        weights_fingerprint="",
        context_length=sizes.context,
        vocabulary_size=vocabulary,
        eos_ids=frozenset({2}),
        max_running=sizes.max_running,
        block_tokens=kind.block_tokens,
        kv_blocks=sizes.blocks,
        exact=exact,
    )
    return gpu_assembly.build_gpu_engine(
        model,
        plan,
        network=network,
        weights=weights,
        layers=layers,
        kind=kind,
        dtype=dtype,
        progress=lambda _: None,
        graphs=graphs,
    )


def row(first: int, start: int, stop: int, params: SamplingParams = PARAMS) -> Row:
    """Return a row of a sequence with blocks of its own."""
    ids = [7] * stop
    return Row(
        blocks=range(first, first + stop // 32 + 1),
        start=start,
        stop=stop,
        ids=ids,
        prompt=1,
        sample=True,
        params=params,
        version=first + 1,
    )


def compute(engine: GpuEngine) -> None:
    """Launch a step with prompts, one of decodes, and one of many blocks."""
    for rows in (
        [row(0, 0, 70), row(10, 32, 40, PENALISED)],
        [row(20, 69, 70), row(30, 40, 41, PENALISED), row(40, 0, 1)],
        [row(50, 500, 600), row(80, 599, 600)],
    ):
        launched = engine.launch(rows)
        with unset_fake_temporarily():
            assert [type(result) for result in launched.wait()] == [Token] * len(rows)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("qwen2", torch.float16),
        ("qwen3", torch.bfloat16),
        ("mistral", torch.float32),
        ("gemma2", torch.bfloat16),
        ("gpt_neox", torch.float16),
    ],
)
def test_an_engine_is_captured_and_launched(
    monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: torch.dtype, exact: bool
) -> None:
    with fake_cuda(monkeypatch) as recorder:
        engine = build(ARCHITECTURES[architecture](), dtype=dtype, exact=exact)
        assert not engine.uncaptured
        captured = dict(recorder.unique)
        compute(engine)

    assert captured
    assert recorder.unique == captured, "a captured step launched kernels"


def test_an_engine_without_graphs_launches_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ARCHITECTURES["llama"]()
    with fake_cuda(monkeypatch) as recorder:
        build(config, dtype=torch.bfloat16, exact=False)
        captured = set(recorder.unique)
        recorder.unique.clear()
        compute(build(config, dtype=torch.bfloat16, exact=False, graphs=False))

    assert {launch.kernel for launch in recorder.unique} == {launch.kernel for launch in captured}


def test_the_largest_steps_are_computed_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when KV memory is sized: all rows sample, and use two blocks again and again."""
    sizes = Sizes(max_running=40, step_tokens=300)
    with fake_cuda(monkeypatch) as recorder:
        engine = build(ARCHITECTURES["qwen3"](), dtype=torch.bfloat16, exact=True, graphs=False, sizes=sizes)
        assert not recorder.unique
        for rows in kv_sizing.largest_steps(
            step_tokens=sizes.step_tokens,
            max_running=sizes.max_running,
            context_length=sizes.context,
            block_tokens=engine.model.block_tokens,
        ):
            engine.launch(rows)

    assert recorder.unique


def refused(recorder: Recorder, capability: int) -> str:
    """Compile all recorded launches in a process; return those that are not acceptable."""
    command = [sys.executable, "-m", "tests.worker.engine.gpu.launches.compile_launches", f"sm_{capability}"]
    done = subprocess.run(command, input=recorder.as_json(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 or done.stdout, done.stderr
    return done.stdout


def test_all_launches_of_an_engine_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter accepts may not compile."""
    with fake_cuda(monkeypatch) as recorder:
        for exact in (False, True):
            compute(build(ARCHITECTURES["qwen3"](), dtype=torch.bfloat16, exact=exact))

    assert not refused(recorder, 90)

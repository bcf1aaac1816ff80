"""The engine of a GPU with fake graphs, which works on a CPU too."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from headrace.worker.engine.gpu import cuda
from headrace.worker.engine.gpu.decoder import GpuDecoder, GpuDecoderWeights
from headrace.worker.engine.gpu.engine import DeviceForward, GpuEngine
from headrace.worker.engine.gpu.network_forward import NetworkForward
from headrace.worker.engine.gpu.paged_attention import Scratch, tile_tokens
from headrace.worker.engine.gpu.slots import Slots
from headrace.worker.engine.interface import (
    EngineBroken,
    Fault,
    Grammars,
    ModelInfo,
    Row,
    SamplingParams,
    Token,
)
from headrace.worker.engine.kv_memory import PagedMemory
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.engine.transformers_attention import IMPLEMENTATION, observe_layers, paged_attention
from headrace.worker.runner import SequenceSpec, StepReport
from tests.worker.engine.conftest import VOCABULARY
from tests.worker.engine.gpu.device import DEVICE
from tests.worker.engine.grammar.cases import letters, matches, regex
from tests.worker.engine.test_torch_engine import (
    GREEDY,
    WARM,
    Network,
    generated,
    prompt_of,
)

BLOCK = 8  # so that short sequences cross borders of blocks
STEP_TOKENS = 8
PENALISED = replace(WARM, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2)


class Graphs:
    """Fake CUDA graphs: replays by calling the captured function."""

    def __init__(self, obstacle: str = "") -> None:
        self.captured = 0
        self.replayed = 0
        self._obstacle = obstacle

    def waits(self, run: Callable[[], None]) -> str:
        run()
        return self._obstacle

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        assert not self._obstacle
        run()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


def model_info(*, max_running: int = 4, context: int = 32) -> ModelInfo:
    return ModelInfo(
        name="tiny",
        revision="",
        dtype="float32",
        device=str(DEVICE),
        tokenizer_fingerprint="",
        weights_fingerprint="",
        context_length=context,
        vocabulary_size=VOCABULARY,
        eos_ids=frozenset(),
        max_running=max_running,
        block_tokens=BLOCK,
        kv_blocks=max_running * -(-context // BLOCK),
        exact=True,
    )


@pytest.fixture
def device_engine(tiny_folder: Callable[[str], Path]) -> Callable[..., GpuEngine]:
    """Make an engine of a tiny model, as for a GPU, in float32."""
    transformers.AttentionInterface.register(IMPLEMENTATION, paged_attention)

    def make(
        architecture: str = "llama",
        *,
        fused: bool = True,
        graphs: Graphs | None = None,
        step_tokens: int = STEP_TOKENS,
        model: ModelInfo | None = None,
        exact: bool = True,
        grammars: Grammars | None = None,
    ) -> GpuEngine:
        model = model or model_info()
        auto: Any = transformers.AutoModelForCausalLM
        network = (
            auto.from_pretrained(
                tiny_folder(architecture), dtype=torch.float32, attn_implementation=IMPLEMENTATION
            )
            .to(DEVICE)
            .eval()
        )
        layers = observe_layers(network)
        memory = PagedMemory(
            {index: layer.shape for index, layer in layers.items()},
            blocks=model.kv_blocks + 1,
            block_tokens=BLOCK,
            device=DEVICE,
            dtype=torch.float32,
        )
        width = -(-model.context_length // BLOCK)
        slots = Slots(model.max_running, width, spare=model.kv_blocks, device=DEVICE)
        scratch = Scratch(
            layers, max_rows=model.max_running, positions=model.context_length, device=DEVICE, exact=exact
        )
        forward: DeviceForward
        if fused:
            weights = GpuDecoderWeights(network, layers, positions=model.context_length)
            forward = GpuDecoder(weights, memory, slots.tables, scratch, exact=exact)
        else:
            forward = NetworkForward(network, memory, slots.tables, scratch)
        return GpuEngine(
            forward,
            model,
            slots=slots,
            step_tokens=step_tokens,
            tile=tile_tokens(layers, exact=exact, dtype=torch.float32),
            graphs=graphs,
            grammars=grammars,
        )

    return make


def answers(
    engine: GpuEngine, prompts: Sequence[Sequence[int]], count: int, params: Sequence[SamplingParams]
) -> list[list[int]]:
    """Answer all prompts together, by the loop that runs one step ahead."""
    loop: EngineLoop[int] = EngineLoop(engine, step_tokens=STEP_TOKENS)
    reports: queue.SimpleQueue[StepReport[int]] = queue.SimpleQueue()
    for key, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        loop.submit(SequenceSpec(key, prompt, len(prompt), replace(own, max_tokens=count)))
    loop.start(reports.put)
    found: list[list[int]] = [[] for _ in prompts]
    running = len(prompts)
    while running:
        for update in reports.get(timeout=60).updates:
            found[update.key] += update.token_ids
            assert not update.fault
            running -= update.finish is not None
    loop.stop()
    return found


@pytest.mark.parametrize(
    ("architecture", "fused"),
    [
        ("llama", True),
        ("qwen3", True),
        ("qwen2", False),
        ("gemma2", False),
    ],
)
def test_answers_are_those_of_generate(
    architecture: str, fused: bool, device_engine: Callable[..., GpuEngine], tiny_network: Network
) -> None:
    graphs = Graphs()
    engine = device_engine(architecture, fused=fused, graphs=graphs, exact=False)
    network = tiny_network(architecture)
    prompts = [prompt_of(length) for length in (1, 5, 11)]

    found = answers(engine, prompts, 3, [GREEDY] * 3)

    assert found == [generated(network, prompt, 3) for prompt in prompts]
    assert graphs.captured == 2 * 4  # forward and sampling: decodes of 1, 2 and 4 rows; 8 tokens
    assert graphs.replayed


def test_an_exact_engine_answers_alike_alone_and_in_a_batch(device_engine: Callable[..., GpuEngine]) -> None:
    """The last tokens of a sequence are not known to the host when its next step is launched."""
    engine = device_engine(graphs=Graphs())
    prompts = [prompt_of(length) for length in (2, 10)]
    params = [PENALISED, WARM]
    alone = [answers(engine, [prompt], 3, [own])[0] for prompt, own in zip(prompts, params, strict=True)]

    assert answers(engine, prompts, 3, params) == alone


def test_answers_follow_their_grammars_though_the_host_does_not_know_the_latest_token(
    device_engine: Callable[..., GpuEngine],
) -> None:
    """Alone and in a batch with a sequence without a grammar, and with one whose grammar fails."""
    grammars = letters(VOCABULARY)
    model = replace(model_info(), eos_ids=frozenset({0}))
    params = [
        replace(PENALISED, grammar=regex("[ab]{3}"), min_tokens=9, ignore_eos=False),
        WARM,
        replace(WARM, grammar=regex("ab|[0-9]+"), logprobs=True, ignore_eos=False),
    ]
    prompts = [prompt_of(length) for length in (2, 4, 3)]
    engine = device_engine(graphs=Graphs(), grammars=grammars, model=model)
    alone = [answers(engine, [prompt], 5, [own])[0] for prompt, own in zip(prompts, params, strict=True)]

    assert matches("[ab]{3}", grammars, alone[0])
    assert matches("ab|[0-9]+", grammars, alone[2])
    assert answers(engine, prompts, 5, params) == alone
    bad, good = rows_of(prompts[:2], params[0])
    bad.params = replace(params[0], grammar="start: /(/")
    results = engine.step([bad, good])
    assert isinstance(results[0], Fault)
    assert results[0].invalid
    assert isinstance(results[1], Token)


def test_steps_without_graphs_have_the_same_results(device_engine: Callable[..., GpuEngine]) -> None:
    """Padding changes nothing."""
    prompts = [prompt_of(length) for length in (3, 10)]

    launched = answers(device_engine(), prompts, 3, [WARM] * 2)

    assert answers(device_engine(graphs=Graphs()), prompts, 3, [WARM] * 2) == launched


def test_a_model_that_waits_for_the_device_is_computed_without_graphs(
    device_engine: Callable[..., GpuEngine], tiny_network: Network
) -> None:
    engine = device_engine("phi3", fused=False, graphs=Graphs(obstacle="called a synchronizing operation"))

    assert engine.uncaptured == "called a synchronizing operation"
    assert answers(engine, [prompt_of(9)], 3, [GREEDY]) == [generated(tiny_network("phi3"), prompt_of(9), 3)]


def rows_of(prompts: Sequence[Sequence[int]], params: SamplingParams = GREEDY) -> list[Row]:
    return [
        Row(range(4 * index, 4 * index + 4), 0, len(prompt), prompt, len(prompt), True, params)
        for index, prompt in enumerate(prompts)
    ]


def test_a_row_whose_logits_are_not_finite_fails_alone(device_engine: Callable[..., GpuEngine]) -> None:
    engine = device_engine()
    forward: Any = engine._forward
    forward._weights.embedding.data[99] = float("nan")

    results = engine.step(rows_of([[99], [5]]))

    assert isinstance(results[0], Fault)
    assert isinstance(results[1], Token)


def test_parameters_that_cannot_be_applied_fail_alone(device_engine: Callable[..., GpuEngine]) -> None:
    engine = device_engine()
    wrong, right = rows_of([[4, 5], [4, 5]])
    wrong.params = replace(GREEDY, logit_bias={VOCABULARY: 1.0})

    results = engine.step([wrong, right])

    assert isinstance(results[0], Fault)
    assert "logit_bias" in results[0].message
    assert results[1] == engine.step(rows_of([[4, 5]]))[0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory\nmore"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["allocator", "cuda", "cublas", "triton"],
)
def test_a_launch_without_memory_costs_only_its_rows(
    error: Exception, device_engine: Callable[..., GpuEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = device_engine()
    expected = engine.step(rows_of([[4, 5, 6]]))
    rows = rows_of([[4, 5, 6], [7]], PENALISED)

    def fails(*_: object) -> torch.Tensor:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forward", fails)
        with pytest.raises(type(error), match=r"memory|ALLOC_FAILED"):
            engine.launch(rows)

    assert engine.step(rows_of([[4, 5, 6]])) == expected
    assert None not in engine.step(rows)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"),
        RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
        RuntimeError("CUDA driver error: an illegal memory access was encountered"),
    ],
    ids=["torch", "cublas", "triton", "driver"],
)
@pytest.mark.parametrize("late", [False, True], ids=["launch", "wait"])
def test_an_error_of_the_device_breaks_the_engine(
    error: Exception, late: bool, device_engine: Callable[..., GpuEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = device_engine()

    def fails(*_: object) -> torch.Tensor:
        raise error

    if late:
        monkeypatch.setattr(cuda.Fetch, "wait", fails)
    else:
        monkeypatch.setattr(engine, "_forward", fails)

    with pytest.raises(
        EngineBroken, match=str(error).splitlines()[0][:20].replace("[", ".").replace("]", ".")
    ):
        engine.step(rows_of([[4]]))


def test_padding_writes_only_to_the_spare_block(device_engine: Callable[..., GpuEngine]) -> None:
    """Three rows run as four, and five tokens as eight."""
    engine = device_engine(graphs=Graphs())
    forward: Any = engine._forward
    keys, values = forward._memory[0]
    for ids in ([[5], [6], [7]], [[5, 6, 7, 8, 9]]):
        keys.fill_(1.5)
        values.fill_(2.5)

        engine.step(rows_of(ids))

        written = ((keys != 1.5) | (values != 2.5)).flatten(2).any(-1)[:-1].nonzero().tolist()
        assert written == [[4 * row, place] for row, own in enumerate(ids) for place in range(len(own))]

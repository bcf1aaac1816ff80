"""The fused decoder and its matrix products on a CUDA device, in the formats that the interpreter lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from headrace.worker.engine.gpu.kernels.matmul import SEGMENT, matmul
from headrace.worker.engine.gpu.paged_attention import BLOCK_TOKENS
from tests.worker.engine.gpu.model_steps import Part
from tests.worker.engine.gpu.test_decoder import VOCABULARY, Model, cut, prompts

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch built without CUDA"),
]

DEVICE = torch.device("cuda", 0)
HALVES = [torch.bfloat16, torch.float16]
POSITIONS = 640
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.05,
}
NETWORKS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES | {"num_attention_heads": 6, "head_dim": 128})),
}


def network_of(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return NETWORKS[name]().eval().to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("columns", "depth"), [(1000, 896), (4096, 4096), (300, 2 * SEGMENT + 72)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_row_of_a_product_has_the_same_bits_for_all_numbers_of_rows(
    columns: int, depth: int, biased: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2048, depth, device=DEVICE).to(dtype)
    weights = (torch.randn(columns, depth, device=DEVICE) * 0.05).to(dtype)
    bias = torch.randn(columns, device=DEVICE).to(dtype) if biased else None
    expected = x.double() @ weights.double().T + (0 if bias is None else bias.double())

    whole = matmul(x, weights, bias)

    assert (whole.double() - expected).norm() <= 4e-3 * expected.norm()
    for rows in (1, 2, 17, 33, 64, 128, 256, 257, 511, 512, 1024):
        assert torch.equal(matmul(x[:rows], weights, bias), whole[:rows]), rows


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_logits_are_as_close_to_float32_as_those_of_transformers(
    name: str, dtype: torch.dtype, exact: bool
) -> None:
    ids, other = prompts(600, 300)
    rounded = network_of(name, dtype)
    theirs = rounded(torch.tensor([ids], device=DEVICE)).logits[0].float()
    reference = rounded.float()(torch.tensor([ids], device=DEVICE)).logits[0]  # the same, rounded weights
    model = Model(network_of(name, dtype), exact=exact, positions=POSITIONS, block=BLOCK_TOKENS)

    seen = {}
    for part, beside in zip(
        cut(1, ids, 255, 256, 257, 512, 513, 599, 600),
        cut(0, other, 3, 4, 5, 250, 251, 299, 300),
        strict=True,
    ):
        seen[part.stop - 1] = model(beside, part, padding=2)[1].float()

    at = list(seen)
    error = (torch.stack(list(seen.values())) - reference[at]).norm()
    assert error <= 3 * (theirs[at] - reference[at]).norm()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_exact_logits_are_bit_identical_alone_in_a_batch_and_resumed(name: str, dtype: torch.dtype) -> None:
    ids, *others = prompts(601, 90, 257, 5)
    network = network_of(name, dtype)
    alone = Model(network, exact=True, positions=POSITIONS, block=BLOCK_TOKENS)(Part(0, ids, 0, 601))

    together = Model(network, exact=True, positions=POSITIONS, block=BLOCK_TOKENS)
    together(*(Part(slot, own, 0, len(own) - 1) for slot, own in enumerate(others)), Part(3, ids, 0, 300))
    together(Part(3, ids, 300, 600), padding=200)
    rows = [Part(slot, own, len(own) - 1, len(own)) for slot, own in enumerate(others)]

    assert torch.equal(together(*rows, Part(3, ids, 600, 601), padding=60)[3], alone[0])


@pytest.mark.parametrize("exact", [False, True])
@torch.inference_mode()
def test_a_captured_step_computes_whatever_its_inputs_are_filled_with(exact: bool) -> None:
    """Nothing in a step waits for the device, and nothing depends on the numbers in its inputs."""
    ids, other = prompts(400, 40)
    model = Model(network_of("qwen3", torch.bfloat16), exact=exact, positions=POSITIONS, block=BLOCK_TOKENS)
    model(Part(0, ids, 0, 398))
    model(Part(1, other, 0, 38))
    captured = model.step(Part(1, other, 38, 39), padding=1)
    stream: Any = torch.cuda.Stream(DEVICE)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        model.decoder(captured.ids, captured)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        logits = model.decoder(captured.ids, captured)
    for part in (Part(0, ids, 398, 399), Part(1, other, 39, 40), Part(0, ids, 399, 400)):
        step = model.step(part, padding=1)
        for name in step.__slots__[1:]:
            getattr(captured, name).copy_(getattr(step, name))

        graph.replay()

        assert torch.equal(logits[0], model.decoder(step.ids, step)[0])

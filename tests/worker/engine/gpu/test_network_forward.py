"""Networks of transformers over the kernels of GPUs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from headrace.worker.engine.gpu.network_forward import ExactLinear, NetworkForward, make_exact
from headrace.worker.engine.gpu.paged_attention import Scratch, tile_tokens
from headrace.worker.engine.gpu.step_inputs import StepShape
from headrace.worker.engine.kv_memory import PagedMemory
from headrace.worker.engine.transformers_attention import IMPLEMENTATION, observe_layers, paged_attention
from tests.worker.engine.gpu.device import DEVICE, HAS_CUDA
from tests.worker.engine.gpu.model_steps import Part, step_of

POSITIONS = 16
VOCABULARY = 90
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,  # large, so that attention influences the logits
    "pad_token_id": 0,
}
NETWORKS: dict[str, Any] = {
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES,
            num_key_value_heads=2,
            head_dim=24,
            sliding_window=5,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=2.0,
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, num_key_value_heads=4)),
}


class Network(torch.nn.Sequential):
    """Layers with the dtype that networks of transformers have."""

    dtype = torch.float32


def network_of(name: str) -> Any:
    torch.manual_seed(0)
    return NETWORKS[name]().eval().to(DEVICE)


def forward_of(network: Any) -> tuple[NetworkForward, PagedMemory, torch.Tensor, int]:
    """Return a forward over two slots and a spare one, its memory and tables, and the size of its tiles."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    network.set_attn_implementation(IMPLEMENTATION)
    layers = observe_layers(network)
    memory = PagedMemory(
        {index: layer.shape for index, layer in layers.items()},
        blocks=5,
        block_tokens=8,
        device=DEVICE,
        dtype=torch.float32,
    )
    tables = torch.tensor([[3, 0], [1, 2], [4, 4]], dtype=torch.int32, device=DEVICE)
    scratch = Scratch(layers, max_rows=4, positions=POSITIONS, device=DEVICE, multiprocessors=1, exact=True)
    tile = tile_tokens(layers, exact=True, dtype=torch.float32)
    return NetworkForward(network, memory, tables, scratch), memory, tables, tile


@torch.inference_mode()
def logits_of(network: Any, steps: Sequence[Sequence[Part]], *, padding: int = 0) -> torch.Tensor:
    """Compute steps and return the logits of the last one, [rows, vocabulary]."""
    forward, memory, tables, tile = forward_of(network)
    for parts in steps:
        tokens = sum(part.stop - part.start for part in parts)
        shape = StepShape(tokens + padding, len(parts) + padding, 1 if tokens == len(parts) else tile)
        step = step_of(parts, shape, memory, tables)
        logits = forward(step.ids, step)
    assert logits.shape == (len(steps[-1]) + padding, VOCABULARY)
    return logits[: len(steps[-1])]


def prompts(*lengths: int) -> list[list[int]]:
    dice = random.Random(0)
    return [dice.choices(range(VOCABULARY), k=length) for length in lengths]


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_logits_are_those_of_transformers(name: str) -> None:
    ids, other = prompts(14, 9)
    reference = network_of(name)
    reference.set_attn_implementation("eager")
    expected = torch.stack(
        [reference(torch.tensor([each], device=DEVICE)).logits[0, -1] for each in (ids, other)]
    )

    seen = logits_of(
        network_of(name),
        [
            [Part(0, ids, 0, 10)],
            [Part(1, other, 0, 8), Part(0, ids, 10, 13)],
            [Part(0, ids, 13, 14), Part(1, other, 8, 9)],
        ],
        padding=2,
    )

    assert (seen - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.skipif(HAS_CUDA, reason="torch's sums, as in norms, may depend on the number of rows on CUDA")
@torch.inference_mode()
def test_an_exact_network_has_the_same_bits_alone_and_in_a_batch() -> None:
    ids, other = prompts(12, 9)
    network = network_of("phi3")

    assert make_exact(network)

    alone = logits_of(network, [[Part(0, ids, 0, 12)]])
    together = logits_of(
        network, [[Part(1, other, 0, 8), Part(0, ids, 0, 11)], [Part(1, other, 8, 9), Part(0, ids, 11, 12)]]
    )
    assert torch.equal(together[1], alone[0])


def test_linear_layers_are_replaced_and_share_their_weights() -> None:
    network = Network(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8, bias=False)).to(DEVICE)
    weights = [layer.weight for layer in network]
    rows = torch.randn(2, 3, 24, device=DEVICE)
    expected = network(rows)

    assert make_exact(network)

    assert all(isinstance(layer, ExactLinear) for layer in network)
    assert all(layer.weight is weight for layer, weight in zip(network, weights, strict=True))
    torch.testing.assert_close(network(rows), expected)


def test_an_exact_linear_layer_accepts_transposed_inputs() -> None:
    layer = torch.nn.Linear(24, 40, device=DEVICE)
    rows = torch.randn(1, 24, 5, device=DEVICE).transpose(1, 2)

    torch.testing.assert_close(ExactLinear(layer)(rows), layer(rows))


def test_layers_that_may_compute_something_else_are_kept() -> None:
    class Own(torch.nn.Linear):
        pass

    network = Network(Own(24, 40))

    assert not make_exact(network)
    assert type(network[0]) is Own

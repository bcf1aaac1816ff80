"""The fused decoder in Triton's interpreter compared with transformers, for each supported architecture."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from triton.runtime import interpreter

from headrace.worker.engine.gpu.decoder import GpuDecoder, GpuDecoderWeights, unsupported_reason
from headrace.worker.engine.gpu.paged_attention import Scratch, tile_tokens
from headrace.worker.engine.gpu.step_inputs import StepInputs, StepShape
from headrace.worker.engine.kv_memory import PagedMemory
from headrace.worker.engine.transformers_attention import IMPLEMENTATION, observe_layers, paged_attention
from tests.worker.engine.gpu.model_steps import Part, step_of

POSITIONS = 32
BLOCK = 8  # tokens; small, so that short sequences have several
VOCABULARY = 150
SLOTS = 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,  # large, so that attention influences the logits
}
NETWORKS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, biases, scaled rotation, heads of 40": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES | {"head_dim": 40, "num_key_value_heads": 4},
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        )
    ),
    "mistral, sliding": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen2, one layer slides": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            **SIZES,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
            layer_types=["full_attention", "sliding_attention"],
        )
    ),
    "qwen3, groups of 3, heads of 24": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZES | {"num_attention_heads": 6, "head_dim": 24})
    ),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}


def network_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    with torch.no_grad():
        for parameter in network.parameters():  # norms and biases are initialised to ones and zeros
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network.to(dtype)


class Model:
    """A decoder over memory with a slot of blocks per sequence; the last slot and block are for padding.

    It is where the network is.
    """

    def __init__(
        self, network: Any, *, exact: bool = False, positions: int = POSITIONS, block: int = BLOCK
    ) -> None:
        AttentionInterface.register(IMPLEMENTATION, paged_attention)
        network.set_attn_implementation(IMPLEMENTATION)
        layers = observe_layers(network)
        shapes = {index: layer.shape for index, layer in layers.items()}
        width = -(-positions // block)
        device = network.device
        self.memory = PagedMemory(
            shapes, blocks=SLOTS * width + 1, block_tokens=block, device=device, dtype=network.dtype
        )
        for layer in shapes:
            for pages in self.memory[layer]:
                pages.fill_(float("nan"))  # stale contents must not be read
        blocks = torch.randperm(SLOTS * width, generator=torch.Generator().manual_seed(1))
        self.tables = torch.full((SLOTS + 1, width), self.memory.blocks - 1, dtype=torch.int32)
        self.tables[:SLOTS] = blocks.view(SLOTS, width)
        self.tables = self.tables.to(device)
        self.tile = tile_tokens(layers, exact=exact, dtype=network.dtype)
        scratch = Scratch(layers, max_rows=SLOTS, positions=positions, device=device, exact=exact)
        weights = GpuDecoderWeights(network, layers)
        self.decoder = GpuDecoder(weights, self.memory, self.tables, scratch, exact=exact)

    def step(self, *parts: Part, padding: int = 0) -> StepInputs:
        """Return the inputs of a step of these parts."""
        tokens = sum(part.stop - part.start for part in parts)
        decodes = tokens == len(parts)
        shape = StepShape(tokens + padding, len(parts) + padding, 1 if decodes else self.tile)
        return step_of(parts, shape, self.memory, self.tables)

    @torch.inference_mode()
    def __call__(self, *parts: Part, padding: int = 0) -> torch.Tensor:
        """Return the logits of each part's last token."""
        step = self.step(*parts, padding=padding)
        logits = self.decoder(step.ids, step)
        assert logits.shape == (step.shape.rows, VOCABULARY)
        return logits[: len(parts)].clone()


def prompts(*lengths: int) -> list[list[int]]:
    dice = random.Random(0)
    return [dice.choices(range(VOCABULARY), k=length) for length in lengths]


def cut(slot: int, ids: Sequence[int], *stops: int) -> list[Part]:
    """Return the parts of a sequence that end at *stops*."""
    return [Part(slot, ids, start, stop) for start, stop in zip((0, *stops), stops, strict=False)]


@pytest.mark.parametrize(
    ("name", "dtype", "exact"),
    [
        *((name, torch.float32, False) for name in NETWORKS),
        ("llama, biases, scaled rotation, heads of 40", torch.float32, True),
        ("qwen3, groups of 3, heads of 24", torch.float16, False),
        ("mistral, sliding", torch.float16, True),
    ],
)
@torch.inference_mode()
def test_logits_are_those_of_transformers(name: str, dtype: torch.dtype, exact: bool) -> None:
    network = network_of(name, dtype)
    ids, other = prompts(14, 6)
    expected = [network.float()(torch.tensor([each])).logits[0] for each in (ids, other)]
    model = Model(network_of(name, dtype), exact=exact)

    seen = []
    for part, beside in zip(cut(1, ids, 7, 8, 13, 14), cut(0, other, 3, 4, 5, 6), strict=True):
        mixed = model(beside, part, padding=2)
        seen += [(mixed[0], expected[1][beside.stop - 1]), (mixed[1], expected[0][part.stop - 1])]

    for logits, reference in seen:
        assert (logits.float() - reference).norm() <= TOLERANCE[dtype] * reference.norm()


def test_exact_logits_are_bit_identical_alone_in_a_batch_and_resumed() -> None:
    """After a failover, another worker resumes the sequence: the answer must not change."""
    ids, *others = prompts(18, 3, 5, 2)
    network = network_of("qwen3, groups of 3, heads of 24")
    alone = Model(network, exact=True)(Part(0, ids, 0, 18))

    together, decoding = Model(network, exact=True), Model(network, exact=True)
    together(*(Part(slot, own, 0, len(own) - 1) for slot, own in enumerate(others)), Part(3, ids, 0, 11))
    together(Part(3, ids, 11, 17), padding=3)
    rows = [Part(slot, own, len(own) - 1, len(own)) for slot, own in enumerate(others)]
    decoding(Part(2, ids, 0, 16))
    decoding(Part(2, ids, 16, 17))

    assert torch.equal(together(*rows, Part(3, ids, 17, 18))[-1], alone[0])
    assert torch.equal(decoding(Part(2, ids, 17, 18), padding=1)[0], alone[0])


def test_a_sequence_with_nan_does_not_affect_others() -> None:
    network = network_of("llama")
    ids, poisoned = prompts(5, 5)
    ids = [index % (VOCABULARY - 1) for index in ids]
    expected = Model(network, exact=True)(Part(0, ids, 0, 5))
    with torch.no_grad():
        network.get_input_embeddings().weight[VOCABULARY - 1] = float("nan")
    poisoned[2] = VOCABULARY - 1

    seen = Model(network, exact=True)(Part(1, poisoned, 0, 5), Part(0, ids, 0, 5))

    assert seen[0].isnan().all()
    assert torch.equal(seen[1], expected[0])


def test_the_network_shares_the_weights_of_the_decoder() -> None:
    """Memory holds one copy, and the network stays a reference for what the decoder computes."""
    network = network_of("qwen2, tied")
    network.set_attn_implementation("eager")
    ids = torch.tensor(prompts(9))
    before = network(ids).logits

    model = Model(network)

    weights = model.decoder._weights
    attention = network.model.layers[1].self_attn
    assert attention.k_proj.weight.untyped_storage().data_ptr() == weights.layers[1].qkv.weights.data_ptr()
    assert weights.head.weights.data_ptr() == weights.embedding.data_ptr()
    network.set_attn_implementation("eager")
    assert torch.equal(network(ids).logits, before)


@pytest.mark.parametrize("exact", [False, True])
def test_a_layer_is_at_most_nine_launches(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: Counter[str] = Counter()
    run = interpreter.GridExecutor.__call__

    def count(self: Any, *arguments: Any, **options: Any) -> None:
        launches[self.fn.__name__] += 1
        run(self, *arguments, **options)

    def products(x: torch.Tensor, other: torch.Tensor, *, out: torch.Tensor) -> None:
        launches["mm"] += 1
        out.copy_(x @ other)

    model = Model(network_of("llama"), exact=exact)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", count)
    monkeypatch.setattr(torch, "mm", products)

    model(Part(0, prompts(5)[0], 0, 5))

    outside = {"_embed": 1, "_multiply" if exact else "mm": 1}
    layers = launches - Counter(outside)
    assert layers.total() <= 9 * SIZES["num_hidden_layers"], layers
    assert all(launches[name] for name in outside)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"hidden_act": "gelu"}, "activation is gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "its rotation dynamic depends on the length",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rotates only a part",
        ),
    ],
)
def test_a_model_that_the_kernels_do_not_support_is_rejected_with_the_reason(
    changes: dict[str, Any], reason: str
) -> None:
    config = LlamaConfig(**SIZES | changes)

    seen = unsupported_reason("LlamaForCausalLM", config)
    assert reason in seen
    assert bool(seen) == bool(reason)


def test_other_architectures_are_not_supported() -> None:
    assert "GemmaForCausalLM is not one of" in unsupported_reason("GemmaForCausalLM", GemmaConfig(**SIZES))

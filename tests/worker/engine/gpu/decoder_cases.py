"""Networks that the fused decoder computes, and decoders over paged memory."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from headrace.worker.engine.gpu.decoder import GpuDecoder, GpuDecoderWeights
from headrace.worker.engine.gpu.paged_attention import BLOCK_TOKENS, Scratch, tile_tokens
from headrace.worker.engine.gpu.step_inputs import StepInputs, StepShape
from headrace.worker.engine.kv_memory import PagedMemory
from headrace.worker.engine.transformers_attention import IMPLEMENTATION, observe_layers, paged_attention
from tests.worker.engine.gpu.device import DEVICE
from tests.worker.engine.gpu.model_steps import Part, step_of

POSITIONS = 32
BLOCK = 8  # tokens; small, so that short sequences have several
VOCABULARY = 150
SLOTS = 4
ROWS = 80  # most rows of a step, padding included
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
WIDE_POSITIONS = 640  # more than two segments of keys
WIDE = SIZES | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": WIDE_POSITIONS,
    "initializer_range": 0.05,
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
    # Too large for the interpreter.
    "wide llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "wide qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE | {"num_attention_heads": 6, "head_dim": 128})),
}


def network_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:  # norms and biases are initialised to ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return network.to(DEVICE, dtype)


class Model:
    """A decoder over memory with a slot of blocks per sequence; the last slot and block are for padding."""

    def __init__(self, network: Any, *, exact: bool = False) -> None:
        AttentionInterface.register(IMPLEMENTATION, paged_attention)
        network.set_attn_implementation(IMPLEMENTATION)
        layers = observe_layers(network)
        shapes = {index: layer.shape for index, layer in layers.items()}
        positions = network.config.max_position_embeddings
        block = BLOCK if positions == POSITIONS else BLOCK_TOKENS
        width = -(-positions // block)
        self.memory = PagedMemory(
            shapes, blocks=SLOTS * width + 1, block_tokens=block, device=DEVICE, dtype=network.dtype
        )
        for layer in shapes:
            for pages in self.memory[layer]:
                pages.fill_(float("nan"))  # stale contents must not be read
        blocks = torch.randperm(SLOTS * width, generator=torch.Generator().manual_seed(1))
        self.tables = torch.full((SLOTS + 1, width), self.memory.blocks - 1, dtype=torch.int32)
        self.tables[:SLOTS] = blocks.view(SLOTS, width)
        self.tables = self.tables.to(DEVICE)
        self.tile = tile_tokens(layers, exact=exact, dtype=network.dtype)
        scratch = Scratch(layers, max_rows=ROWS, positions=positions, device=DEVICE, exact=exact)
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

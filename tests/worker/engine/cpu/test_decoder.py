"""The decoder compared with transformers' own forward pass, for each supported architecture."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import (
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

from headrace.worker.engine.cpu.decoder import Decoder, DecoderWeights, unsupported_reason
from headrace.worker.engine.cpu.kernels import machine
from headrace.worker.engine.cpu.kernels.kv_layout import BLOCK
from headrace.worker.engine.cpu.kernels.matmul import ElementType
from headrace.worker.engine.cpu.kernels.paging import KernelMemory
from headrace.worker.engine.flat_step import flatten
from headrace.worker.engine.interface import Row, SamplingParams
from headrace.worker.engine.load.precision import choose_precision
from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel

PARAMS = SamplingParams(seed=0, max_tokens=1)
POSITIONS = 160
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
NETWORKS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, scaled rotation, untied": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES | {"num_key_value_heads": 4},
            attention_bias=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        )
    ),
    "mistral, sliding": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=40)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3, heads of their own size": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=64)),
}
ELEMENT_TYPES = [
    pytest.param(
        element_type,
        marks=pytest.mark.skipif(
            element_type is ElementType.INT8 and not machine.HAS_VNNI, reason="needs avx512_vnni"
        ),
    )
    for element_type in ElementType
]
TOLERANCE = {ElementType.FLOAT32: 1e-5, ElementType.BFLOAT16: 3e-2, ElementType.INT8: 8e-2}


def network_of(name: str) -> Any:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    with torch.no_grad():
        for parameter in network.parameters():  # norms and biases are initialised to ones and zeros
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def decoder_of(network: Any, element_type: ElementType, *, blocks: int = 20, threads: int = 2) -> Decoder:
    config = network.config
    first = network.model.layers[0].self_attn
    memory = KernelMemory(blocks, half=element_type is not ElementType.FLOAT32)
    for index, layer in enumerate(network.model.layers):
        memory.configure_layer(
            index,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=first.head_dim,
            value_dim=first.head_dim,
            scale=layer.self_attn.scaling,
            window=getattr(config, "sliding_window", None) or 0,
        )
    return Decoder(DecoderWeights(network, element_type, positions=POSITIONS), memory, threads=threads)


def row(ids: list[int], start: int, stop: int, blocks: list[int]) -> Row:
    return Row(blocks, start, stop, ids, len(ids), True, PARAMS)


def prompts(*lengths: int) -> list[list[int]]:
    dice = random.Random(0)
    return [dice.choices(range(300), k=length) for length in lengths]


@pytest.mark.parametrize("element_type", ELEMENT_TYPES)
@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_logits_are_those_of_transformers(name: str, element_type: ElementType) -> None:
    network = network_of(name)
    decoder = decoder_of(network, element_type)
    ids, other = prompts(POSITIONS, 70)
    expected = network(torch.tensor([ids])).logits[0]

    seen = {}
    for start, stop in ((0, 50), (50, 51), (51, 128), (128, 129), (129, POSITIONS)):
        beside = row(other, start % 64, start % 64 + 3, [9, 8, 7])
        flat = flatten([beside, row(ids, start, stop, [2, 5, 3, 11, 4])], BLOCK)
        seen[stop - 1] = decoder(flat)[1].clone()

    for position, logits in seen.items():
        assert (logits - expected[position]).norm() <= TOLERANCE[element_type] * expected[position].norm()


@pytest.mark.parametrize("element_type", ELEMENT_TYPES)
@pytest.mark.parametrize("name", ["llama", "qwen3, heads of their own size"])
def test_a_sequence_is_bit_identical_alone_in_a_batch_and_resumed(
    name: str, element_type: ElementType
) -> None:
    """After a failover, another worker resumes the sequence: the answer must not change."""
    network = network_of(name)
    ids, *others = prompts(100, 3, 70, 33, 64)
    steps = [(0, 60), (60, 61), (61, 62), (62, 100)]

    def last_logits(threads: int, cuts: list[tuple[int, int]], beside: list[list[int]]) -> torch.Tensor:
        decoder = decoder_of(network, element_type, threads=threads)
        for start, stop in cuts:
            rows = [row(own, 0, len(own), [4 + 3 * i, 5 + 3 * i, 6 + 3 * i]) for i, own in enumerate(beside)]
            logits = decoder(flatten([*rows, row(ids, start, stop, [3, 0, 2, 1])], BLOCK))
        return logits[-1].clone()

    alone = last_logits(1, [(0, 100)], [])
    assert torch.equal(last_logits(2, steps, others), alone)
    assert torch.equal(last_logits(2, [(i, i + 1) for i in range(100)], []), alone)


@pytest.mark.parametrize("element_type", ELEMENT_TYPES)
def test_a_sequence_with_nan_does_not_affect_others_or_later_users_of_its_blocks(
    element_type: ElementType,
) -> None:
    network = network_of("llama")
    ids, poisoned = prompts(40, 40)
    poisoned[7] = 299
    clean_ids = [index for index in ids if index != 299]
    with torch.no_grad():
        network.get_input_embeddings().weight[299] = float("nan")
    decoder = decoder_of(network, element_type)
    blocks = [[1, 2], [3, 4]]
    expected = decoder(flatten([row(clean_ids, 0, len(clean_ids), blocks[0])], BLOCK))[0].clone()

    both = decoder(
        flatten([row(clean_ids, 0, len(clean_ids), blocks[0]), row(poisoned, 0, 40, blocks[1])], BLOCK)
    ).clone()
    after = decoder(flatten([row(clean_ids, 0, len(clean_ids), blocks[1])], BLOCK))[0].clone()

    assert torch.equal(both[0], expected)
    assert both[1].isnan().all()
    assert torch.equal(after, expected)


def test_fewer_threads_than_requested_compute_the_whole_step() -> None:
    """OpenMP may provide fewer threads: no row may be assigned to a missing thread."""
    script = """
import torch
from tests.worker.engine.cpu.test_decoder import BLOCK, ElementType, decoder_of, flatten, network_of
from tests.worker.engine.cpu.test_decoder import prompts, row
(ids,) = prompts(50)
rows = [row(ids, 0, 50, [0, 1]), row(ids, 0, 50, [2, 3])]
logits = decoder_of(network_of("llama"), ElementType.FLOAT32, threads=4)(flatten(rows, BLOCK))
print(torch.equal(logits[0], logits[1]), bool(logits.isfinite().all()), bool(logits.any()))
"""
    alone = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_THREAD_LIMIT": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert alone.stdout.split() == ["True", "True", "True"]


def test_a_profile_has_the_share_of_time_of_each_part() -> None:
    decoder = decoder_of(network_of("llama"), ElementType.FLOAT32)

    shares = decoder.profile(flatten([row(prompts(50)[0], 0, 50, [0, 1])], BLOCK))

    assert sum(shares.values()) == pytest.approx(1)
    assert {"attention", "gate and up", "head"} <= shares.keys()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "activation is gelu"),
        ({"hidden_size": 96, "num_attention_heads": 6}, "hidden size 96 is not a multiple of 64"),
        ({"intermediate_size": 160}, "feed-forward size 160"),
        ({"head_dim": 24}, "attention width 96"),
    ],
)
@pytest.mark.skipif(not machine.HAS_VNNI, reason="needs avx512_vnni")
def test_a_model_that_int8_does_not_support_is_rejected_with_the_reason(
    changes: dict[str, Any], reason: str
) -> None:
    config = LlamaConfig(**SIZES | changes)

    assert reason in unsupported_reason("LlamaForCausalLM", config, ElementType.INT8)
    with pytest.raises(UnsupportedModel, match=r"use bfloat16, float32 or auto"):
        choose_precision("int8", "LlamaForCausalLM", config, gpu=False)


def test_other_architectures_use_the_code_of_transformers() -> None:
    config = GemmaConfig(**SIZES)

    for name in ("float32", "bfloat16"):
        assert choose_precision(name, "GemmaForCausalLM", config, gpu=False).element_type is None
    chosen = choose_precision("auto", "GemmaForCausalLM", config, gpu=False)
    assert chosen.name in ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("eight_bits", "sixteen_bits", "chosen"),
    [(True, True, "int8"), (False, True, "bfloat16"), (False, False, "float32")],
)
def test_auto_is_the_format_that_the_cpu_multiplies_in_hardware(
    eight_bits: bool, sixteen_bits: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "HAS_VNNI", eight_bits)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: sixteen_bits)

    precision = choose_precision("auto", "LlamaForCausalLM", LlamaConfig(**SIZES), gpu=False)

    assert precision.name == chosen
    assert precision.element_type is not None


@pytest.mark.parametrize(("name", "gpu"), [("int4", False), ("int8", True)])
def test_an_unsupported_precision_is_rejected(name: str, gpu: bool) -> None:
    with pytest.raises(LoadingError, match=r"bfloat16|float32"):
        choose_precision(name, "LlamaForCausalLM", LlamaConfig(**SIZES), gpu=gpu)

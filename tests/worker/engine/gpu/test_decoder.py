"""The fused decoder compared with transformers, for each supported architecture."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import GemmaConfig, LlamaConfig

from headrace.worker.engine.gpu.decoder import unsupported_reason
from headrace.worker.engine.gpu.kernels.activation import _silu_multiply
from tests.worker.engine.gpu.decoder_cases import NETWORKS, SIZES, Model, cut, network_of, prompts
from tests.worker.engine.gpu.device import DEVICE, DTYPES, needs_cuda
from tests.worker.engine.gpu.model_steps import Part

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@pytest.mark.parametrize(
    ("name", "dtype", "exact"),
    [
        *((name, torch.float32, False) for name in NETWORKS if "wide" not in name),
        ("llama, biases, scaled rotation, heads of 40", torch.float32, True),
        *(("qwen3, groups of 3, heads of 24", half, False) for half in DTYPES[1:]),
        *(("mistral, sliding", half, True) for half in DTYPES[1:]),
    ],
)
@torch.inference_mode()
def test_logits_are_those_of_transformers(name: str, dtype: torch.dtype, exact: bool) -> None:
    network = network_of(name, dtype).float()  # with rounded weights
    ids, other = prompts(10, 5)
    expected = [network(torch.tensor([each], device=DEVICE)).logits[0] for each in (ids, other)]
    model = Model(network_of(name, dtype), exact=exact)

    seen = []
    for part, beside in zip(cut(1, ids, 6, 7, 9, 10), cut(0, other, 2, 3, 4, 5), strict=True):
        mixed = model(beside, part, padding=1)
        seen += [(mixed[0], expected[1][beside.stop - 1]), (mixed[1], expected[0][part.stop - 1])]

    for logits, reference in seen:
        assert (logits.float() - reference).norm() <= TOLERANCE[dtype] * reference.norm()


@needs_cuda
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["wide llama", "wide qwen3"])
@torch.inference_mode()
def test_logits_far_into_a_sequence_are_as_close_to_float32_as_those_of_transformers(
    name: str, dtype: torch.dtype, exact: bool
) -> None:
    ids, other = prompts(600, 300)
    whole = torch.tensor([ids], device=DEVICE)
    network = network_of(name, dtype)
    theirs = network(whole).logits[0].float()
    reference = network.float()(whole).logits[0]  # the same, rounded weights
    model = Model(network_of(name, dtype), exact=exact)

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


def test_the_network_shares_the_weights_of_the_decoder() -> None:
    """Memory holds one copy, and the network stays a reference for what the decoder computes."""
    network = network_of("qwen2, tied")
    network.set_attn_implementation("eager")
    ids = torch.tensor(prompts(9), device=DEVICE)
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
    kernels: Any = type(_silu_multiply)  # compiled or interpreted
    run = kernels.run

    def count(self: Any, *arguments: Any, **options: Any) -> Any:
        launches[self.fn.__name__] += 1
        return run(self, *arguments, **options)

    def products(x: torch.Tensor, other: torch.Tensor, *, out: torch.Tensor) -> None:
        launches["mm"] += 1
        out.copy_(x @ other)

    model = Model(network_of("llama"), exact=exact)
    monkeypatch.setattr(kernels, "run", count)
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

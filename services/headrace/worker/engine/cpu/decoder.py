"""A Llama-like decoder on the CPU that uses `kernels` instead of torch's operators.

`unsupported_reason` decides which models it can compute; the code of transformers computes all others.
Weights come from a network that transformers has loaded. `self_check` compares the results with those of
transformers at each start.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine.cpu.kernels import machine, team
from headrace.worker.engine.cpu.kernels.attend import scratch_bytes, tile_tokens
from headrace.worker.engine.cpu.kernels.decoder_step import (
    COUNTER_BYTES,
    DECODER_LAYER,
    GATED_BYTES,
    GATED_ROWS,
    PARTS,
    PHASES,
    STEP,
    run_step,
)
from headrace.worker.engine.cpu.kernels.matmul import ELEMENT_BYTES, GROUP, PANEL, ElementType
from headrace.worker.engine.cpu.kernels.paging import KernelMemory, Ragged
from headrace.worker.engine.cpu.weight_layout import lay_out
from headrace.worker.engine.flat_step import FlatStep, Longs

Record = npt.NDArray[Any]

_UNSIGNED: dict[int, Any] = {4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}

# Networks that differ from Llama only in biases, norms of queries and keys, and sizes.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def unsupported_reason(architecture: str, config: Any, element_type: ElementType) -> str:
    """Return the reason why a `Decoder` cannot compute a model, or an empty string if it can.

    architecture   class of the model in transformers
    config         its configuration
    """
    if element_type is ElementType.INT8 and not machine.HAS_VNNI:
        return "this CPU has no avx512_vnni"
    if architecture not in ARCHITECTURES:
        return f"{architecture} is not one of {', '.join(ARCHITECTURES)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    divisor = GROUP if element_type is ElementType.INT8 else 32
    sizes = {
        "hidden size": (config.hidden_size, divisor),
        "feed-forward size": (config.intermediate_size, divisor),
        "attention width": (config.num_attention_heads * head, divisor),
        "head dimension": (head, 16),
    }
    reasons = [
        f"its {name} {size} is not a multiple of {by}" for name, (size, by) in sizes.items() if size % by
    ]
    return reasons[0] if reasons else ""


class DecoderWeights:
    """The weights of one network, laid out for the kernels. The network can be freed afterwards.

    network        a network of transformers on the CPU for which `unsupported_reason` is empty
    element_type   number format of its matrix products
    positions      tokens of the longest sequence that is computed
    """

    @torch.inference_mode()
    def __init__(self, network: Any, element_type: ElementType, *, positions: int) -> None:
        config, model = network.config, network.model
        self.element_type = element_type
        self.vocabulary_size = int(network.lm_head.weight.shape[0])
        self.owned: list[Any] = []  # owners of the addresses in the records
        self.layers: Record = np.concatenate([self._layer(layer) for layer in model.layers])
        half = element_type is not ElementType.FLOAT32
        embedding = model.embed_tokens.weight.detach().to(
            torch.bfloat16 if half else torch.float32, copy=True
        )
        step = self.step = np.zeros(1, STEP)
        step["element_type"], step["layers"] = element_type, len(self.layers)
        step["vocabulary"], step["positions"] = len(embedding), positions
        step["hidden"], step["intermediate"] = config.hidden_size, config.intermediate_size
        step["epsilon"] = config.rms_norm_eps
        step["embedding"], step["embedding_half"] = self._keep(embedding), half
        step["final_norm"] = self._vector(model.norm.weight)
        step["head"] = self._matrix([network.lm_head])
        step["cosines"], step["sines"] = self._rotation(model.rotary_emb, positions)

    @classmethod
    def from_records(
        cls, element_type: ElementType, *, vocabulary_size: int, step: Record, layers: Record,
        owned: list[Any],
    ) -> DecoderWeights:  # fmt: skip
        """Make weights that were laid out before.

        step, layers   records of another instance, with addresses in *owned*
        """
        weights = cls.__new__(cls)
        weights.element_type, weights.vocabulary_size = element_type, vocabulary_size
        weights.step, weights.layers, weights.owned = step, layers, owned
        return weights

    def first_layer(self) -> DecoderWeights:
        """Return the model without the layers after the first. The weights are shared."""
        first = copy.copy(self)
        first.layers, first.step = self.layers[:1], self.step.copy()
        first.step["layers"] = 1
        return first

    def _layer(self, layer: Any) -> Record:
        attention, feed_forward = layer.self_attn, layer.mlp
        record: Record = np.zeros(1, DECODER_LAYER)
        record["attention_norm"] = self._vector(layer.input_layernorm.weight)
        record["feed_forward_norm"] = self._vector(layer.post_attention_layernorm.weight)
        if hasattr(attention, "q_norm"):
            record["query_norm"] = self._vector(attention.q_norm.weight)
            record["key_norm"] = self._vector(attention.k_norm.weight)
        record["qkv"] = self._matrix([attention.q_proj, attention.k_proj, attention.v_proj])
        record["output"] = self._matrix([attention.o_proj])
        record["gate_up"] = self._matrix([feed_forward.gate_proj, feed_forward.up_proj])
        record["down"] = self._matrix([feed_forward.down_proj])
        return record

    def _matrix(self, layers: list[Any]) -> Record:
        weights = [layer.weight.detach() for layer in layers]
        biases = [torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
        bias = torch.cat([bias.detach().float() for bias in biases])
        return lay_out(weights, bias, self.element_type, self.owned)

    def _rotation(self, rotary: Any, positions: int) -> tuple[int, int]:
        """Return the addresses of the cosines and sines, computed by the code of the network."""
        cosines, sines = rotary(torch.zeros(1, 1, 1), torch.arange(positions)[None])
        half = cosines.shape[-1] // 2
        return (
            self._keep(cosines[0, :, :half].float().contiguous()),
            self._keep(sines[0, :, :half].float().contiguous()),
        )

    def _vector(self, weight: torch.Tensor) -> int:
        # A copy even of float32: the original may be a view of a whole file mapped into memory.
        return self._keep(weight.detach().to(torch.float32, copy=True).contiguous())

    def _keep(self, tensor: torch.Tensor) -> int:
        self.owned.append(tensor)
        return tensor.data_ptr()


class Decoder:
    """Computes steps: a `Forward` over weights and memory.

    memory    keys and values; every layer is configured, see `KernelMemory.configure_layer`
    threads   number of torch's threads that compute, see `kernels.team`
    """

    def __init__(self, weights: DecoderWeights, memory: KernelMemory, *, threads: int) -> None:
        self._weights, self._memory = weights, memory  # the addresses below point into them
        self._layers = weights.layers.copy()
        for index in range(len(self._layers)):
            self._layers["attention"][index] = memory.record(index)[0]
        own = self._layers["attention"][0]
        heads, kv_heads, head_dim = int(own["heads"]), int(own["kv_heads"]), int(own["head_dim"])
        self._tile_tokens = tile_tokens(heads, kv_heads)
        step = self._step = weights.step.copy()
        step["layer_table"] = machine.address(self._layers)
        hidden, intermediate, width = int(step["hidden"][0]), int(step["intermediate"][0]), heads * head_dim
        longest = max(hidden, intermediate, width)
        scratch = max(scratch_bytes(head_dim, head_dim), 4 * longest, GATED_ROWS * GATED_BYTES)
        scratch = -(-scratch // 64) * 64
        self._scratch = _bytes(scratch * threads)
        step["scratch"], step["scratch_bytes"] = self._scratch.data_ptr(), scratch
        self._counters = np.zeros((len(self._layers) * PHASES + 1, COUNTER_BYTES // 8), np.int64)
        step["counters"] = machine.address(self._counters)
        self._tokens, self._positions = int(step["vocabulary"][0]), int(step["positions"][0])
        self._threads = threads
        self._failures = team.FailureState(threads)
        self._token_bytes = {
            "residual": 4 * hidden,
            "activations": ELEMENT_BYTES[weights.element_type] * longest,
            "scales": 4 * (longest // GROUP + 1),
            "gated": ELEMENT_BYTES[weights.element_type] * intermediate,
            "gated_scales": 4 * (intermediate // GROUP + 1),
            "projected": 4
            * PANEL
            * max(int(self._layers[name]["count"].max()) for name in ("qkv", "gate_up")),
            "attended": 4 * width,
        }
        self._logits = torch.empty(0, 0)
        self._buffer_tokens = 0
        self._buffers: list[torch.Tensor] = []

    def __call__(self, flat: FlatStep) -> torch.Tensor:
        """See `Forward`; logits are float32.

        Raises IndexError for a token, a position or a block that is out of range, and `team.KernelFault`.
        """
        _require_in_range("token", flat.ids, self._tokens)
        _require_in_range("position", flat.positions, self._positions)
        _require_in_range("block", flat.tables, self._memory.blocks)
        self._reserve_buffers(flat.tokens)
        ragged = Ragged(flat, self._tile_tokens)
        step = self._step
        step["ragged"] = ragged.record
        ids = flat.ids.astype(np.int32)
        step["ids"] = machine.address(ids)
        if len(flat.last) > len(self._logits):  # reused: the system would first zero new memory
            self._logits = self._room_for_logits(len(flat.last))
        return self._run(flat.last, self._logits[: len(flat.last)])

    def logits_of(self, places: Longs) -> torch.Tensor:
        """See `Forward`."""
        _require_in_range("place", places, int(self._step["ragged"]["tokens"][0]))
        layers = int(self._step["layers"][0])
        self._step["layers"] = 0
        try:
            return self._run(places, self._room_for_logits(len(places)))
        finally:
            self._step["layers"] = layers

    def _room_for_logits(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, int(self._step["head"]["count"][0]) * PANEL)

    def _run(self, places: Longs, logits: torch.Tensor) -> torch.Tensor:
        """Run the step, with the logits of the tokens at *places*."""
        step, sampled = self._step, places.astype(np.int32)
        step["sampled_tokens"], step["sampled"] = machine.address(sampled), len(places)
        step["logits"] = logits.data_ptr()
        self._counters.fill(0)
        run_step(step, self._threads, self._failures)
        return logits[:, : self._weights.vocabulary_size]

    def profile(self, flat: FlatStep) -> dict[str, float]:
        """Compute a step and return the share of time of each part; see `decoder_step.PARTS`."""
        cycles = np.zeros(len(PARTS) + 1, np.int64)
        self._step["cycles"] = machine.address(cycles)
        try:
            self(flat)
        finally:
            self._step["cycles"] = 0
        spent = cycles[1:-1]  # the start of the first part is not known
        return dict(zip(PARTS[1:], (spent / spent.sum()).tolist(), strict=True))

    def _reserve_buffers(self, tokens: int) -> None:
        if tokens <= self._buffer_tokens:
            return
        self._buffer_tokens = tokens
        self._buffers = [_bytes(size * tokens) for size in self._token_bytes.values()]
        for name, buffer in zip(self._token_bytes, self._buffers, strict=True):
            self._step[name] = buffer.data_ptr()


def _require_in_range(what: str, numbers: npt.NDArray[Any], limit: int) -> None:
    """Raise IndexError unless all *numbers* are from 0 to *limit* - 1."""
    # A negative number is a large one without its sign: one pass instead of two.
    if numbers.size and np.maximum.reduce(numbers.view(_UNSIGNED[numbers.itemsize]), axis=None) >= limit:
        wrong = numbers.max() if numbers.max() >= limit else numbers.min()
        raise IndexError(f"{what} {wrong} is out of range: must be from 0 to {limit - 1}")


def _bytes(size: int) -> torch.Tensor:
    return torch.zeros(-(-size // 64) * 64, dtype=torch.uint8)

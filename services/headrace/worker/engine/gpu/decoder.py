"""Llama-like decoders on CUDA with fused kernels: eight or nine launches per layer instead of some forty.

`unsupported_reason` decides which models it can compute; `network_forward` computes all others. Weights come
from a network that transformers has loaded. The self-check compares the results with those of transformers at
each start.

A layer is: projection to queries, keys and values; norm, rotation and store; attention; output projection;
sum and norm; projection to gates and factors; activation; projection down; sum and norm for the next layer.
The norm before the first layer is part of the embedding kernel. The last norm and the head are computed only
for the last token of each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headrace.worker.engine.gpu.kernels.activation import silu_multiply
from headrace.worker.engine.gpu.kernels.embedding import embed
from headrace.worker.engine.gpu.kernels.matmul import matmul
from headrace.worker.engine.gpu.kernels.norms import add_norm, add_norm_of
from headrace.worker.engine.gpu.kernels.rotary import rotate_and_store
from headrace.worker.engine.gpu.paged_attention import PagedAttention, Scratch
from headrace.worker.engine.gpu.step_inputs import StepInputs
from headrace.worker.engine.kv_memory import PagedMemory
from headrace.worker.engine.transformers_attention import LayerAttention, Masking

# Networks that differ from Llama only in biases, norms of queries and keys, and sizes.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# Rotations whose angles depend on the length of the step, so that no table of them is right for all steps.
_CHANGING_ROTATIONS = ("dynamic", "longrope")


def unsupported_reason(architecture: str, config: Any) -> str:
    """Return the reason why a `GpuDecoder` cannot compute a model, or an empty string if it can.

    architecture   class of the model in transformers
    config         its configuration
    """
    if architecture not in ARCHITECTURES:
        return f"{architecture} is not one of {', '.join(ARCHITECTURES)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    rotation = getattr(config, "rope_parameters", None) or {}
    kind = rotation.get("rope_type", "default")
    if kind in _CHANGING_ROTATIONS:
        return f"its rotation {kind} depends on the length of the sequence"
    if (rotation.get("partial_rotary_factor") or 1.0) != 1.0:
        return "it rotates only a part of each head"
    return ""


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer: weights [columns, depth], contiguous, and a bias [columns] or None."""

    weights: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The weights of one layer, and the parameters of its attention.

    attention_norm      [hidden]; feed_forward_norm too
    qkv                 to queries, keys and values
    query_key_norms     [dim] each, or None
    masking             of its attention
    output              of attention
    gate_up             to gates, then factors
    down                from their products
    """

    attention_norm: torch.Tensor
    qkv: Projection
    query_key_norms: tuple[torch.Tensor, torch.Tensor] | None
    masking: Masking
    output: Projection
    feed_forward_norm: torch.Tensor
    gate_up: Projection
    down: Projection


class GpuDecoderWeights:
    """The weights of one network, arranged for the kernels, in its dtype and on its device.

    network     a network of transformers for which `unsupported_reason` is empty
    layers      the attention of its layers, see `transformers_attention.observe_layers`
    positions   tokens of the longest sequence that is computed; by default, the longest of the model

    Projections with the same input are joined, layer by layer. The network stays usable: its weights become
    views of the joined ones, so memory holds one copy, and during the construction one layer more.
    """

    @torch.no_grad()
    def __init__(
        self, network: Any, layers: Mapping[int, LayerAttention], *, positions: int | None = None
    ) -> None:
        config, model = network.config, network.model
        self.heads = int(config.num_attention_heads)
        self.epsilon = float(config.rms_norm_eps)
        self.embedding: torch.Tensor = model.embed_tokens.weight.detach()
        self.layers = [
            _decoder_layer(layer, layers[index].masking) for index, layer in enumerate(model.layers)
        ]
        self.final_norm: torch.Tensor = model.norm.weight.detach()
        self.head = _join([network.lm_head])  # the embedding, if they are tied
        self.cosines, self.sines = _rotation(model.rotary_emb, positions or config.max_position_embeddings)


def _decoder_layer(layer: Any, masking: Masking) -> DecoderLayer:
    attention, feed_forward = layer.self_attn, layer.mlp
    norms = None
    if hasattr(attention, "q_norm"):
        norms = (attention.q_norm.weight.detach(), attention.k_norm.weight.detach())
    return DecoderLayer(
        attention_norm=layer.input_layernorm.weight.detach(),
        qkv=_join([attention.q_proj, attention.k_proj, attention.v_proj]),
        query_key_norms=norms,
        masking=masking,
        output=_join([attention.o_proj]),
        feed_forward_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_join([feed_forward.gate_proj, feed_forward.up_proj]),
        down=_join([feed_forward.down_proj]),
    )


def _join(linears: Sequence[Any]) -> Projection:
    """Return linear layers with the same input as one projection, and make their weights views of it."""
    weights = [linear.weight.detach() for linear in linears]
    joined = weights[0].contiguous() if len(weights) == 1 else torch.cat(weights)
    begin = 0
    for linear in linears:
        size = len(linear.weight)
        linear.weight.data = joined[begin : begin + size]
        begin += size
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return Projection(joined, None)
    parts = [
        joined.new_zeros(len(part)) if bias is None else bias.detach()
        for part, bias in zip(weights, biases, strict=True)
    ]
    return Projection(joined, torch.cat(parts))


def _rotation(rotary: Any, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines [positions, dim / 2] float32, computed by the code of the network."""
    device = rotary.inv_freq.device
    places = torch.arange(positions, device=device)[None]
    cosines, sines = rotary(torch.zeros(1, 1, 1, device=device), places)
    half = cosines.shape[-1] // 2  # the second half repeats the first
    return cosines[0, :, :half].float().contiguous(), sines[0, :, :half].float().contiguous()


class GpuDecoder:
    """Computes steps over weights and memory; see `DeviceForward`. All work is queued, so it can be captured.

    memory    keys and values of all layers, [kv_heads, dim] for keys and values alike, in the weights' dtype
    tables    [slots, width] int32, the blocks of each slot
    scratch   memory of attention
    exact     compute matrix products so that each row has the same bits in every step
    """

    def __init__(
        self,
        weights: GpuDecoderWeights,
        memory: PagedMemory,
        tables: torch.Tensor,
        scratch: Scratch,
        *,
        exact: bool,
    ) -> None:
        self._weights = weights
        self._memory = memory
        self._tables = tables
        self._scratch = scratch
        self._multiply = _multiply_exactly if exact else _multiply_fast
        self.reserve(0, 0)

    def reserve(self, tokens: int, rows: int) -> None:
        """See `DeviceForward`."""
        # The norm of their sum gives the logits of a token. The first layer begins with them as well.
        embedding, head = self._weights.embedding, self._weights.head.weights
        self._residual, self._projected = embedding.new_empty(2, tokens, embedding.shape[1])
        self._logits = head.new_empty(rows, len(head))

    def __call__(self, ids: torch.Tensor, step: StepInputs) -> torch.Tensor:
        """Store the keys and values of a step's tokens, and compute the logits of each row's last token.

        ids   [tokens] int32

        Returns [rows, vocabulary] in the dtype of the weights.
        """
        weights, multiply, tokens = self._weights, self._multiply, len(ids)
        if tokens > len(self._residual) or len(step.last) > len(self._logits):
            self.reserve(tokens, len(step.last))
        projected = self._projected[:tokens]
        attention = PagedAttention(self._memory, self._tables, step, self._scratch)
        residual, normed = embed(
            ids,
            weights.embedding,
            weights.layers[0].attention_norm,
            weights.epsilon,
            self._residual[:tokens],
        )
        # The same buffers in all layers: a layer reads what it has written.
        first = weights.layers[0]
        qkv, gate_up = (
            residual.new_empty(tokens, len(projection.weights)) for projection in (first.qkv, first.gate_up)
        )
        # Attention does not write padding; zeros keep whatever follows finite.
        attended = residual.new_zeros(tokens, first.output.weights.shape[1])
        activated = residual.new_empty(tokens, first.down.weights.shape[1])
        following = [*weights.layers[1:], None]
        for index, (layer, after) in enumerate(zip(weights.layers, following, strict=True)):
            multiply(normed, layer.qkv, qkv)
            self._attend(index, layer, qkv, step, attention, attended)
            multiply(attended, layer.output, projected)
            add_norm(projected, residual, layer.feed_forward_norm, weights.epsilon, normed)
            multiply(normed, layer.gate_up, gate_up)
            silu_multiply(gate_up, activated)
            multiply(activated, layer.down, projected)
            if after is not None:
                add_norm(projected, residual, after.attention_norm, weights.epsilon, normed)
        logits = self._logits[: len(step.last)]
        self._compute_logits(step.last, logits)
        return logits

    def logits_of(self, places: torch.Tensor) -> torch.Tensor:
        """See `DeviceForward`."""
        logits = self._logits.new_empty(len(places), self._logits.shape[1])
        self._compute_logits(places, logits)
        return logits

    def _compute_logits(self, places: torch.Tensor, logits: torch.Tensor) -> None:
        weights = self._weights
        normed = add_norm_of(places, self._projected, self._residual, weights.final_norm, weights.epsilon)
        self._multiply(normed, weights.head, logits)

    def _attend(
        self,
        index: int,
        layer: DecoderLayer,
        qkv: torch.Tensor,
        step: StepInputs,
        attention: PagedAttention,
        attended: torch.Tensor,
    ) -> None:
        weights, (key_pages, value_pages) = self._weights, self._memory[index]
        rotate_and_store(
            qkv,
            step.positions,
            step.where,
            cosines=weights.cosines,
            sines=weights.sines,
            norms=layer.query_key_norms,
            epsilon=weights.epsilon,
            key_pages=key_pages,
            value_pages=value_pages,
        )
        width = attended.shape[1]
        query = qkv[:, :width].view(len(qkv), weights.heads, -1)
        attention.attend(index, query, layer.masking, attended.view_as(query))


def _multiply_exactly(x: torch.Tensor, projection: Projection, out: torch.Tensor) -> None:
    matmul(x, projection.weights, projection.bias, out)


def _multiply_fast(x: torch.Tensor, projection: Projection, out: torch.Tensor) -> None:
    if projection.bias is None:
        torch.mm(x, projection.weights.t(), out=out)
    else:
        torch.addmm(projection.bias, x, projection.weights.t(), out=out)

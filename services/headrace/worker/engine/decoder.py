"""A decoder of Llama's build on the CPU, without torch's operators: weights laid out for `kernels`.

Reads what it needs from a network that transformers has loaded. `supports` says which networks it can stand
in for; all others go through transformers' own code. That it computes the same is not believed but
checked at each start, by `selfcheck`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine.kernels import attention, forward
from headrace.worker.engine.kernels.matmul import ELEMENT_BYTES, GROUP, MATRIX, PANEL, Kind
from headrace.worker.engine.kernels.paging import PagedMemory, Ragged

Record = npt.NDArray[Any]

# Networks that are Llama's but for biases, norms of queries and keys, and the numbers in their configs.
_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def supports(network: Any, kind: Kind) -> str:
    """Return why `Decoder` cannot compute a network in this kind, or an empty string if it can."""
    config = network.config
    if type(network).__name__ not in _CLASSES:
        return f"{type(network).__name__} is not one of {', '.join(_CLASSES)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    layers = network.model.layers
    first = layers[0].self_attn
    sizes = {
        "hidden size": (config.hidden_size, 32),
        "feed-forward size": (config.intermediate_size, 16),
        "attention width": (config.num_attention_heads * first.head_dim, 32),
        "head dimension": (first.head_dim, 16),
    }
    odd = [f"{name} {size}, not a multiple of {by}" for name, (size, by) in sizes.items() if size % by]
    if odd:
        return f"it has {odd[0]}"
    plain = [m for m in network.modules() if hasattr(m, "weight") and m.weight is not None and m.weight.dim() == 2]
    if any(type(module) not in (torch.nn.Linear, torch.nn.Embedding) for module in plain):
        return "it has linear layers of a class of its own"
    return ""


class Decoder:
    """Computes steps of one network.

    network    a transformers network for which `supports` is empty, in float32 or bfloat16
    kind       what its matrix products are computed in
    memory     where keys and values are kept: bfloat16 or float32
    positions  the longest sequence
    threads    as many as torch's own, whose threads they are

    The network is not needed any more after this.
    """

    @torch.inference_mode()
    def __init__(self, network: Any, kind: Kind, memory: PagedMemory, *, positions: int, threads: int) -> None:
        config, model = network.config, network.model
        self.kind = kind
        self.vocabulary_size = int(network.lm_head.weight.shape[0])
        self._threads = threads
        self._owned: list[torch.Tensor] = []  # what the records' addresses point into
        layers = [self._layer(index, layer, memory) for index, layer in enumerate(model.layers)]
        self._layers: Record = np.concatenate(layers)
        half = network.dtype is not torch.float32 or kind is not Kind.FLOAT32
        embedding = model.embed_tokens.weight.detach().to(torch.bfloat16 if half else torch.float32)
        self._step: Record = np.zeros(1, forward.STEP)
        step = self._step
        step["kind"], step["layers"], step["layer_table"] = kind, len(layers), self._layers.ctypes.data
        step["hidden"], step["inner"] = config.hidden_size, config.intermediate_size
        step["epsilon"] = config.rms_norm_eps
        step["embedding"], step["embedding_half"] = self._keep(embedding), half
        step["final_norm"] = self._vector(model.norm.weight)
        step["head"] = self._matrix([network.lm_head])
        step["cosines"], step["sines"] = self._rotation(model.rotary_emb, positions)
        step["threads"] = threads
        own = self._layers["attention"][0]
        heads, kv_heads, head_dim = int(own["heads"]), int(own["kv_heads"]), int(own["head_dim"])
        self._tile_tokens = attention.tile_tokens(heads, kv_heads)
        self._mixed = heads * head_dim
        widths = [int(self._layers[name]["count"].max()) * PANEL for name in ("qkv", "gate_up")]
        self._wide = max(widths)
        self._longest = max(config.hidden_size, config.intermediate_size, self._mixed)
        scratch = max(attention.scratch_bytes(head_dim, head_dim), 4 * self._longest)
        scratch = -(-scratch // 64) * 64
        step["scratch"], step["scratch_bytes"] = self._keep(_bytes(scratch * threads)), scratch
        self._counters = np.zeros((len(layers) * forward.PHASES + 1, forward.COUNTER_BYTES // 8), np.int64)
        step["counters"] = self._counters.ctypes.data
        self._room_tokens = 0
        self._room: list[torch.Tensor] = []

    def compute(self, ids: npt.NDArray[np.int32], ragged: Ragged, sampled: npt.NDArray[np.int32]) -> torch.Tensor:
        """Compute one step.

        ids       [tokens] of all rows, one after the other
        ragged    where they stand and where their keys and values are
        sampled   [sampled] int32, the tokens whose logits are wanted

        Returns [sampled, vocabulary_size] float32.
        """
        self._make_room(ragged.tokens)
        step = self._step
        step["ragged"] = ragged.record(self._tile_tokens)
        logits = torch.empty(len(sampled), int(step["head"]["count"][0]) * PANEL)
        step["ids"] = ids.ctypes.data
        step["sampled"], step["sampled_tokens"] = len(sampled), sampled.ctypes.data
        step["logits"] = logits.data_ptr()
        self._counters.fill(0)
        forward.compute(step, self._threads)
        return logits[:, : self.vocabulary_size]

    def _make_room(self, tokens: int) -> None:
        if tokens <= self._room_tokens:
            return
        self._room_tokens = tokens
        hidden = int(self._step["hidden"][0])
        sizes = {
            "x": 4 * hidden,
            "packed": ELEMENT_BYTES[self.kind] * self._longest,
            "scales": 4 * (self._longest // GROUP + 1),
            "wide": 4 * self._wide,
            "mixed": 4 * self._mixed,
        }
        self._room = [_bytes(size * tokens) for size in sizes.values()]
        for name, room in zip(sizes, self._room, strict=True):
            self._step[name] = room.data_ptr()

    def _layer(self, index: int, layer: Any, memory: PagedMemory) -> Record:
        attend, feed = layer.self_attn, layer.mlp
        made: Record = np.zeros(1, forward.DECODER_LAYER)
        made["attention_norm"] = self._vector(layer.input_layernorm.weight)
        made["feed_forward_norm"] = self._vector(layer.post_attention_layernorm.weight)
        if hasattr(attend, "q_norm"):
            made["query_norm"] = self._vector(attend.q_norm.weight)
            made["key_norm"] = self._vector(attend.k_norm.weight)
        made["qkv"] = self._matrix([attend.q_proj, attend.k_proj, attend.v_proj])
        made["output"] = self._matrix([attend.o_proj])
        made["gate_up"] = self._matrix([feed.gate_proj, feed.up_proj])
        made["down"] = self._matrix([feed.down_proj])
        dim = attend.head_dim
        made["attention"] = memory.layer(
            index,
            heads=attend.q_proj.out_features // dim,
            kv_heads=attend.k_proj.out_features // dim,
            head_dim=dim,
            value_dim=dim,
            scale=attend.scaling,
            window=getattr(attend, "sliding_window", None) or 0,
        )
        return made

    def _matrix(self, layers: list[Any]) -> Record:
        weights = torch.cat([layer.weight.detach().float() for layer in layers])
        outputs, inputs = weights.shape
        padding = -outputs % PANEL
        weights = torch.nn.functional.pad(weights, (0, 0, 0, padding))
        bias = torch.cat(
            [
                torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().float()
                for layer in layers
            ]
        )
        made: Record = np.zeros(1, MATRIX)
        made["bias"] = self._keep(torch.nn.functional.pad(bias, (0, padding)))
        if self.kind is Kind.INT8:
            scales = weights.abs().amax(dim=1).clamp(min=1e-30) / 127
            made["scales"] = self._keep(scales)
            stored = (weights / scales[:, None]).round().to(torch.int8)
        else:
            stored = weights.to(torch.bfloat16 if self.kind is Kind.BFLOAT16 else torch.float32)
        each = 4 // ELEMENT_BYTES[self.kind]  # elements in a word
        panels = stored.view(-1, 2, 16, inputs // each, each).permute(0, 3, 1, 2, 4).contiguous()
        if self.kind is Kind.INT8:
            groups = inputs // GROUP
            sums = stored.view(-1, PANEL, groups, GROUP).sum(dim=3, dtype=torch.int16).transpose(1, 2)
            sums = sums.contiguous().view(torch.int8)
            panels = torch.cat([sums, panels.view(len(sums), groups, -1)], dim=2)
        made["panels"] = self._keep(panels)
        made["count"], made["words"] = weights.shape[0] // PANEL, inputs // each
        return made

    def _rotation(self, rotary: Any, positions: int) -> tuple[int, int]:
        """Return the addresses of the cosines and sines that the network's own code computes."""
        cosines, sines = rotary(torch.zeros(1, 1, 1), torch.arange(positions)[None])
        half = cosines.shape[-1] // 2
        return (
            self._keep(cosines[0, :, :half].float().contiguous()),
            self._keep(sines[0, :, :half].float().contiguous()),
        )

    def _vector(self, weight: torch.Tensor) -> int:
        return self._keep(weight.detach().float().contiguous())

    def _keep(self, tensor: torch.Tensor) -> int:
        self._owned.append(tensor)
        return tensor.data_ptr()


def _bytes(size: int) -> torch.Tensor:
    return torch.zeros(-(-size // 64) * 64, dtype=torch.uint8)

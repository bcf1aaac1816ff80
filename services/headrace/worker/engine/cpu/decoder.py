"""A decoder of Llama's build on the CPU, without torch's operators: weights laid out for `kernels`.

`refusal` says which models it can stand in for; all others go through transformers' own code. Weights come
from a network that transformers has loaded. That the same is computed is not believed but checked at each
start, by `selfcheck`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine.cpu.kernels import attend as attention
from headrace.worker.engine.cpu.kernels import decoder_step as forward
from headrace.worker.engine.cpu.kernels import machine, team
from headrace.worker.engine.cpu.kernels.matmul import ELEMENT_BYTES, GROUP, MATRIX, PANEL, Kind
from headrace.worker.engine.cpu.kernels.paging import PagedMemory, Ragged
from headrace.worker.engine.flat_step import FlatStep

Record = npt.NDArray[Any]

# Networks that are Llama's but for biases, norms of queries and keys, and the numbers in their configs.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def refusal(architecture: str, config: Any, kind: Kind) -> str:
    """Return why a `Decoder` cannot compute a model, or an empty string if it can.

    architecture   the class that transformers would make
    config         its configuration
    """
    if kind is Kind.INT8 and not machine.HAS_VNNI:
        return "this CPU has no avx512_vnni"
    if architecture not in ARCHITECTURES:
        return f"{architecture} is not one of {', '.join(ARCHITECTURES)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = GROUP if kind is Kind.INT8 else 32
    sizes = {
        "hidden size": (config.hidden_size, each),
        "feed-forward size": (config.intermediate_size, each),
        "attention width": (config.num_attention_heads * head, each),
        "head dimension": (head, 16),
    }
    odd = [f"its {name} {size} is not a multiple of {by}" for name, (size, by) in sizes.items() if size % by]
    return odd[0] if odd else ""


class DecoderWeights:
    """The weights of one network, laid out for the kernels. The network is not needed afterwards.

    network     a transformers network for which `refusal` is empty, on the CPU
    kind        what its matrix products are computed in
    positions   tokens of the longest sequence that will be computed
    """

    @torch.inference_mode()
    def __init__(self, network: Any, kind: Kind, *, positions: int) -> None:
        config, model = network.config, network.model
        self.kind = kind
        self.vocabulary_size = int(network.lm_head.weight.shape[0])
        self._owned: list[torch.Tensor] = []  # what the records' addresses point into
        self.layers: Record = np.concatenate([self._layer(layer) for layer in model.layers])
        half = kind is not Kind.FLOAT32
        embedding = model.embed_tokens.weight.detach().to(
            torch.bfloat16 if half else torch.float32, copy=True
        )
        step = self.step = np.zeros(1, forward.STEP)
        step["kind"], step["layers"] = kind, len(self.layers)
        step["vocabulary"], step["positions"] = len(embedding), positions
        step["hidden"], step["inner"] = config.hidden_size, config.intermediate_size
        step["epsilon"] = config.rms_norm_eps
        step["embedding"], step["embedding_half"] = self._keep(embedding), half
        step["final_norm"] = self._vector(model.norm.weight)
        step["head"] = self._matrix([network.lm_head])
        step["cosines"], step["sines"] = self._rotation(model.rotary_emb, positions)

    def _layer(self, layer: Any) -> Record:
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
        return made

    def _matrix(self, layers: list[Any]) -> Record:
        weights = torch.cat([layer.weight.detach().float() for layer in layers])
        biases = [torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
        return lay_out(weights, torch.cat([bias.detach().float() for bias in biases]), self.kind, self._owned)

    def _rotation(self, rotary: Any, positions: int) -> tuple[int, int]:
        """Return the addresses of the cosines and sines that the network's own code computes."""
        cosines, sines = rotary(torch.zeros(1, 1, 1), torch.arange(positions)[None])
        half = cosines.shape[-1] // 2
        return (
            self._keep(cosines[0, :, :half].float().contiguous()),
            self._keep(sines[0, :, :half].float().contiguous()),
        )

    def _vector(self, weight: torch.Tensor) -> int:
        # A copy, also of float32: the network's own may be a view of a whole file mapped into memory.
        return self._keep(weight.detach().to(torch.float32, copy=True).contiguous())

    def _keep(self, tensor: torch.Tensor) -> int:
        self._owned.append(tensor)
        return tensor.data_ptr()


def lay_out(
    weights: torch.Tensor, bias: torch.Tensor | None, kind: Kind, owned: list[torch.Tensor]
) -> Record:
    """Lay a matrix out as `kernels.matmul` reads it; returns a MATRIX record.

    weights   [out, in] float32; in is a multiple of 4, of 64 for int8
    bias      [out] float32
    owned     gets what the record's addresses point into
    """
    outputs, inputs = weights.shape
    weights = torch.nn.functional.pad(weights, (0, 0, 0, -outputs % PANEL))
    made: Record = np.zeros(1, MATRIX)
    offsets = torch.zeros(len(weights))
    if bias is not None:
        offsets[:outputs] = bias
    owned.append(offsets)
    made["bias"] = offsets.data_ptr()
    if kind is Kind.INT8:
        scales = weights.abs().amax(dim=1).clamp(min=1e-30) / 127
        owned.append(scales)
        made["scales"] = scales.data_ptr()
        stored = (weights / scales[:, None]).round().to(torch.int8)
    else:
        stored = weights.to(torch.bfloat16 if kind is Kind.BFLOAT16 else torch.float32)
    each = 4 // ELEMENT_BYTES[kind]  # elements in a word
    panels = stored.view(-1, 2, 16, inputs // each, each).permute(0, 3, 1, 2, 4).contiguous()
    if kind is Kind.INT8:
        groups = inputs // GROUP
        sums = stored.view(-1, PANEL, groups, GROUP).sum(dim=3, dtype=torch.int16).transpose(1, 2)
        sums = sums.contiguous().view(torch.int8)
        panels = torch.cat([sums, panels.view(len(sums), groups, -1)], dim=2)
    owned.append(panels)
    made["panels"] = panels.data_ptr()
    made["count"], made["words"] = len(weights) // PANEL, inputs // each
    return made


class Decoder:
    """Computes steps: a `Forward` over weights and memory.

    memory    keys and values; `PagedMemory.layer` has been told each layer's shape
    threads   how many compute: of torch's own threads, see `kernels.team`
    """

    def __init__(self, weights: DecoderWeights, memory: PagedMemory, *, threads: int) -> None:
        self._weights, self._memory = weights, memory  # the addresses below point into them
        self._layers = weights.layers.copy()
        for index in range(len(self._layers)):
            self._layers["attention"][index] = memory.told(index)[0]
        own = self._layers["attention"][0]
        heads, kv_heads, head_dim = int(own["heads"]), int(own["kv_heads"]), int(own["head_dim"])
        self._tile_tokens = attention.tile_tokens(heads, kv_heads)
        step = self._step = weights.step.copy()
        step["layer_table"] = self._layers.ctypes.data
        hidden, inner, mixed = int(step["hidden"][0]), int(step["inner"][0]), heads * head_dim
        longest = max(hidden, inner, mixed)
        scratch = max(attention.scratch_bytes(head_dim, head_dim), 4 * longest)
        scratch = -(-scratch // 64) * 64
        self._scratch = _bytes(scratch * threads)
        step["scratch"], step["scratch_bytes"] = self._scratch.data_ptr(), scratch
        self._counters = np.zeros(
            (len(self._layers) * forward.PHASES + 1, forward.COUNTER_BYTES // 8), np.int64
        )
        step["counters"] = self._counters.ctypes.data
        self._threads = threads
        self._watch = team.Watch(threads)
        self._token_bytes = {
            "x": 4 * hidden,
            "packed": ELEMENT_BYTES[weights.kind] * longest,
            "scales": 4 * (longest // GROUP + 1),
            "wide": 4 * PANEL * max(int(self._layers[name]["count"].max()) for name in ("qkv", "gate_up")),
            "mixed": 4 * mixed,
        }
        self._logits = torch.empty(0, 0)
        self._room_tokens = 0
        self._room: list[torch.Tensor] = []

    def __call__(self, flat: FlatStep) -> torch.Tensor:
        """See `Forward`; logits are float32.

        Raises IndexError for a token, a position or a block that there is not, and `team.KernelFault`.
        """
        _check("token", flat.ids, int(self._step["vocabulary"][0]))
        _check("position", flat.positions, int(self._step["positions"][0]))
        _check("block", flat.tables, self._memory.blocks)
        self._make_room(flat.tokens)
        ragged = Ragged(flat.starts, flat.stops - flat.starts, flat.tables)
        step = self._step
        step["ragged"] = ragged.record(self._tile_tokens)
        ids, last = flat.ids.astype(np.int32), flat.last.astype(np.int32)
        if len(last) > len(self._logits):  # kept, for new memory would first have to be zeroed by the system
            self._logits = torch.empty(len(last), int(step["head"]["count"][0]) * PANEL)
        logits = self._logits[: len(last)]
        step["ids"], step["sampled_tokens"] = ids.ctypes.data, last.ctypes.data
        step["sampled"], step["logits"] = len(last), logits.data_ptr()
        self._counters.fill(0)
        forward.compute(step, self._threads, self._watch)
        return logits[:, : self._weights.vocabulary_size]

    def profile(self, flat: FlatStep) -> dict[str, float]:
        """Compute a step and return what share of its time each part took; see `forward.PARTS`."""
        cycles = np.zeros(len(forward.PARTS) + 1, np.int64)
        self._step["cycles"] = cycles.ctypes.data
        try:
            self(flat)
        finally:
            self._step["cycles"] = 0
        spent = cycles[1:-1]  # the first part's begin is not known
        return dict(zip(forward.PARTS[1:], (spent / spent.sum()).tolist(), strict=True))

    def _make_room(self, tokens: int) -> None:
        if tokens <= self._room_tokens:
            return
        self._room_tokens = tokens
        self._room = [_bytes(size * tokens) for size in self._token_bytes.values()]
        for name, room in zip(self._token_bytes, self._room, strict=True):
            self._step[name] = room.data_ptr()


def _check(what: str, numbers: npt.NDArray[Any], limit: int) -> None:
    """Raise IndexError unless all *numbers* are below *limit*, and none below 0."""
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < limit):
        wrong = numbers.max() if numbers.max() >= limit else numbers.min()
        raise IndexError(f"there is no {what} {wrong}, only {limit} from 0 on")


def _bytes(size: int) -> torch.Tensor:
    return torch.zeros(-(-size // 64) * 64, dtype=torch.uint8)

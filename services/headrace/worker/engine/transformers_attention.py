"""Our attention inside transformers' own modelling code.

transformers calls a registered function for a model's attention. Ours receives the queries, keys and values
of *all* tokens of a step, flattened into one row. It checks that the model needs nothing that we would have
to ignore, and passes them to the step's `StepAttention`: `plain_attention`, `kernel_attention` on the CPU or
`paged_attention` on a GPU. Nothing here depends on the model; layers may differ in heads and dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from headrace.worker.engine.kv_memory import LayerShape
from headrace.worker.engine.load.refusals import SEE_MODELS, UnsupportedModel, unsupported_attention

IMPLEMENTATION = "headrace"  # the name of our attention function in transformers

# Arguments that change the attention and that we would have to ignore, with the words for a user.
_UNSUPPORTED_ARGUMENTS = {
    "s_aux": "attention sinks",
    "position_bias": "attention with a bias for each distance",
    "head_mask": "attention with masked heads",
    "block_sequence_ids": "attention inside blocks",
}


@dataclass(frozen=True, slots=True)
class Masking:
    """The parameters of a layer's causal attention.

    scale     multiplies the products of queries and keys
    softcap   bounds those products by softcap x tanh(product / softcap); None for no bound
    window    a token attends to itself and the window - 1 tokens before it; None for all
    """

    scale: float
    softcap: float | None = None
    window: int | None = None


class StepAttention(Protocol):
    """Computes attention in all layers of one step, given the step's rows and their blocks."""

    def __call__(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, masking: Masking
    ) -> torch.Tensor:
        """Store the tokens' keys and values, then compute attention.

        query          [tokens, heads, key_dim], rotated; tokens after the step's own are padding
        keys, values   [tokens, kv_heads, key_dim or value_dim]

        Returns [tokens, heads, value_dim]; finite for padding too.
        """
        ...


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """The attention that a layer was observed to need."""

    shape: LayerShape
    heads: int
    masking: Masking


def register_attention() -> None:
    """Make `paged_attention` known to transformers, and suppress its bars of progress."""
    # It takes seconds to import. Workers whose weights are stored do not need it, see `cpu.stored_model`.
    from transformers import AttentionInterface
    from transformers.utils import logging

    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    headrace_step: StepAttention | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention for transformers; registered as `IMPLEMENTATION`.

    query   [1, heads, tokens, head_dim], rotated; key and value with kv_heads

    Returns [1, tokens, heads, value_dim]. Raises UnsupportedModel if the model needs anything but causal
    attention.
    """
    if headrace_step is None:
        raise unsupported_attention(module)
    unknown = [words for name, words in _UNSUPPORTED_ARGUMENTS.items() if arguments.get(name) is not None]
    if unknown or attention_mask is not None:
        needed = " and ".join(unknown) or "attention with its own mask"
        raise UnsupportedModel(
            f"{type(module).__name__} needs {needed}, which Headrace does not compute; serve it with "
            f"transformers or vLLM, or choose another model: {SEE_MODELS}"
        )
    if not arguments.get("is_causal", getattr(module, "is_causal", True)):
        raise UnsupportedModel(
            f"{type(module).__name__} attends to later tokens: its attention is not causal, so it does not "
            f"generate text token by token; {SEE_MODELS}"
        )
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    out = headrace_step(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        Masking(scale, softcap or None, sliding_window),
    )
    return out[None], None


class _Recorder:
    """Computes no attention, and records what the layers need."""

    def __init__(self) -> None:
        self.seen: dict[int, LayerAttention] = {}

    def __call__(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, masking: Masking
    ) -> torch.Tensor:
        shape = LayerShape(keys.shape[1], keys.shape[2], values.shape[2])
        self.seen[layer] = LayerAttention(shape, query.shape[1], masking)
        return query.new_zeros(*query.shape[:2], values.shape[2])


@torch.inference_mode()
def observe_layers(network: Any) -> dict[int, LayerAttention]:
    """Run a token through a network and record the attention that each of its layers needs.

    Raises UnsupportedModel if a layer does not call our attention, or has a window that it does not pass.
    """
    recorder = _Recorder()
    token = torch.zeros(1, 1, dtype=torch.int64, device=network.device)
    network(input_ids=token, position_ids=token, use_cache=False, headrace_step=recorder)
    config = network.config.get_text_config()
    layers = int(config.num_hidden_layers)
    if recorder.seen.keys() != set(range(layers)):
        if not recorder.seen:
            raise unsupported_attention(network, ", or none at all (recurrent models)")
        raise UnsupportedModel(
            f"{type(network).__name__} has attention that Headrace computes in {len(recorder.seen)} of its "
            f"{layers} "
            "layers; the others (recurrent, convolutions, their own attention code) have a state that paged "
            f"KV memory does not hold; serve it with transformers or vLLM, or choose another model: "
            f"{SEE_MODELS}"
        )
    # The self-check's prompts are shorter than real windows, so it cannot detect a missing one.
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(
                f"{type(network).__name__} needs {kind} in layer {layer}, which Headrace does not compute; "
                f"serve it with transformers or vLLM, or choose another model: {SEE_MODELS}"
            )
        if kind == "sliding_attention" and recorder.seen[layer].masking.window is None:
            raise UnsupportedModel(f"layer {layer} has sliding attention without a window size")
    return recorder.seen

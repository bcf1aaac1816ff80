"""Compute the steps of any network of transformers on CUDA: its own code, with our attention.

`decoder` computes the common architectures, in a fifth of the kernel launches.
"""

from __future__ import annotations

from typing import Any

import torch

from headrace.worker.engine.forward import NetworkHead, scores_prompts
from headrace.worker.engine.gpu.kernels.matmul import matmul
from headrace.worker.engine.gpu.paged_attention import PagedAttention, Scratch
from headrace.worker.engine.gpu.step_inputs import StepInputs
from headrace.worker.engine.kv_memory import PagedMemory


class NetworkForward:
    """Computes steps of a network over its memory; see `DeviceForward`.

    network   a causal language model in evaluation mode whose attention is
              `transformers_attention.IMPLEMENTATION`
    memory    keys and values of all layers
    tables    [slots, width] int32, the blocks of each slot
    scratch   memory of attention

    The steps of some networks cannot be captured, because their code waits for the device.
    """

    def __init__(self, network: Any, memory: PagedMemory, tables: torch.Tensor, scratch: Scratch) -> None:
        self._network = network
        self._memory = memory
        self._tables = tables
        self._scratch = scratch
        self._head = NetworkHead(network) if scores_prompts(network) else None
        self.reserve(0, 0)

    def reserve(self, tokens: int, rows: int) -> None:
        """See `DeviceForward`."""
        self._tokens, self._rows = tokens, rows
        # Their sizes and dtypes are those of the first results.
        self._hidden: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None

    def __call__(self, ids: torch.Tensor, step: StepInputs) -> torch.Tensor:
        """Store the keys and values of a step's tokens, and compute the logits of each row's last token.

        ids   [tokens] int32

        Returns [rows, vocabulary].
        """
        logits: torch.Tensor = self._network(
            input_ids=ids[None].long(),
            position_ids=step.positions[None].long(),
            use_cache=False,
            logits_to_keep=step.last.long(),
            headrace_step=PagedAttention(self._memory, self._tables, step, self._scratch),
        ).logits[0]
        self._keep(logits)
        assert self._logits is not None
        return self._logits[: len(logits)]

    def logits_of(self, places: torch.Tensor) -> torch.Tensor:
        """See `DeviceForward`."""
        assert self._head is not None
        assert self._hidden is not None
        return self._head.logits(self._hidden, places.long())

    def _keep(self, logits: torch.Tensor) -> None:
        """Copy logits and hidden states, which a graph overwrites, to fixed addresses."""
        if self._logits is None or len(logits) > len(self._logits):
            self._logits = logits.new_empty(max(self._rows, len(logits)), logits.shape[1])
        self._logits[: len(logits)] = logits
        if self._head is not None:
            hidden = self._head.hidden
            tokens = hidden.shape[1]
            if self._hidden is None or tokens > self._hidden.shape[1]:
                self._hidden = hidden.new_empty(1, max(self._tokens, tokens), hidden.shape[2])
            self._hidden[:, :tokens] = hidden


class ExactLinear(torch.nn.Module):
    """Replaces a linear layer by one whose rows have the same bits in every step; see `kernels.matmul`.

    Shares the weights of the layer that it replaces.
    """

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows @ weights + bias; rows [..., in_features], with any strides."""
        flat = rows.reshape(-1, self.in_features)
        if flat.stride(1) != 1:  # a transposed view, as of a convolution's result
            flat = flat.contiguous()
        return matmul(flat, self.weight, self.bias).view(*rows.shape[:-1], self.out_features)


def make_exact(network: Any) -> bool:
    """Replace the plain linear layers of a network by exact ones.

    Returns whether all linear layers were replaced. What is not a `torch.nn.Linear` is not counted, so only
    the self-check can show that a network is batch-invariant. Layers of a subclass are kept, because they may
    compute something else, and so are those that do not have the dtype of the network.
    """
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear and layer.weight.dtype is network.dtype:
                layer.weight.data = layer.weight.data.contiguous()
                setattr(parent, name, ExactLinear(layer))
    return not any(isinstance(module, torch.nn.Linear) for module in network.modules())

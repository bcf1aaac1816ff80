"""Pack the linear layers of a network into oneDNN's layout once, for the CPU.

A plain linear layer passes its weights in rows, and oneDNN packs them again at each call. With weights packed
in advance, few rows are two to four times as fast: 896 x 9728 takes 151 us instead of 573 for one row in
bfloat16, 655 instead of 2,389 in float32 (torch 2.13, two threads of Zen 4). The packed kernels are also
batch-invariant, which the plain ones are not; see `MIN_TOKENS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# The fewest tokens of a step of packed layers whose rows are bit-identical to those of larger steps. Measured
# with the shapes of the default models and up to 128 rows; a worker checks itself at start.
MIN_TOKENS = {torch.float32: 2, torch.bfloat16: 2}

_PROBE_ROWS = 4
# Relative error: packed layers may add in another order.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


# Layers of one parent that have the same input, in the order in which models call them.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class PackedLinear(torch.nn.Module):
    """Replaces one or more linear layers by one, with weights packed for oneDNN.

    Returns their concatenated results, [..., sum of out_features]. Some models also read the weights of
    their layers (the dtype of a router, for example): `weight` and `bias` are those of `torch.nn.Linear`.
    """

    def __init__(self, *plain: torch.nn.Linear) -> None:
        super().__init__()
        weights = torch.cat([layer.weight.detach() for layer in plain])
        biases = [layer.bias for layer in plain if layer.bias is not None]
        self.in_features = plain[0].in_features
        self.out_features = weights.shape[0]
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weights, None)
        self._bias = torch.cat([bias.detach() for bias in biases]) if biases else None

    @property
    def weight(self) -> torch.Tensor:
        """The weights in rows, [out_features, in_features]; a new copy at each access."""
        return self._packed.to_dense()

    @property
    def bias(self) -> torch.Tensor | None:
        """The biases, [out_features], or None."""
        return self._bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows @ weights + bias; rows [..., in_features]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return out


class _SharedLinear:
    """Layers with the same input, computed together: the first call computes the results of all of them.

    Reading small matrices one by one is slow: with 7 calls per layer, a step of SmolLM2 takes one and a half
    times as long as with 4.
    """

    def __init__(self, together: PackedLinear) -> None:
        self._together = together
        self._rows: torch.Tensor | None = None
        self._out: torch.Tensor | None = None

    @property
    def together(self) -> PackedLinear:
        """The packed layer that computes all results."""
        return self._together

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the results for these rows; a second call with the same tensor reuses the results."""
        if self._out is None or rows is not self._rows:
            self._rows, self._out = rows, self._together(rows)
        return self._out

    def forget(self) -> None:
        """Release the last rows and their results."""
        self._rows = self._out = None


class _Sibling(torch.nn.Module):
    """Returns the columns of one layer of a `_SharedLinear`. The last layer releases the results."""

    def __init__(self, shared: _SharedLinear, columns: slice, *, last: bool) -> None:
        super().__init__()
        self._shared = shared
        self._columns = columns
        self._last = last
        self.in_features = shared.together.in_features
        self.out_features = columns.stop - columns.start

    @property
    def weight(self) -> torch.Tensor:
        """The weights of this layer; see `PackedLinear.weight`."""
        return self._shared.together.weight[self._columns]

    @property
    def bias(self) -> torch.Tensor | None:
        """The biases of this layer."""
        biases = self._shared.together.bias
        return None if biases is None else biases[self._columns]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the columns of this layer; rows [..., in_features]."""
        out = self._shared.compute(rows)[..., self._columns]
        if self._last:
            self._shared.forget()
        return out


@torch.inference_mode()
def pack_linears(network: Any) -> bool:
    """Replace the plain linear layers of a network on the CPU by packed ones, and free their weights.

    Returns whether all linear layers were replaced. Layers are kept in dtypes that oneDNN does not pack on
    this CPU, if they are of a subclass, which may compute something else, and if the packed results differ
    from the plain ones.
    """
    if not _packs(network.dtype):
        return False
    for parent in list(network.modules()):
        for names in _SIBLINGS:
            _pack_siblings(parent, names)
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear and _packs(layer.weight.dtype):
                packed = PackedLinear(layer)
                if _agrees(packed, [layer]):
                    setattr(parent, name, packed)
    return not any(isinstance(module, torch.nn.Linear) for module in network.modules())


def _packs(dtype: torch.dtype) -> bool:
    """Whether layers of a dtype are packed on this CPU: in bfloat16 that needs AVX-512."""
    if dtype not in MIN_TOKENS or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype is not torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack_siblings(parent: torch.nn.Module, names: tuple[str, ...]) -> None:
    """Pack layers of *parent* together if it has all of them, with equal input sizes and dtypes."""
    layers = [getattr(parent, name, None) for name in names]
    plain = [layer for layer in layers if type(layer) is torch.nn.Linear]
    signatures = {(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in plain}
    if len(plain) != len(names) or len(signatures) != 1 or not _packs(plain[0].weight.dtype):
        return
    packed = PackedLinear(*plain)
    if not _agrees(packed, plain):
        return
    shared, begin = _SharedLinear(packed), 0
    for name, layer in zip(names, plain, strict=True):
        columns = slice(begin, begin + layer.out_features)
        setattr(parent, name, _Sibling(shared, columns, last=name == names[-1]))
        begin = columns.stop


def _agrees(packed: PackedLinear, plain: Sequence[torch.nn.Linear]) -> bool:
    random = torch.Generator().manual_seed(0)
    dtype = plain[0].weight.dtype
    rows = torch.randn(_PROBE_ROWS, packed.in_features, generator=random).to(dtype)
    expected = torch.cat([layer(rows) for layer in plain], dim=-1).double()
    return bool((packed(rows).double() - expected).norm() <= _TOLERANCE[dtype] * expected.norm())

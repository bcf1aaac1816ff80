"""Lay a network's matrices out once as oneDNN wants them, for the CPU.

A plain linear layer hands its weights over in rows, and oneDNN lays them out anew at each call. Laid out
once, few rows are two to four times as fast: 896 x 9728 takes 151 us instead of 573 for one row in
bfloat16, 655 instead of 2,389 in float32 (torch 2.13, two threads of Zen 4). The packed kernels also give
a row the same bits in any batch, which the plain ones do not; see `MIN_TOKENS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Tokens that a step of packed layers must have at least, for its rows to come out bitwise the same as in
# larger ones. Measured with the default models' shapes and up to 128 rows; a worker tests itself at start.
MIN_TOKENS = {torch.float32: 2, torch.bfloat16: 2}

_PROBE_ROWS = 4
# Share of the norm: both orders of addition are right.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


# Layers of one parent that are given the same rows, in the order in which models call them.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class PackedLinear(torch.nn.Module):
    """Linear layers whose weights oneDNN has laid out; computes what those it is made from did.

    Returns their results side by side, [..., sum of out_features]. Some models read the weights of their
    layers beside calling them (a router's dtype, say): `weight` and `bias` are those of `torch.nn.Linear`.
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
        """The weights in rows, [out_features, in_features]: a copy, made anew each time."""
        return self._packed.to_dense()

    @property
    def bias(self) -> torch.Tensor | None:
        """The biases, [out_features], or None."""
        return self._bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows @ weights + bias; rows [..., in_features]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return out


class _Shared:
    """Siblings that compute together: the first that is given some rows computes for all of them.

    Small matrices are read from memory slowly one by one: 7 calls a layer make a step of SmolLM2 take
    half as long again as 4.
    """

    def __init__(self, together: PackedLinear) -> None:
        self._together = together
        self._rows: torch.Tensor | None = None
        self._out: torch.Tensor | None = None

    @property
    def together(self) -> PackedLinear:
        """The layer that computes for all."""
        return self._together

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        """Compute for these rows, or return what was computed for the very same tensor."""
        if self._out is None or rows is not self._rows:
            self._rows, self._out = rows, self._together(rows)
        return self._out

    def forget(self) -> None:
        """Let go of the last rows and what was computed for them."""
        self._rows = self._out = None


class _Sibling(torch.nn.Module):
    """One layer's share of what its siblings compute together. The last of them lets go of it."""

    def __init__(self, shared: _Shared, columns: slice, *, last: bool) -> None:
        super().__init__()
        self._shared = shared
        self._columns = columns
        self._last = last
        self.in_features = shared.together.in_features
        self.out_features = columns.stop - columns.start

    @property
    def weight(self) -> torch.Tensor:
        """The layer's own weights; see `PackedLinear.weight`."""
        return self._shared.together.weight[self._columns]

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's own biases."""
        biases = self._shared.together.bias
        return None if biases is None else biases[self._columns]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the layer's own columns; rows [..., in_features]."""
        out = self._shared.compute(rows)[..., self._columns]
        if self._last:
            self._shared.forget()
        return out


@torch.inference_mode()
def pack_linears(network: Any) -> bool:
    """Replace the plain linear layers of a network on the CPU; their own weights are freed.

    Returns whether all of them were: not where oneDNN is missing, for other dtypes than float32 and
    bfloat16, and for layers of other classes, which may mean something else. A layer whose packed results
    are not those of the plain one stays as it is.
    """
    if network.dtype not in MIN_TOKENS or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if network.dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    for parent in list(network.modules()):
        for names in _SIBLINGS:
            _pack_siblings(parent, names)
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear and layer.weight.dtype in MIN_TOKENS:
                packed = PackedLinear(layer)
                if _same(packed, [layer]):
                    setattr(parent, name, packed)
    return not any(isinstance(module, torch.nn.Linear) for module in network.modules())


def _pack_siblings(parent: torch.nn.Module, names: tuple[str, ...]) -> None:
    """Pack layers of *parent* together if it has them all and they are alike."""
    layers = [getattr(parent, name, None) for name in names]
    plain = [layer for layer in layers if type(layer) is torch.nn.Linear]
    alike = {(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in plain}
    if len(plain) != len(names) or len(alike) != 1 or plain[0].weight.dtype not in MIN_TOKENS:
        return
    packed = PackedLinear(*plain)
    if not _same(packed, plain):
        return
    shared, begin = _Shared(packed), 0
    for name, layer in zip(names, plain, strict=True):
        columns = slice(begin, begin + layer.out_features)
        setattr(parent, name, _Sibling(shared, columns, last=name == names[-1]))
        begin = columns.stop


def _same(packed: PackedLinear, plain: Sequence[torch.nn.Linear]) -> bool:
    random = torch.Generator().manual_seed(0)
    dtype = plain[0].weight.dtype
    rows = torch.randn(_PROBE_ROWS, packed.in_features, generator=random).to(dtype)
    expected = torch.cat([layer(rows) for layer in plain], dim=-1).double()
    return bool((packed(rows).double() - expected).norm() <= _TOLERANCE[dtype] * expected.norm())

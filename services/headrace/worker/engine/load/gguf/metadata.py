"""The metadata of a gguf file, which records the keys that were read, so that unread ones can be rejected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel

# Keys that do not change results: provenance, tokenizer, and the method of quantisation.
_HARMLESS = ("GGUF.", "general.", "tokenizer.", "quantize.", "imatrix.", "mradermacher.", "split.")
_REQUIRED = object()

Factors = npt.NDArray[np.float64]


class Metadata:
    """The metadata of one file, with a record of the keys that were read.

    values   all keys and their values
    tensors  shapes by name, in torch's order
    factors  tensors with rope scaling factors, by name; in effect they are metadata
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, tuple[int, ...]],
        factors: Mapping[str, Factors] | None = None,
    ) -> None:
        self.values = values
        self.tensors = tensors
        self.factors = factors or {}
        self.architecture = str(values.get("general.architecture", ""))
        self._read: set[str] = set()

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a value of the architecture by name. Raises LoadingError if it has none and no default."""
        key = f"{self.architecture}.{name}"
        self._read.add(key)
        if key in self.values:
            value = self.values[key]
            if isinstance(value, float) and not math.isfinite(value):
                raise LoadingError(
                    f"its metadata has {value} for {key}; the file is damaged: download it again"
                )
            return value
        if default is _REQUIRED:
            raise LoadingError(f"its metadata lacks {key}; the file is damaged, or was converted incorrectly")
        return default

    def count(self, name: str, default: Any = _REQUIRED) -> int:
        """Return a number that is the same for all layers. Raises UnsupportedModel if layers differ."""
        value = self.get(name, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModel(
                    f"{self.architecture}.{name} differs between layers, which is not supported"
                )
            value = value[0]
        if not isinstance(value, int) or value < 1:
            raise LoadingError(f"{self.architecture}.{name} is {value!r}, but must be an integer above 0")
        return value

    def allow(self, name: str, *neutral: Any) -> None:
        """Accept a key that is not used, but only with values that do not change results."""
        value = self.get(name, neutral[0])
        if value not in neutral:
            raise UnsupportedModel(f"{self.architecture}.{name} is {value}, which is not supported")

    def reject_unread(self) -> None:
        """Raise UnsupportedModel if a key of the model has not been read."""
        unread = [key for key in self.values if key not in self._read and not key.startswith(_HARMLESS)]
        if unread:
            raise UnsupportedModel(
                f"its metadata has {', '.join(sorted(unread)[:5])}, which Headrace does not support; "
                f"ignoring it could change the model's answers"
            )

"""The metadata of a gguf file, which remembers what was read of it; what is left over is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel

# Keys that change no number of the model: who made the file, its tokenizer, and how it was quantised.
_HARMLESS = ("GGUF.", "general.", "tokenizer.", "quantize.", "imatrix.", "mradermacher.", "split.")
_REQUIRED = object()

Factors = npt.NDArray[np.float64]


class Metadata:
    """The metadata of one file: remembers which keys were read.

    values   all keys and their values
    tensors  shapes by name, in torch's order
    factors  tensors of factors that scale the rotation, by name; they belong to the metadata in all but form
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
        """Return the architecture's value of that name. Raises LoadingError if it has none and needs one."""
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
            raise LoadingError(f"its metadata lacks {key}; the file is damaged, or was converted wrongly")
        return default

    def count(self, name: str, default: Any = _REQUIRED) -> int:
        """Return a number that every layer shares. Raises UnsupportedModel where layers differ."""
        value = self.get(name, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModel(
                    f"{self.architecture}.{name} differs between layers, which is not read"
                )
            value = value[0]
        if not isinstance(value, int) or value < 1:
            raise LoadingError(f"{self.architecture}.{name} is {value!r}, which is not a number above 0")
        return value

    def allow(self, name: str, *neutral: Any) -> None:
        """Accept a key that is not used, but only at values that leave the numbers as they are."""
        value = self.get(name, neutral[0])
        if value not in neutral:
            raise UnsupportedModel(f"{self.architecture}.{name} is {value}, which Headrace does not compute")

    def refuse_unread(self) -> None:
        """Raise UnsupportedModel if the file says something about the model that nobody read."""
        unread = [key for key in self.values if key not in self._read and not key.startswith(_HARMLESS)]
        if unread:
            raise UnsupportedModel(
                f"its metadata has {', '.join(sorted(unread)[:5])}, which Headrace does not read; "
                f"leaving that out could change the model's answers"
            )

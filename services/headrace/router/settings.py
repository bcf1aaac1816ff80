"""What the router can be told, by flags or HEADRACE_* variables."""

from __future__ import annotations

from pydantic import Field, model_validator

from headrace.router.policy import thresholds as evenly
from headrace.runtime.settings import ServiceSettings


class Settings(ServiceSettings):
    """The router: scores each prompt and sends it to the smallest tier that will answer it well."""

    port: int = Field(default=50051, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    tiers: str = Field(
        description="the tiers and their batchers, smallest first, such as "
        "small=127.0.0.1:50061,large=127.0.0.1:50062; several batchers of a tier with + between them, or as "
        "a name that has an address for each, such as small=dns:///batcher-small:50052"
    )
    thresholds: str = Field(
        default="",
        description="the lowest score, 0 to 1, of each tier after the first, such as 0.5 for two tiers; "
        "default evenly spaced",
    )
    default_deadline: float = Field(
        default=120.0, gt=0, description="seconds for requests that come without a deadline"
    )
    poll_seconds: float = Field(default=1.0, gt=0, description="pause between looks at a batcher's health")
    stall_seconds: float = Field(
        default=5.0,
        gt=0,
        description="a batcher that is silent for so long is taken for lost, though its connection stands",
    )
    resume_seconds: float = Field(
        default=10.0,
        ge=0,
        description="how long an answer that lost its batcher waits for another one of its tier",
    )

    @model_validator(mode="after")
    def _usable(self) -> Settings:
        names = [name for name, _ in self.tier_targets()]
        if len(set(names)) != len(names):
            raise ValueError(f"HEADRACE_TIERS={self.tiers!r} (or --tiers) names a tier twice")
        self.tier_thresholds()
        return self

    def tier_targets(self) -> list[tuple[str, list[str]]]:
        """(name, its batchers' targets) of each tier, smallest first. Raises ValueError."""
        pairs = []
        for part in filter(None, (part.strip() for part in self.tiers.split(","))):
            name, separator, listed = part.partition("=")
            targets = [target.strip() for target in listed.split("+")]
            if not (name and separator and all(targets)):
                raise ValueError(f"HEADRACE_TIERS (or --tiers): {part!r} is not NAME=TARGET[+TARGET...]")
            pairs.append((name.strip(), targets))
        if not pairs:
            raise ValueError("HEADRACE_TIERS (or --tiers) names no tier")
        return pairs

    def tier_thresholds(self) -> list[float]:
        """The threshold of each tier; the first is 0. Raises ValueError."""
        count = len(self.tier_targets())
        if not self.thresholds.strip():
            return evenly(count)
        try:
            values = [0.0, *(float(part) for part in self.thresholds.split(","))]
        except ValueError:
            raise ValueError(
                f"HEADRACE_THRESHOLDS={self.thresholds!r} (or --thresholds) is not numbers with commas"
            ) from None
        if len(values) != count or values != sorted(values) or values[-1] > 1:
            raise ValueError(
                f"HEADRACE_THRESHOLDS={self.thresholds!r} (or --thresholds) must be {count - 1} ascending "
                "numbers from 0 to 1, one per tier after the first"
            )
        return values

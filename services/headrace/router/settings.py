"""What the router can be told, by flags or HEADRACE_* variables."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import Field, model_validator

from headrace.channel import target_problem
from headrace.routing.calibration import are_thresholds
from headrace.routing.policy import Price
from headrace.routing.policy import thresholds as evenly
from headrace.runtime.settings import ServiceSettings


class Settings(ServiceSettings):
    """The router: scores each prompt and sends it to the smallest tier that will answer it well.

    Each flag may be given as a variable instead: HEADRACE_TIERS is --tiers. Flags win.
    """

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
    calibration: Path | None = Field(
        default=None,
        description="file of thresholds that `headrace calibrate` wrote, in place of --thresholds; read "
        "again when it changes",
    )
    share: str = Field(
        default="",
        description="share of calls, 0 to 1, of each tier after the first, such as 0.3: the thresholds then "
        "follow the traffic so that it is held; a --calibration beside it gives the scores to begin with",
    )
    prices: str = Field(
        default="",
        description="what a million tokens cost, as NAME=PROMPT/COMPLETION[/CACHED_PROMPT] with commas, in "
        "any one currency, such as small=0.05/0.10,large=0.50/1.50/0.05; the third is for tokens of a prompt "
        "that were found computed already, which otherwise cost as much as the rest of it",
    )
    scorer: Path | None = Field(
        default=None, description="artifact of the score that `headrace train` wrote; none: what is shipped"
    )
    draft_check: Path | None = Field(
        default=None, description="artifact of the check of drafts; none: what is shipped"
    )
    cascade: bool = Field(
        default=False,
        description="hold a smaller tier's answer back, judge it, and give it up for a larger tier's where "
        "it is not good enough; a request's own hint goes before",
    )
    cascade_from: float = Field(
        default=0.0, ge=0, le=1, description="prompts that score lower are answered unjudged"
    )
    cascade_release: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="the lowest probability of being good enough that a draft is released with",
    )
    draft_tokens: int = Field(
        default=96, ge=1, description="a draft that is longer is judged when it has so many tokens"
    )
    cascade_sample_seconds: float = Field(
        default=0.0,
        ge=0,
        description="have the tier give a second, sampled answer beside each draft that is judged, and hold "
        "against the draft that they differ; a draft waits for it so long at most. Its tokens are billed as "
        "waste. 0: none",
    )
    session_idle_seconds: float = Field(
        default=600.0,
        ge=0,
        description="a conversation that was idle for longer may go to a smaller tier again",
    )
    feedback: Path | None = Field(
        default=None,
        description="file that keeps prompts and what Feedback says of their answers; none: prompts are kept "
        "nowhere",
    )
    feedback_megabytes: float = Field(
        default=64.0, gt=0, description="size at which that file makes room; one older one is kept beside it"
    )
    feedback_per_minute: int = Field(
        default=600,
        ge=1,
        description="outcomes that one tenant may report by Feedback within a minute, and within an hour as "
        "many as fill a quarter of the file; more are refused with a delay",
    )
    connection_streams: int = Field(
        default=256,
        ge=16,
        description="calls that one connection may have open; clients wait with what is more",
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
    wait_seconds: float = Field(
        default=3.0,
        ge=0,
        description="how long a request that no tier can take waits if one could until a moment ago, as in a "
        "restart",
    )

    @model_validator(mode="after")
    def _usable(self) -> Settings:
        names = [name for name, _ in self.tier_targets()]
        if len(set(names)) != len(names):
            raise ValueError(f"HEADRACE_TIERS={self.tiers!r} (or --tiers) names a tier twice")
        self.tier_thresholds()
        self.tier_shares()
        self.tier_prices()
        return self

    def tier_targets(self) -> list[tuple[str, list[str]]]:
        """(name, its batchers' targets) of each tier, smallest first. Raises ValueError."""
        pairs = []
        for part in filter(None, (part.strip() for part in self.tiers.split(","))):
            name, separator, listed = part.partition("=")
            targets = [target.strip() for target in listed.split("+")]
            if not (name and separator and all(targets)):
                raise ValueError(f"HEADRACE_TIERS (or --tiers): {part!r} is not NAME=TARGET[+TARGET...]")
            if problem := next(filter(None, map(target_problem, targets)), ""):
                raise ValueError(f"HEADRACE_TIERS (or --tiers): {problem}")
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
        if not are_thresholds(values, count):
            raise ValueError(
                f"HEADRACE_THRESHOLDS={self.thresholds!r} (or --thresholds) must be {count - 1} ascending "
                "numbers from 0 to 1, one per tier after the first"
            )
        return values

    def tier_shares(self) -> list[float]:
        """The wanted share of each tier after the first; empty: none. Raises ValueError."""
        count = len(self.tier_targets()) - 1
        if not self.share.strip():
            return []
        try:
            values = [float(part) for part in self.share.split(",")]
        except ValueError:
            values = []
        if len(values) != count or not all(0 <= value <= 1 for value in values) or sum(values) > 1 + 1e-9:
            raise ValueError(
                f"HEADRACE_SHARE={self.share!r} (or --share) must be {count} numbers from 0 to 1, one per "
                "tier after the first, which add up to at most 1"
            )
        return values

    def tier_prices(self) -> dict[str, Price]:
        """The price of each tier that has one. Raises ValueError."""
        names = [name for name, _ in self.tier_targets()]
        prices = {}
        for part in filter(None, (part.strip() for part in self.prices.split(","))):
            name, _, listed = part.partition("=")
            try:
                values = [float(value) for value in listed.split("/")]
            except ValueError:
                values = []
            if len(values) not in (2, 3):
                raise ValueError(
                    f"HEADRACE_PRICES (or --prices): {part!r} is not NAME=PROMPT/COMPLETION[/CACHED_PROMPT]"
                )
            if name not in names or not all(math.isfinite(value) and value >= 0 for value in values):
                raise ValueError(
                    f"HEADRACE_PRICES (or --prices): {part!r} must name one of the tiers "
                    f"{', '.join(names)} and prices of 0 or more"
                )
            prices[name] = Price(*values)
        return prices

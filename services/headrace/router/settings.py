"""The router's settings: flags and HEADRACE_* variables."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from headrace.channel import target_problem
from headrace.router.changes.settings import ChangeSettings
from headrace.routing.calibration import are_thresholds
from headrace.routing.scoring.score import Objective
from headrace.routing.tier_view import Price, even_thresholds
from headrace.runtime.settings import CalledServiceSettings, ConcurrentStreams, ConnectionAge, Port


class _TierSettings(CalledServiceSettings):
    """The settings of the router about tiers, decisions, feedback and quotas: in --help, they come first."""

    port: Port = 50051
    processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="processes that listen on the port, each of which uses up to one core; each connection "
        "is served by one of them. More than 1 needs Linux",
    )
    tiers: str = Field(
        description="the tiers and their batchers, smallest first, such as "
        "small=127.0.0.1:50061,large=127.0.0.1:50062; several batchers of a tier are separated by +, or "
        "share a DNS name with one address each, such as small=dns:///batcher-small:50052"
    )
    thresholds: str = Field(
        default="",
        description="the lowest score, 0 to 1, of each tier after the first, such as 0.5 for two tiers; "
        "evenly spaced by default",
    )
    calibration: Path | None = Field(
        default=None,
        description="file of thresholds that `headrace calibrate` wrote, in place of --thresholds; it is "
        "read again when it changes",
    )
    share: str = Field(
        default="",
        description="share of calls, 0 to 1, of each tier after the first, such as 0.3: the thresholds are "
        "adapted to the traffic to keep it; a --calibration beside it provides the initial scores",
    )
    choose_by: Literal["auto", "score", "success"] = Field(
        default="auto",
        description="score: by the thresholds of the tiers; success: by each tier's chance of a good answer "
        "and its cost, which needs a --scorer with the outcomes of all tiers; auto: success with such a "
        "scorer unless --share, --thresholds or --calibration is set, else score",
    )
    cost_weight: float = Field(
        default=0.1,
        ge=0,
        allow_inf_nan=False,
        description="when choosing by success, how much higher a tier's chance of a good answer must be to "
        "be worth the typical cost of an answer of the most expensive tier; for requests with a quality "
        "preference of 0.5",
    )
    budget_per_day: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="when choosing by success, what all requests may cost per day (UTC), in the currency of "
        "--prices: the weight of cost is adapted to keep it",
    )
    prices: str = Field(
        default="",
        description="price of a million tokens per tier, as NAME=PROMPT/COMPLETION[/CACHED_PROMPT] separated "
        "by commas, in any currency, such as small=0.05/0.10,large=0.50/1.50/0.05; the third price is for "
        "cached prompt tokens, which otherwise cost as much as other prompt tokens",
    )
    scorer: Path | None = Field(
        default=None,
        description="scorer that `headrace train` wrote, in place of the shipped one; it is read again when "
        "it changes",
    )
    objective: Objective = Field(
        default="both",
        description="what a larger tier shall gain: `correctness`, `preference` (answers that people like "
        "better) or `both`; it moves open requests, such as advice and writing, against the rest. A refitted "
        "scorer ignores it",
    )
    draft_check: Path | None = Field(
        default=None, description="weights of the draft check; the shipped ones by default"
    )
    cascade: bool = Field(
        default=False,
        description="hold back the answer of a smaller tier, check it, and replace it with a larger tier's "
        "answer if it is not good enough; a hint in the request takes precedence",
    )
    cascade_min_score: float = Field(
        default=0.0, ge=0, le=1, description="answers to prompts with a lower score are not checked"
    )
    cascade_min_quality: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="the lowest probability of being good enough at which a held-back answer is released",
    )
    cascade_draft_tokens: int = Field(
        default=96, ge=1, description="a longer held-back answer is checked when it has this many tokens"
    )
    cascade_sample_seconds: float = Field(
        default=0.0,
        ge=0,
        description="request a second, sampled answer for each one that is held back, and trust the first "
        "less if they differ; it waits at most this long for the second. The tokens of the second are billed "
        "as waste. 0 requests none",
    )
    session_idle_seconds: float = Field(
        default=600.0,
        ge=0,
        description="a conversation that was idle for longer is forgotten, and may return to a smaller tier",
    )
    feedback: Path | None = Field(
        default=None,
        description="file for prompts and the outcomes that callers report with Feedback; without it, "
        "prompts are not stored",
    )
    feedback_megabytes: float = Field(
        default=64.0, gt=0, description="size at which the file is rotated; one older file is kept"
    )
    feedback_per_minute: int = Field(
        default=600,
        ge=1,
        description="outcomes that one tenant may report per minute, and per hour as many as fill a quarter "
        "of the file; further ones are rejected with a retry delay",
    )
    quotas: Path | None = Field(
        default=None,
        description="file of limits per tenant, in TOML or JSON, which is read again when it changes: "
        "requests and tokens per minute, concurrent streams, cost per day, highest priority",
    )
    quotas_shadow: bool = Field(
        default=False,
        description="admit requests over a limit of --quotas, and only count and log them",
    )
    quota_peers: str = Field(
        default="",
        description="targets of all routers that share the limits of --quotas, this one included, separated "
        "by commas, such as dns:///router:50051; by default each router applies them alone",
    )
    max_concurrent_streams: ConcurrentStreams = 256
    metrics_tenants: int = Field(
        default=20,
        ge=0,
        le=150,
        description="most tenants that metrics name; those that appear later are counted together, as other",
    )
    # gRPC clients resolve a name at most every 30 s, and use the result for their next connection but one. So
    # they have evened out over a changed set of routers within two ages: within a minute.
    max_connection_age: ConnectionAge = 25.0
    default_deadline: float = Field(
        default=120.0, gt=0, description="seconds for requests without a deadline"
    )
    poll_seconds: float = Field(default=1.0, gt=0, description="pause between polls of a batcher's health")
    stall_seconds: float = Field(
        default=5.0,
        gt=0,
        description="a batcher that sends nothing for this long is considered lost, even if its connection "
        "is open",
    )
    failover_seconds: float = Field(
        default=10.0,
        ge=0,
        description="how long an answer that lost its batcher waits for another one of its tier",
    )
    tier_wait_seconds: float = Field(
        default=3.0,
        ge=0,
        description="how long a request that no tier can serve waits for a tier that was healthy until "
        "recently, for example during a restart",
    )


class Settings(ChangeSettings, _TierSettings):
    """The router: scores each prompt and sends it to the smallest tier that will answer it well.

    Each flag can also be given as a variable: HEADRACE_TIERS is --tiers. Flags take precedence.
    """

    @model_validator(mode="after")
    def _usable(self) -> Settings:
        names = [name for name, _ in self.tier_targets()]
        if len(set(names)) != len(names):
            raise ValueError(f"HEADRACE_TIERS={self.tiers!r} (or --tiers) names a tier twice")
        self.tier_thresholds()
        self.check_exploration(self.tier_shares())
        prices = self.tier_prices()
        if self.choose_by == "success" and self._thresholds_set:
            raise ValueError(
                "HEADRACE_CHOOSE_BY=success (or --choose-by success) uses no thresholds: remove --share, "
                "--thresholds and --calibration, or choose by score"
            )
        if self.budget_per_day is not None and not (len(prices) == len(names) and self.chooses_by_success):
            raise ValueError(
                "HEADRACE_BUDGET_PER_DAY (or --budget-per-day) needs the price of each tier in --prices, and "
                "a choice by success, without --choose-by score, --share, --thresholds and --calibration"
            )
        if self.cost_weight != type(self).model_fields["cost_weight"].default and not self.chooses_by_success:
            raise ValueError(
                "HEADRACE_COST_WEIGHT (or --cost-weight) needs a choice by success, without --choose-by "
                "score, --share, --thresholds and --calibration"
            )
        if self.budget_per_day is not None and not self.cost_weight:
            raise ValueError("HEADRACE_BUDGET_PER_DAY (or --budget-per-day) needs a --cost-weight above 0")
        self.check_shadow(names, prices)
        self.check_canary(
            calibrated=self.calibration is not None, shared=bool(self.tier_shares()), priced=bool(prices)
        )
        if self.quotas is None and (self.quota_peers.strip() or self.quotas_shadow):
            raise ValueError(
                "HEADRACE_QUOTA_PEERS and HEADRACE_QUOTAS_SHADOW need HEADRACE_QUOTAS (or --quotas)"
            )
        self.quota_targets()
        self.check_decision_log(self.feedback)
        if self.processes > 1 and sys.platform != "linux":
            raise ValueError("HEADRACE_PROCESSES (or --processes) above 1 needs Linux: run several routers")
        if self.metrics_port + self.processes > 65536:
            raise ValueError(
                f"HEADRACE_METRICS_PORT={self.metrics_port} (or --metrics-port) leaves no ports above it for "
                f"the endpoints of {self.processes} processes"
            )
        return self

    @property
    def _thresholds_set(self) -> bool:
        return bool(self.share.strip() or self.thresholds.strip() or self.calibration is not None)

    @property
    def chooses_by_success(self) -> bool:
        """Whether tiers are chosen by their chance of success if the scorer estimates it."""
        return self.choose_by == "success" or (self.choose_by == "auto" and not self._thresholds_set)

    @property
    def needs_outcomes(self) -> bool:
        """Whether the scorer must have the outcomes of all tiers, because they are to decide."""
        return self.choose_by == "success" or self.budget_per_day is not None

    def tier_targets(self) -> list[tuple[str, list[str]]]:
        """Return (name, its batchers' targets) of each tier, smallest first. Raises ValueError."""
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

    def quota_targets(self) -> list[str]:
        """Return the targets of the routers that share the limits. Raises ValueError."""
        targets = [part.strip() for part in self.quota_peers.split(",") if part.strip()]
        if problem := next(filter(None, map(target_problem, targets)), ""):
            raise ValueError(f"HEADRACE_QUOTA_PEERS (or --quota-peers): {problem}")
        return targets

    def tier_thresholds(self) -> list[float]:
        """Return the threshold of each tier; the first is 0. Raises ValueError."""
        count = len(self.tier_targets())
        if not self.thresholds.strip():
            return even_thresholds(count)
        try:
            values = [0.0, *(float(part) for part in self.thresholds.split(","))]
        except ValueError:
            raise ValueError(
                f"HEADRACE_THRESHOLDS={self.thresholds!r} (or --thresholds) is not numbers"
            ) from None
        if not are_thresholds(values, count):
            raise ValueError(
                f"HEADRACE_THRESHOLDS={self.thresholds!r} (or --thresholds) must be {count - 1} ascending "
                "numbers from 0 to 1, one per tier after the first"
            )
        return values

    def tier_shares(self) -> list[float]:
        """Return the share of each tier after the first; empty if none is set. Raises ValueError."""
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
        """Return the price of each tier that has one. Raises ValueError."""

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

"""The settings of what watches and changes the routing: exploration, decision log, canary and shadow."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import BaseModel, Field

_OF_THE_SHADOW = ("shadow_share", "shadow_per_minute", "shadow_concurrency", "shadow_cost_per_day", "judge")


class ChangeSettings(BaseModel):
    """The settings of the router that belong to changes of its routing."""

    explore: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of requests without pins, 0 to 1, such as 0.01, whose tier is drawn at random, so "
        "that `headrace replay` can estimate the results of other decisions",
    )
    decision_log: Path | None = Field(
        default=None,
        description="file for one row per request: score, features, tier and its probability, outcome and "
        "cost, for `headrace replay`; ratings are rows of their own",
    )
    decision_log_megabytes: float = Field(
        default=256.0, gt=0, description="size at which that file is rotated; one older file is kept"
    )
    decision_log_text: bool = Field(
        default=False,
        description="store prompts and conversations in --decision-log, so that `headrace replay` can "
        "score them with scorers that read other features",
    )
    canary: str = Field(
        default="",
        description="candidate scorer and the share of requests that it scores, above 0 and below 1, such as "
        "scorer.json:0.1; it is rolled back when its answers are rated worse, fail more often or cost more. "
        "The file is read again when it changes",
    )
    canary_calibration: Path | None = Field(
        default=None,
        description="calibration of the scorer of --canary, which needs one if --calibration is set without "
        "--share; it is read again when it changes",
    )
    canary_cost: float = Field(
        default=0.0,
        ge=0,
        description="roll a canary back if its requests cost more on average than this many times those of "
        "the scorer in use, such as 1.2, at the prices of --prices; 0 does not compare costs",
    )
    shadow_tier: str = Field(
        default="",
        description="tier that answers a sample of requests again, after their callers have the answers of "
        "other tiers",
    )
    shadow_scorer: Path | None = Field(
        default=None,
        description="in place of --shadow-tier, a scorer that `headrace train` wrote: requests are answered "
        "again by the tier that it would have chosen, if that is another one",
    )
    shadow_calibration: Path | None = Field(
        default=None,
        description="thresholds of --shadow-scorer, or other thresholds for the scorer in use; by default "
        "those of --thresholds or --share",
    )
    shadow_share: float = Field(
        default=0.02, ge=0, le=1, description="share of answered requests in that sample, 0 to 1"
    )
    shadow_per_minute: float = Field(
        default=60.0, gt=0, description="most requests per minute that are answered again"
    )
    shadow_concurrency: int = Field(
        default=2, ge=1, description="most requests that are answered again at the same time"
    )
    shadow_cost_per_day: float = Field(
        default=0.0,
        ge=0,
        description="most cost per day (UTC) of these answers and of the judge, at the configured prices; 0 "
        "for no limit",
    )
    judge: str = Field(
        default="",
        description="how both answers are compared: rules (what the draft check finds), exact (their final "
        "results), or the name of a tier whose model compares them; not at all by default",
    )

    @property
    def shadows(self) -> bool:
        """Whether a sample of requests is answered again."""
        return bool(self.shadow_tier or self.shadow_scorer or self.shadow_calibration)

    def check_decision_log(self, feedback: Path | None) -> None:
        """Raise ValueError if the settings of the decision log cannot be used.

        feedback   the other file of rows
        """
        if self.decision_log is None:
            if self.decision_log_text:
                raise ValueError("HEADRACE_DECISION_LOG_TEXT needs HEADRACE_DECISION_LOG (or --decision-log)")
            return
        if feedback is not None and _files(self.decision_log) & _files(feedback):
            raise ValueError(
                f"HEADRACE_DECISION_LOG={str(self.decision_log)!r} (or --decision-log) and "
                f"HEADRACE_FEEDBACK={str(feedback)!r} use the same file (a full FILE is renamed to FILE.1): "
                "choose two names"
            )

    def check_shadow(self, names: Sequence[str], priced: Collection[str]) -> None:
        """Raise ValueError if the settings of the shadow cannot be used.

        names    of the tiers
        priced   those that have a price
        """
        if not self.shadows and (unused := list(filter(self._is_changed, _OF_THE_SHADOW))):
            listed = " and ".join(f"HEADRACE_{name.upper()}" for name in unused)
            raise ValueError(
                f"{listed} {'needs' if len(unused) == 1 else 'need'} HEADRACE_SHADOW_TIER (or "
                "--shadow-tier), HEADRACE_SHADOW_SCORER or HEADRACE_SHADOW_CALIBRATION"
            )
        if self.shadow_tier and (self.shadow_scorer or self.shadow_calibration):
            raise ValueError(
                "HEADRACE_SHADOW_TIER (or --shadow-tier) excludes HEADRACE_SHADOW_SCORER and "
                "HEADRACE_SHADOW_CALIBRATION: set one choice"
            )
        if self.shadow_tier and self.shadow_tier not in names:
            raise ValueError(
                f"HEADRACE_SHADOW_TIER={self.shadow_tier!r} (or --shadow-tier) must be one of the tiers "
                f"{', '.join(names)}"
            )
        if self.judge and self.judge not in ("rules", "exact", *names):
            raise ValueError(
                f"HEADRACE_JUDGE={self.judge!r} (or --judge) must be rules, exact, or one of the tiers "
                f"{', '.join(names)}"
            )
        used = {self.shadow_tier} if self.shadow_tier else set(names)
        unpriced = (used | ({self.judge} & set(names))) - set(priced)
        if self.shadows and self.shadow_cost_per_day and unpriced:
            raise ValueError(
                "HEADRACE_SHADOW_COST_PER_DAY (or --shadow-cost-per-day) needs the price of each tier that "
                f"may be used: add {', '.join(sorted(unpriced))} to HEADRACE_PRICES"
            )

    def _is_changed(self, name: str) -> bool:
        """Whether a setting differs from its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def canary_scorer(self) -> tuple[Path, float] | None:
        """Return the file of the candidate scorer and its share of requests. Raises ValueError."""
        if not self.canary.strip():
            return None
        path, _, share = self.canary.strip().rpartition(":")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not path or not 0 < value < 1:
            raise ValueError(
                f"HEADRACE_CANARY={self.canary!r} (or --canary) is not FILE:SHARE with a share above 0 and "
                "below 1, such as scorer.json:0.1"
            )
        return Path(path), value

    def check_exploration(self, shares: Sequence[float]) -> None:
        """Raise ValueError if more requests would go to a tier by chance than its share of all.

        shares   of each tier after the first; empty if none are kept
        """
        drawn = self.explore / (len(shares) + 1)
        if shares and drawn > min(1 - sum(shares), *shares) + 1e-9:
            raise ValueError(
                f"HEADRACE_EXPLORE={self.explore:g} (or --explore) sends {drawn:.2g} of the requests to each "
                "tier, which is more than a share of HEADRACE_SHARE (or --share): lower it"
            )

    def check_canary(self, *, calibrated: bool, shared: bool, priced: bool) -> None:
        """Raise ValueError if the settings of the canary cannot be used.

        calibrated   whether the scorer in use has a calibration
        shared       whether shares are kept
        priced       whether tiers have prices
        """
        if self.canary_scorer() is None:
            if self.canary_calibration is not None or self.canary_cost:
                raise ValueError(
                    "HEADRACE_CANARY_CALIBRATION and HEADRACE_CANARY_COST need HEADRACE_CANARY (or --canary)"
                )
        elif calibrated and not shared and self.canary_calibration is None:
            raise ValueError(
                "HEADRACE_CANARY (or --canary) needs HEADRACE_CANARY_CALIBRATION: the thresholds of "
                "HEADRACE_CALIBRATION are those of another scorer. Or set HEADRACE_SHARE"
            )
        if self.canary_cost and not priced:
            raise ValueError("HEADRACE_CANARY_COST (or --canary-cost) needs HEADRACE_PRICES (or --prices)")


def _files(path: Path) -> set[Path]:
    """Return the files that a file of rows uses; see `RowFile`."""
    return {path.resolve(), path.with_name(path.name + ".1").resolve()}

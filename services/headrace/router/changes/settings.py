"""Check the router's settings of changes to the routing: canary and shadow answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.router.settings import Settings


def candidate_of(canary: str) -> tuple[Path, float] | None:
    """Return the file and the share of `FILE:SHARE`; None if it is empty. Raises ValueError."""
    if not canary.strip():
        return None
    path, _, share = canary.strip().rpartition(":")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not path or not 0 < value < 1:
        raise ValueError(
            f"HEADRACE_CANARY={canary!r} (or --canary) is not FILE:SHARE with a share above 0 and "
            "below 1, such as scorer.json:0.1"
        )
    return Path(path), value


def check_canary(settings: Settings) -> None:
    """Raise ValueError if the settings of the canary cannot be used."""
    if settings.canary_scorer() is None:
        if settings.canary_calibration is not None or settings.canary_cost:
            raise ValueError(
                "HEADRACE_CANARY_CALIBRATION and HEADRACE_CANARY_COST need HEADRACE_CANARY (or --canary)"
            )
    elif (
        settings.calibration is not None
        and not settings.tier_shares()
        and settings.canary_calibration is None
    ):
        raise ValueError(
            "HEADRACE_CANARY (or --canary) needs HEADRACE_CANARY_CALIBRATION: the thresholds of "
            "HEADRACE_CALIBRATION are those of another scorer. Or set HEADRACE_SHARE"
        )
    if settings.canary_cost and not settings.tier_prices():
        raise ValueError("HEADRACE_CANARY_COST (or --canary-cost) needs HEADRACE_PRICES (or --prices)")


def check_shadow(settings: Settings, names: list[str]) -> None:
    """Raise ValueError if the settings of the shadow cannot be used."""
    if settings.judge and not settings.shadows:
        raise ValueError("HEADRACE_JUDGE needs HEADRACE_SHADOW_TIER or HEADRACE_SHADOW_SCORER")
    if settings.shadow_tier and (settings.shadow_scorer or settings.shadow_calibration):
        raise ValueError(
            "HEADRACE_SHADOW_TIER (or --shadow-tier) excludes HEADRACE_SHADOW_SCORER and "
            "HEADRACE_SHADOW_CALIBRATION: set one choice"
        )
    if settings.shadow_tier and settings.shadow_tier not in names:
        raise ValueError(
            f"HEADRACE_SHADOW_TIER={settings.shadow_tier!r} (or --shadow-tier) must be one of the tiers "
            f"{', '.join(names)}"
        )
    if settings.judge and settings.judge not in ("rules", "exact", *names):
        raise ValueError(
            f"HEADRACE_JUDGE={settings.judge!r} (or --judge) must be rules, exact, or one of the tiers "
            f"{', '.join(names)}"
        )
    used = {settings.shadow_tier} if settings.shadow_tier else set(names)
    unpriced = (used | ({settings.judge} & set(names))) - settings.tier_prices().keys()
    if settings.shadows and settings.shadow_cost_per_day and unpriced:
        raise ValueError(
            "HEADRACE_SHADOW_COST_PER_DAY (or --shadow-cost-per-day) needs the price of each tier that "
            f"may be used: add {', '.join(sorted(unpriced))} to HEADRACE_PRICES"
        )

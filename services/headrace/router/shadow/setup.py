"""Create the shadow from the router's settings."""

from __future__ import annotations

import math

from headrace.router.changes.answered import Watchers
from headrace.router.changes.scorer_files import ScorerFiles
from headrace.router.costs.weighing import Weighing
from headrace.router.settings import Settings
from headrace.router.shadow.bounds import Bounds
from headrace.router.shadow.judge import judge_named
from headrace.router.shadow.own_requests import OwnRequests
from headrace.router.shadow.shadow import Candidate, Choice, FixedTier, Shadow
from headrace.router.state.feedback import Feedback
from headrace.router.state.thresholds import Thresholds
from headrace.router.state.tiers import Tiers
from headrace.routing.drafts.check import DraftChecker


def create_shadow(
    settings: Settings,
    tiers: Tiers,
    checker: DraftChecker,
    feedback: Feedback,
    watchers: Watchers,
    weighing: Weighing | None = None,
) -> Shadow | None:
    """Create the shadow and add it to *watchers*; None if no other choice is configured.

    weighing   of expected quality and cost; None: tiers are chosen by score

    Raises BadArtifact and BadCalibration.
    """
    if not settings.shadows:
        return None
    own = OwnRequests(tiers, settings.tier_prices(), seconds=settings.default_deadline)
    shadow = Shadow(
        tiers,
        _choice(settings, tiers, weighing),
        own,
        Bounds(
            per_minute=settings.shadow_per_minute / settings.processes,
            concurrency=max(settings.shadow_concurrency // settings.processes, 1),
            cost_per_day=settings.shadow_cost_per_day / settings.processes or math.inf,
        ),
        judge_named(settings.judge, checker, own),
        feedback,
        watchers,
        share=settings.shadow_share,
    )
    watchers.add(shadow)
    return shadow


def _choice(settings: Settings, tiers: Tiers, weighing: Weighing | None) -> Choice:
    if settings.shadow_tier:
        return FixedTier(settings.shadow_tier)
    names, shares = [tier.name for tier in tiers.tiers], settings.tier_shares()
    files = ScorerFiles(
        settings.shadow_scorer or settings.scorer,
        settings.shadow_calibration,
        tiers=names,
        shares=bool(shares),
        objective=settings.objective,
    )
    thresholds = Thresholds(settings.tier_thresholds(), shares=shares)
    thresholds.use(files.loaded.calibration)
    candidate = None if settings.shadow_scorer is None else files.loaded.scorer
    return Candidate(candidate, thresholds, adapted=bool(shares), weighing=weighing)

"""Create the shadow from the router's settings."""

from __future__ import annotations

import math

from headrace.router.changes.answered import Watchers
from headrace.router.settings import Settings
from headrace.router.shadow.bounds import Bounds
from headrace.router.shadow.judge import judge_named
from headrace.router.shadow.own_requests import OwnRequests
from headrace.router.shadow.shadow import Candidate, Choice, FixedTier, Shadow
from headrace.router.state.feedback import Feedback
from headrace.router.state.thresholds import Thresholds
from headrace.router.state.tiers import Tiers
from headrace.routing.drafts.check import DraftChecker
from headrace.routing.scoring import scorer
from headrace.routing.scoring.score import Scorer, fingerprint


def create_shadow(
    settings: Settings,
    tiers: Tiers,
    scores: Scorer,
    checker: DraftChecker,
    feedback: Feedback,
    watchers: Watchers,
) -> Shadow | None:
    """Create the shadow and add it to *watchers*; None if no other choice is configured.

    scores   the scorer in use

    Raises BadArtifact and BadCalibration.
    """
    if not settings.shadows:
        return None
    own = OwnRequests(tiers, settings.tier_prices(), seconds=settings.default_deadline)
    shadow = Shadow(
        tiers,
        _choice(settings, tiers, scores),
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


def _choice(settings: Settings, tiers: Tiers, scores: Scorer) -> Choice:
    if settings.shadow_tier:
        return FixedTier(settings.shadow_tier)
    candidate = None if settings.shadow_scorer is None else scorer.load(settings.shadow_scorer)
    shares = settings.tier_shares()
    thresholds = Thresholds(
        [tier.name for tier in tiers.tiers],
        settings.tier_thresholds(),
        path=settings.shadow_calibration,
        scorer=fingerprint(scores if candidate is None else candidate),
        shares=shares,
    )
    return Candidate(candidate, thresholds, adapted=bool(shares))

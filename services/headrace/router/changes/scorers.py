"""Score requests with the scorer in use or with a candidate, and change to new files while requests arrive.

Scorer and thresholds of an arm change together, between two requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from headrace.metrics import changes
from headrace.router.changes.canary import CANARY, NAMES, Canary
from headrace.router.changes.scorer_files import Loaded, ScorerFiles
from headrace.router.optional import optional
from headrace.router.state.thresholds import CONTROL, Thresholds
from headrace.routing.scoring.conversation import Earlier, Turn
from headrace.routing.scoring.score import Score

log = logging.getLogger(__name__)


class Scorers:
    """The scorer in use, and perhaps a candidate.

    control      files of the scorer in use
    thresholds   which follow the scorers
    candidate    files of the candidate; None: there is none
    canary       decides which requests the candidate scores; needed with *candidate*
    """

    def __init__(
        self,
        control: ScorerFiles,
        thresholds: Thresholds,
        *,
        candidate: ScorerFiles | None = None,
        canary: Canary | None = None,
    ) -> None:
        self._files = {CONTROL: control}
        if candidate is not None:
            self._files[CANARY] = candidate
        self._loaded: dict[str, Loaded] = {}
        self._thresholds = thresholds
        self._canary = canary
        for arm in self._files:
            self._use(arm)

    def arm_of(self, tenant: str, session: str, request_id: str = "") -> str:
        """Return the arm of a request; see `RoutingRequest.arm`."""
        return CONTROL if self._canary is None else self._canary.arm_of(tenant, session, request_id)

    def fingerprint(self, arm: str = CONTROL) -> str:
        """Return the fingerprint of the scorer of an arm."""
        return self._loaded[arm].fingerprint

    def score_turns(
        self, turns: Sequence[Turn], earlier: Earlier | None = None, *, arm: str = CONTROL
    ) -> Score:
        """See `Scorer.score_turns`."""
        return self._loaded[arm].scorer.score_turns(turns, earlier)

    async def watch(self, poll_seconds: float) -> None:
        """Poll the files until cancelled."""
        while True:
            await asyncio.sleep(poll_seconds)
            for arm in self._files:
                with optional("scorer"):
                    await self.refresh(arm)

    async def refresh(self, arm: str = CONTROL) -> None:
        """Read the files of an arm again if they have changed."""
        files = self._files[arm]
        if not files.changed:
            return
        if (verdict := await asyncio.to_thread(files.read)) == "same":
            return
        changes.SCORER_READS.of(arm=NAMES[arm], verdict=verdict).add()
        if verdict == "used":
            self._use(arm)

    def _use(self, arm: str) -> None:
        """Use what the files of an arm have now, and compare the arms anew."""
        before, now = self._loaded.get(arm), self._files[arm].loaded
        self._loaded[arm] = now
        same_scorer = before is not None and before.fingerprint == now.fingerprint
        if before is None or not same_scorer or before.calibration != now.calibration:
            self._thresholds.use(now.calibration, arm)
        if self._canary is not None and CANARY in self._loaded:
            self._canary.restart(self._loaded[CANARY].identity, self._loaded[CONTROL].identity)
        if before is None:
            return
        if before.content != now.content:
            log.info("scorer read", extra={"arm": NAMES[arm], "fingerprint": now.fingerprint})
        if now.calibration is not None and before.calibration != now.calibration:
            thresholds, rows = self._thresholds.now(arm), now.calibration.rows
            log.info("calibration read", extra={"arm": NAMES[arm], "thresholds": thresholds, "rows": rows})

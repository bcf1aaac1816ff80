"""Remember which tier each conversation has reached. Plain bookkeeping; the caller brings the clock."""

from __future__ import annotations

from collections import OrderedDict


class Sessions:
    """The tiers that conversations have reached; the ones used longest ago are forgotten first.

    limit         conversations that are remembered
    idle_seconds  after so long without a request a conversation begins anew
    """

    def __init__(self, *, limit: int = 10_000, idle_seconds: float = 600.0) -> None:
        self._limit = limit
        self._idle_seconds = idle_seconds
        self._reached: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._reached)

    def reached(self, tenant: str, session: str, now: float) -> str:
        """The tier that the conversation has reached; empty if none, or if it was idle too long."""
        if not session:
            return ""
        tier, used = self._reached.get((tenant, session), ("", now))
        return tier if now - used <= self._idle_seconds else ""

    def note(self, tenant: str, session: str, tier: str, now: float) -> None:
        """Book that the conversation is now at *tier*, its highest."""
        if not session:
            return
        self._reached[tenant, session] = (tier, now)
        self._reached.move_to_end((tenant, session))
        while len(self._reached) > self._limit:
            self._reached.popitem(last=False)

"""Remember which tier each conversation has reached. Plain bookkeeping; the caller brings the clock."""

from __future__ import annotations

from headrace.router.state.tenant_memory import Memory


class Sessions:
    """The tiers that conversations have reached.

    limit         conversations that are remembered; beyond it the tenant that has most of them forgets its
                  oldest, so nobody's are lost to another's new ones
    idle_seconds  after so long without a request a conversation begins anew
    """

    def __init__(self, *, limit: int = 10_000, idle_seconds: float = 600.0) -> None:
        self._idle_seconds = idle_seconds
        self._reached: Memory[tuple[str, float]] = Memory(limit)

    def __len__(self) -> int:
        return len(self._reached)

    def reached(self, tenant: str, session: str, now: float) -> str:
        """The tier that the conversation has reached; empty if none, or if it was idle too long."""
        if not session:
            return ""
        tier, used = self._reached.get(tenant, session) or ("", now)
        return tier if now - used <= self._idle_seconds else ""

    def note(self, tenant: str, session: str, tier: str, now: float) -> None:
        """Book that the conversation is now at *tier*, its highest."""
        if session:
            self._reached.put(tenant, session, (tier, now))

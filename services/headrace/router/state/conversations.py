"""Keep the tier that each conversation has reached. The caller passes the time."""

from __future__ import annotations

from headrace.router.state.tenant_memory import TenantMemory


class Conversations:
    """The tiers that conversations have reached.

    limit         number of conversations that are kept; beyond it, the tenant with the most loses its oldest,
                  so no tenant's new conversations displace another tenant's
    idle_seconds  a conversation that was idle for longer starts again
    """

    def __init__(self, *, limit: int = 10_000, idle_seconds: float = 600.0) -> None:
        self._idle_seconds = idle_seconds
        self._reached: TenantMemory[tuple[str, float]] = TenantMemory(limit)

    def __len__(self) -> int:
        return len(self._reached)

    def reached(self, tenant: str, session: str, now: float) -> str:
        """Return the tier that the conversation has reached; empty if none, or if it was idle too long."""
        if not session:
            return ""
        tier, used = self._reached.get(tenant, session) or ("", now)
        return tier if now - used <= self._idle_seconds else ""

    def record(self, tenant: str, session: str, tier: str, now: float) -> None:
        """Record that the conversation is now at *tier*, its highest."""
        if session:
            self._reached.put(tenant, session, (tier, now))

"""Keep what the router remembers of each conversation. The caller passes the time."""

from __future__ import annotations

from headrace.router.state.tenant_memory import TenantMemory
from headrace.routing.scoring.conversation import Earlier


class Conversations:
    """The last score of each conversation, and the tier that it has reached.

    limit         number of conversations that are kept; beyond it, the tenant with the most loses its oldest,
                  so no tenant's new conversations displace another tenant's
    idle_seconds  a conversation that was idle for longer starts again
    """

    def __init__(self, *, limit: int = 10_000, idle_seconds: float = 600.0) -> None:
        self._idle_seconds = idle_seconds
        self._earlier: TenantMemory[tuple[Earlier, float]] = TenantMemory(limit)

    def __len__(self) -> int:
        return len(self._earlier)

    def earlier(self, tenant: str, session: str, now: float) -> Earlier | None:
        """Return what is known of the conversation; None if nothing, or if it was idle too long."""
        found = self._earlier.get(tenant, session) if session else None
        return found[0] if found is not None and now - found[1] <= self._idle_seconds else None

    def reached(self, tenant: str, session: str, now: float) -> str:
        """Return the tier that the conversation has reached; empty if none, or if it was idle too long."""
        earlier = self.earlier(tenant, session, now)
        return "" if earlier is None else earlier.tier

    def record(self, tenant: str, session: str, earlier: Earlier, now: float) -> None:
        """Record the conversation's last request, and the highest tier since its last change of topic."""
        if session:
            self._earlier.put(tenant, session, (earlier, now))

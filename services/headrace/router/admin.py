"""Show what the router is doing: the batchers of each tier, and what it remembers."""

from __future__ import annotations

import grpc

from headrace.router.state.conversations import Sessions
from headrace.router.state.tiers import Tiers
from headrace.runtime.interceptors import Activity
from headrace.runtime.vitals import vitals
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1.admin_service_pb2_grpc import AdminServiceServicer


class AdminServicer(AdminServiceServicer):
    """Answers people who want to look inside."""

    def __init__(self, tiers: Tiers, sessions: Sessions, activity: Activity) -> None:
        self._tiers = tiers
        self._sessions = sessions
        self._activity = activity

    async def Inspect(
        self, request: admin.InspectRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin.InspectResponse:
        """Everything as it is now."""
        state = admin.RouterState(
            batchers=[
                admin.BatcherLinkState(
                    tier=tier.name,
                    address=batcher.address,
                    ready=batcher.ready,
                    problem=batcher.seen.unhealthy_reason,
                    live=batcher.live,
                )
                for tier in self._tiers.tiers
                for batcher in tier.batchers
            ],
            conversations=len(self._sessions),
        )
        return admin.InspectResponse(router=state, vitals=vitals(self._activity))

"""Serve the debug endpoint of the router: the batchers of each tier, tenants, and what the router keeps."""

from __future__ import annotations

import grpc

from headrace.router.changes.status import Status
from headrace.router.figures import Figures
from headrace.router.state.conversations import Conversations
from headrace.router.state.tiers import Tiers
from headrace.runtime.process_info import process_state
from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1.admin_service_pb2_grpc import AdminServiceServicer


class AdminServicer(AdminServiceServicer):
    """Reports the state of the router to operators."""

    def __init__(
        self,
        tiers: Tiers,
        conversations: Conversations,
        requests: ActiveRequests,
        figures: Figures,
        status: Status,
    ) -> None:
        self._tiers = tiers
        self._conversations = conversations
        self._requests = requests
        self._figures = figures
        self._status = status

    async def Inspect(
        self, request: admin.InspectRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin.InspectResponse:
        """Return the current state."""
        state = admin.RouterState(
            batchers=[
                admin.BatcherLinkState(
                    tier=tier.name,
                    address=batcher.address,
                    ready=batcher.ready,
                    problem=batcher.reported.unhealthy_reason,
                    in_flight=batcher.in_flight,
                )
                for tier in self._tiers.tiers
                for batcher in tier.batchers
            ],
            conversations=len(self._conversations),
            tenants=await self._figures.of_tenants(),
            changes=await self._status.changes(),
        )
        return admin.InspectResponse(router=state, process_state=process_state(self._requests))

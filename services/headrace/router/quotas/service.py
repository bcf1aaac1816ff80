"""Implement QuotaService: other routers lease from this one."""

from __future__ import annotations

from typing import Any

import grpc

from headrace.router.quotas.sharing import Sharing
from headrace.v1 import quota_service_pb2 as pb
from headrace.v1.quota_service_pb2_grpc import QuotaServiceServicer

SERVICES = tuple(pb.DESCRIPTOR.services_by_name.values())
LEASE = "/headrace.v1.QuotaService/Lease"


class QuotaServicer(QuotaServiceServicer):
    """Answers other routers; every decision is the keeper's."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing

    async def Lease(
        self, request: pb.LeaseRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.LeaseResponse:
        """Take a report and return slices."""
        return await self._sharing.serve(request)

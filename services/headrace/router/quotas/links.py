"""Reach the keeper of quotas: another router by gRPC, or the first process of this one by a datagram."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import grpc

from headrace import errors, statuses
from headrace.router.siblings import Siblings
from headrace.v1 import quota_service_pb2 as pb
from headrace.v1.quota_service_pb2_grpc import QuotaServiceStub

LEASE_SECONDS = 0.5  # the longest that a keeper may take to answer
LEASE, KEEP = "quota lease", "quota keep"  # questions to siblings
KEEPING = 0  # the number of the process that keeps budgets for its siblings, or leases for them

# Opens a channel to an address of a router, whose certificate has a name.
OpenChannel: TypeAlias = Callable[[str, str], grpc.aio.Channel]


class Link(Protocol):
    """The way to another process."""

    address: str

    async def lease(self, request: pb.LeaseRequest) -> pb.LeaseResponse:
        """Return its answer. Raises HeadraceError, within LEASE_SECONDS."""
        ...

    async def close(self) -> None: ...


class RouterLink:
    """The way to another router.

    name   in its certificate; empty: the host of *address*
    """

    def __init__(self, address: str, name: str, open_channel: OpenChannel) -> None:
        self.address = address
        self._channel = open_channel(address, name)
        self._stub = QuotaServiceStub(self._channel)

    async def lease(self, request: pb.LeaseRequest) -> pb.LeaseResponse:
        """See `Link`."""
        try:
            return await self._stub.Lease(request, timeout=LEASE_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise statuses.from_rpc_error(error) from None

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


class SiblingLink:
    """The way to the first process of this router.

    topic   LEASE: to the keeper that it leases from, or itself; KEEP: to itself
    """

    address = "first process"

    def __init__(self, siblings: Siblings, topic: str) -> None:
        self._siblings = siblings
        self._topic = topic

    async def lease(self, request: pb.LeaseRequest) -> pb.LeaseResponse:
        """See `Link`."""
        answer = await self._siblings.ask_one(KEEPING, self._topic, request.SerializeToString())
        if answer is None:
            raise errors.Unavailable("the first process of this router does not answer")
        return pb.LeaseResponse.FromString(answer)

    async def close(self) -> None:
        """Nothing is open."""

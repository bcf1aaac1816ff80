"""Report whether the gateway can serve: whether its router can, as asked once a second."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace import statuses
from headrace.gateway.http.exchange import Exchange
from headrace.gateway.problems import retry_headers
from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.runtime.serving.server import READINESS

POLL_SECONDS = 1.0
CALL_SECONDS = 3.0
FRESH_SECONDS = 10.0  # after which the last answer does not count any more

_SERVING = health_pb2.HealthCheckResponse.SERVING


class RouterHealth:
    """Whether the router behind *channel* serves."""

    def __init__(self, channel: grpc.aio.Channel, requests: ActiveRequests) -> None:
        """Create the health.

        requests   of this process, which may drain
        """
        self._stub: Any = health_pb2_grpc.HealthStub(channel)
        self._requests = requests
        self._served_at: float | None = None
        self._problem = "the router has not been asked yet"

    async def poll(self) -> None:
        """Ask the router until cancelled."""
        while True:
            await self.ask()
            await asyncio.sleep(POLL_SECONDS)

    async def ask(self) -> None:
        """Ask the router once."""
        request = health_pb2.HealthCheckRequest(service=READINESS)
        try:
            answer = await self._stub.Check(request, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as raised:
            self._problem = f"the router cannot be reached: {statuses.from_rpc_error(raised).message}"
            if raised.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                self._served_at = None  # a busy router may answer late
        else:
            serves = answer.status == _SERVING
            self._served_at = time.monotonic() if serves else None
            self._problem = "" if serves else "no tier of the router is ready"

    def status(self) -> tuple[str, str]:
        """Return "ok", "draining" or "unavailable", and the reason of the last."""
        if self._requests.draining:
            return "draining", "the gateway is stopping"
        if self._served_at is not None and time.monotonic() - self._served_at < FRESH_SECONDS:
            return "ok", ""
        return "unavailable", self._problem

    async def ready(self, exchange: Exchange) -> None:
        """Answer /health: 200 if requests can be served."""
        status, reason = self.status()
        if status == "ok":
            await exchange.reply({"status": status})
        else:
            await exchange.reply(
                {"status": status, "reason": reason}, status=503, headers=retry_headers(POLL_SECONDS)
            )


async def live(exchange: Exchange) -> None:
    """Answer /health/live: the process runs."""
    await exchange.reply({"status": "ok"})

"""Run the service in the test's process, in front of fakes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from headrace.client import Client, connect
from headrace.upstream.__main__ import RunningUpstream, upstream
from headrace.upstream.settings import Settings
from headrace.v1 import generation_pb2 as pb
from tests.harness import PATIENCE, Answer, collect, eventually
from tests.upstream.fake import MODEL, Fake

# Far beyond what any test needs, or quick where a test waits for it.
QUICK: dict[str, Any] = {"drain_seconds": 2.0, "probe_seconds": 0.2, "retries": 0, "breaker_failures": 1000}


@dataclass(frozen=True)
class UpstreamTier:
    """A running service, and a client that repeats nothing."""

    client: Client
    running: RunningUpstream

    @property
    def left_behind(self) -> dict[str, int]:
        """Return the non-zero counts of what an idle service must not hold."""
        counts = {
            "requests": self.running.server.requests.in_flight,
            "slots": self.running.slots.taken,
            "queued": self.running.slots.queued,
            "live": len(self.running.answering.live),
            "in flight": sum(url.in_flight for url in self.running.urls),
        }
        return {name: count for name, count in counts.items() if count}


@asynccontextmanager
async def running_upstream(
    *fakes: Fake | str, ready: bool = True, **settings: Any
) -> AsyncGenerator[UpstreamTier, None]:
    """Run the service for *fakes*, in this order of preference.

    ready   whether to wait until it is ready
    """
    urls = ",".join(fake if isinstance(fake, str) else fake.url for fake in fakes)
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(
            upstream(Settings(port=0, url=urls, **{"tier": "large", "model": MODEL, **QUICK, **settings}))
        )
        client = await stack.enter_async_context(connect(f"127.0.0.1:{running.server.port}", retries=0))
        if ready:
            await eventually(lambda: running.server.health.ready)
        yield UpstreamTier(client, running)


def ask(text: str = "Hello?", **sampling: Any) -> pb.GenerateRequest:
    """Return a chat."""
    chat = pb.Chat(messages=[pb.Message(role="user", content=text)])
    return pb.GenerateRequest(chat=chat, sampling=pb.Sampling(**sampling))


async def answer_of(
    tier: UpstreamTier, request: pb.GenerateRequest, *, timeout: float | None = PATIENCE
) -> Answer:
    """Return the whole answer to *request*."""
    return await collect(tier.client, request, timeout=timeout)

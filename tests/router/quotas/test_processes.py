"""Processes of one router, and whole routers, share limits as their settings say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest

from headrace import errors
from headrace.channel import open_channel
from headrace.cli.launch.mesh import reserved_ports
from headrace.client import Client, chat, connect
from headrace.router.__main__ import router
from headrace.router.settings import Settings
from headrace.router.siblings import Siblings, inboxes
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import quota_service_pb2
from headrace.v1.quota_service_pb2_grpc import QuotaServiceStub
from tests.harness import PATIENCE, collect, until_healthy
from tests.router.fake_batchers import FakeBatcher, serving_fake


def ask(tenant: str) -> pb.GenerateRequest:
    request = chat("hello")
    request.routing.tenant = tenant
    return request


async def admitted(client: Client, tenant: str) -> bool:
    try:
        await collect(client, ask(tenant))
    except errors.TenantQuota:
        return False
    return True


async def counts(clients: list[Client], tenant: str, rounds: int) -> list[int]:
    """Return how many requests each client could send, in turn."""
    found = [0] * len(clients)
    for _ in range(rounds):
        for place, client in enumerate(clients):
            found[place] += await admitted(client, tenant)
    return found


async def until_all_share(clients: list[Client]) -> None:
    """Wait until the whole limit of a tenant nobody has used is available to the last client."""
    async with asyncio.timeout(PATIENCE):
        attempt = 0
        while sum([await admitted(clients[-1], f"fresh {attempt}") for _ in range(12)]) < 12:
            attempt += 1
            await asyncio.sleep(0.1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "quotas.toml"
    # It refills by one request in ten minutes.
    path.write_text("[default]\nrequests_per_minute = 12\n")
    return path


@asynccontextmanager
async def routers(settings: list[Settings], siblings: list[Siblings]) -> AsyncGenerator[list[Client], None]:
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(serving_fake(FakeBatcher()))
        clients = []
        for each, sibling in zip(settings, siblings, strict=True):
            whole = each.model_copy(update={"tiers": f"only={target}"})
            gate = await stack.enter_async_context(router(whole, sibling))
            clients.append(await stack.enter_async_context(connect(f"127.0.0.1:{gate.port}")))
            # gRPC remembers for half a second that another router tried this port before it was open.
            async with asyncio.timeout(PATIENCE):
                while True:
                    try:
                        await until_healthy(clients[-1])
                        break
                    except errors.Unavailable:
                        await asyncio.sleep(0.05)
        yield clients


async def test_the_processes_of_a_router_share_its_limits(path: Path) -> None:
    mail = inboxes(3)
    settings = Settings(port=0, tiers="only=127.0.0.1:1", processes=3, quotas=path, drain_seconds=0)
    async with routers([settings] * 3, [Siblings(number, mail) for number in range(3)]) as clients:
        await until_all_share(clients)
        found = await counts(clients, "acme", 12)
    for pair in mail:
        for end in pair:
            end.close()

    assert all(found)
    assert 12 <= sum(found) <= 13


async def test_routers_that_name_each_other_share_their_limits(path: Path) -> None:
    with reserved_ports(3) as ports:
        peers = ",".join(f"127.0.0.1:{port}" for port in ports)
        settings = [
            Settings(port=port, tiers="only=127.0.0.1:1", quotas=path, quota_peers=peers, drain_seconds=0)
            for port in ports
        ]
        async with routers(settings, [Siblings() for _ in ports]) as clients:
            await until_all_share(clients)
            found = await counts(clients, "acme", 12)

    assert all(found)
    assert 12 <= sum(found) <= 13


async def test_a_router_without_peers_leases_to_nobody_and_one_with_peers_checks_what_it_receives(
    path: Path,
) -> None:
    with reserved_ports(2) as (alone, shared):
        settings = [
            Settings(port=alone, tiers="only=127.0.0.1:1", quotas=path, drain_seconds=0),
            Settings(
                port=shared,
                tiers="only=127.0.0.1:1",
                quotas=path,
                quota_peers=f"127.0.0.1:{shared}",
                drain_seconds=0,
            ),
        ]
        async with routers(settings, [Siblings(), Siblings()]) as clients:
            assert await code_of(alone, quota_service_pb2.LeaseRequest()) is grpc.StatusCode.UNIMPLEMENTED
            async with open_channel(f"127.0.0.1:{shared}") as channel:
                stub = QuotaServiceStub(channel)
                keeper = (
                    await stub.Lease(quota_service_pb2.LeaseRequest(incarnation=5), wait_for_ready=True)
                ).incarnation
            for bad in (float("nan"), float("inf"), -1.0, 1e30):
                request = quota_service_pb2.LeaseRequest(incarnation=5, keeper=keeper)
                request.asks.add(tenant="acme").must.requests = bad
                assert await code_of(shared, request) is grpc.StatusCode.INVALID_ARGUMENT
            request = quota_service_pb2.LeaseRequest(incarnation=5, keeper=keeper)
            request.states.add(tenant="acme", requests=float("nan"))
            assert await code_of(shared, request) is grpc.StatusCode.INVALID_ARGUMENT
            request = quota_service_pb2.LeaseRequest(incarnation=5, keeper=keeper)
            request.asks.add(tenant="x" * 1000)
            assert await code_of(shared, request) is grpc.StatusCode.INVALID_ARGUMENT
            request = quota_service_pb2.LeaseRequest(incarnation=5, keeper=keeper)
            for _ in range(1000):
                request.asks.add()
            assert await code_of(shared, request) is grpc.StatusCode.INVALID_ARGUMENT
            assert await admitted(clients[1], "acme")


async def code_of(port: int, request: quota_service_pb2.LeaseRequest) -> grpc.StatusCode:
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call = QuotaServiceStub(channel).Lease(request, timeout=PATIENCE, wait_for_ready=True)
        return await call.code()

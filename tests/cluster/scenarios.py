"""What is tried on the cluster. `scenarios NAME PID FOLDER` runs one, on the caller's host.

PID is the process that made the network. The last line of the output has figures, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc

from headrace.client import connect
from headrace.v1 import generation_pb2 as pb
from headrace.v1.generation_service_pb2_grpc import GenerationServiceStub
from tests.cluster.network import NAME_SERVER, Network, network_of
from tests.cluster.policies import ALLOWED, enforce, lift, matrix
from tests.cluster.services import PATIENCE, ROUTER, Cluster, cluster, over_http, target_of, traffic

SERVERS = ("gateway0", "router0", "router1", "router2", "batcher0", "batcher1", "worker0", "worker1")
HOSTS = ("caller", "outsider", *SERVERS)
ONE_OF_EACH = ("worker0", "batcher0", "router0")
TWO_OF_EACH = (*ONE_OF_EACH, "worker1", "batcher1", "router1")

Figures = dict[str, object]


async def scale(network: Network, folder: Path) -> Figures:
    """A server of each kind is added and gets requests; then the first of each is withdrawn and drains."""
    figures: Figures = {}
    async with cluster(network, folder, *ONE_OF_EACH) as servers, traffic() as counted:
        for name in ("worker1", "batcher1", "router1"):
            await servers.start(name)
            figures[f"{name} used after"] = round(await servers.servers[name].gets_requests(), 1)
            await counted.continues()
        # The routers are used evenly: each has half of the callers.
        shares: list[int] = []
        async with asyncio.timeout(PATIENCE):
            while not shares or min(shares) < 6:
                await asyncio.sleep(0.1)
                shares = [await servers.servers[name].requests() for name in ("router0", "router1")]
        figures["requests of the routers"] = shares
        for name in ("router0", "batcher0", "worker0"):
            await servers.servers[name].gets_requests()
            figures[f"{name} drained in"] = round(await _stop(servers, name), 1)
            await counted.continues()
    return {**figures, "answers": counted.answers, "tokens": counted.tokens}


async def roll_routers(network: Network, folder: Path) -> Figures:
    """The only router is replaced, twice: the name never has an address in common with before.

    Some callers call the routers, others a gateway, whose client resolves the name for them.
    """
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(cluster(network, folder, *ONE_OF_EACH, "gateway0"))
        way = over_http(servers.servers["gateway0"])
        direct = await stack.enter_async_context(traffic(8))
        streamed = await stack.enter_async_context(traffic(8, way=way))
        for old, new in (("router0", "router1"), ("router1", "router2")):
            await servers.start(new)
            await _stop(servers, old)
            await servers.servers[new].gets_requests()
            await asyncio.gather(direct.continues(), streamed.continues())
    return {
        **{"answers": direct.answers, "tokens": direct.tokens},
        **{"answers over HTTP": streamed.answers, "tokens over HTTP": streamed.tokens},
    }


async def _stop(servers: Cluster, name: str) -> float:
    """Stop a server. Returns the seconds until it had drained."""
    began = time.monotonic()
    code = await servers.stop(name)
    assert code == 0, f"{name} ended with {code}"
    return time.monotonic() - began


async def other_clients(network: Network, folder: Path) -> Figures:
    """Clients that only have gRPC, which keeps a connection, reach an added router by the age of theirs."""
    async with cluster(network, folder, *ONE_OF_EACH) as servers, AsyncExitStack() as stack:
        problems: list[str] = []
        for _ in range(8):
            await stack.enter_async_context(_plain_client(problems))
        await servers.start("router1")
        began = time.monotonic()
        shares: list[int] = []
        async with asyncio.timeout(PATIENCE):
            while not shares or min(shares) < 2:
                await asyncio.sleep(0.1)
                shares = [await servers.servers[name].requests() for name in ("router0", "router1")]
        seconds = time.monotonic() - began
    assert not problems, f"{len(problems)}: {problems[:3]}"
    return {"two of eight moved after": round(seconds, 1), "requests of the routers": shares}


async def partitions(network: Network, folder: Path) -> Figures:
    """A server of each kind, and then the name server, is cut off for a while; all answers are right."""
    figures: Figures = {}
    async with cluster(network, folder, *TWO_OF_EACH) as servers, traffic() as counted:
        # The callers of worker and batcher notice the silence and continue elsewhere.
        for name, caller in (("worker0", "batcher1"), ("batcher0", "router1")):
            server = servers.servers[name]
            await _used(servers, name, caller)
            server.host.cut()
            began = time.monotonic()
            await _lost(servers, name, caller)
            figures[f"{name} lost after"] = round(time.monotonic() - began, 1)
            await counted.continues()
            server.host.mend()
            began = time.monotonic()
            await _used(servers, name, caller)
            figures[f"{name} used after"] = round(time.monotonic() - began, 1)
        # Answers of the router are delayed.
        await servers.servers["router0"].gets_requests()
        network["router0"].cut()
        await asyncio.sleep(3.0)
        network["router0"].mend()
        await counted.continues()
        network[NAME_SERVER].cut()
        await asyncio.sleep(8.0)  # longer than any result is kept: the known addresses remain in use
        await counted.continues()
        network[NAME_SERVER].mend()
    return {**figures, "answers": counted.answers, "tokens": counted.tokens}


async def _seen(servers: Cluster, name: str, caller: str) -> tuple[bool, int]:
    """Return whether a server is ready, as one of its callers sees it, and this caller's requests there."""
    address, state = servers.servers[name].address, await servers.servers[caller].inspect()
    for batcher in state.router.batchers:
        if batcher.address == address:
            return batcher.ready, batcher.in_flight
    for worker in state.batcher.workers:
        if worker.target == address:
            return worker.state == "ready", worker.outstanding
    return False, 0


async def _used(servers: Cluster, name: str, caller: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while not all(await _seen(servers, name, caller)):
            await asyncio.sleep(0.05)


async def _lost(servers: Cluster, name: str, caller: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while (await _seen(servers, name, caller))[0]:
            await asyncio.sleep(0.05)


async def forbidden_paths(network: Network, folder: Path) -> Figures:
    """With packet filters like the NetworkPolicies, each server is reached by its callers only."""
    sources = ("caller", "outsider", "gateway0", "router1", "batcher1", "worker1")
    async with cluster(network, folder, *ONE_OF_EACH) as servers:
        before = await matrix(network, sources)
        assert all(before.values()), f"without filters all paths are open: {before}"
        enforce(network)
        try:
            after = await matrix(network, sources)
            async with traffic() as counted:
                await _replace_all(servers)
        finally:
            lift(network)
    # The outsider is no server of ours: its host has no filter, and callers may call it.
    expected = {
        (source, target): source in ALLOWED.get(target, ("caller", "outsider")) for source, target in after
    }
    assert after == expected, f"{after}, expected {expected}"
    reached = [f"{source} -> {target}" for (source, target), passes in after.items() if passes]
    return {"open": reached, "closed": len(after) - len(reached), "answers": counted.answers}


async def _replace_all(servers: Cluster) -> None:
    """Replace the first server of each kind by the second, so that each opens connections to the others.

    A caller reaches only routers, so these report what they see of the others.
    """
    await servers.launch("worker1", "batcher1")
    await servers.start("router1")
    router = servers.servers["router1"]
    async with asyncio.timeout(PATIENCE), connect(router.address) as client:
        while sum(seen.ready for seen in (await router.inspect()).router.batchers) < 2:
            await asyncio.sleep(0.1)
        await _stop(servers, "router0")
        await _stop(servers, "batcher0")
        while (await client.list_tiers()).tiers[0].load.workers < 2:
            await asyncio.sleep(0.1)
        await _stop(servers, "worker0")


@asynccontextmanager
async def _plain_client(problems: list[str]) -> AsyncGenerator[None, None]:
    """Call the routers without our library, one call after the other, while the block runs."""
    options = (
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, as in a process of its own
        ("grpc.dns_min_time_between_resolutions_ms", 500),
    )
    stop = asyncio.Event()
    begun = asyncio.Event()

    async def call_on() -> None:
        while not stop.is_set():
            request = pb.GenerateRequest(prompt="0123456789" * 3)
            received = ""
            try:
                async for response in stub.Generate(request, timeout=PATIENCE):
                    received += response.delta.text
                    begun.set()
                if received != request.prompt:
                    problems.append(f"received {received!r}")
            except grpc.aio.AioRpcError as error:
                problems.append(f"{error.code().name}: {error.details()}")
                await asyncio.sleep(0.1)

    async with grpc.aio.insecure_channel(target_of(ROUTER), options=options) as channel:
        stub = GenerationServiceStub(channel)
        calling = asyncio.create_task(call_on())
        try:
            await asyncio.wait_for(begun.wait(), PATIENCE)
            yield
        finally:
            stop.set()
            await calling


SCENARIOS: dict[str, Callable[[Network, Path], Coroutine[object, object, Figures]]] = {
    scenario.__name__: scenario
    for scenario in (
        scale,
        roll_routers,
        other_clients,
        partitions,
        forbidden_paths,
    )
}

if __name__ == "__main__":
    _, chosen, owner, where = sys.argv
    print(json.dumps(asyncio.run(SCENARIOS[chosen](network_of(int(owner), HOSTS), Path(where)))))

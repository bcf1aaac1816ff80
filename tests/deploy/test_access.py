"""Each RPC of each service, called with each kind of credentials: docs/access.md says how the calls end.

The services are set up as where callers have tokens: the router has a port with TLS for callers and one with
mutual TLS for services, and all ports of batcher and worker speak mutual TLS.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc.aio import Metadata

import headrace.v1
from headrace import statuses
from headrace.channel import open_channel
from headrace.cli.launch.mesh import reserved_ports
from headrace.tls.files import TlsFiles, TlsReader
from headrace.worker.engine.echo import EchoEngine
from tests.certificates import Certificates, issued
from tests.harness import PATIENCE, Mesh, running_mesh
from tests.security import RPCS, Callers, bearer

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "access.md"
SEEN = ROOT / "build" / "access.md"  # what was seen, if it is not what the page says

NOT_OFFERED = "UNIMPLEMENTED"
NOT_CONNECTED = "no connection"
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
REFUSALS = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
)
# The first cells of the tables of the page, by port.
PORTS = {
    "router": "RPC of a router, `--port`",
    "router, mutual TLS": "RPC of a router, `--mtls-port`",
    "batcher": "RPC of a batcher",
    "worker": "RPC of a worker",
}


@dataclass(frozen=True)
class Credentials:
    """What a caller shows: a bearer token, or a certificate by the name of its role; or nothing."""

    heading: str
    token: str = ""
    certificate: str = ""


WITH_TOKENS = (
    Credentials("nothing"),
    Credentials("unknown token", token="hr_unknown"),
    Credentials("expired token", token="expired"),
    Credentials("caller's token", token="caller"),
    Credentials("token for feedback", token="rater"),
    Credentials("administrator's token", token="admin"),
)
WITH_CERTIFICATES = (
    Credentials("nothing"),
    Credentials("foreign certificate", certificate="foreign"),
    Credentials("caller's", certificate="caller"),
    Credentials("gateway's", certificate="gateway"),
    Credentials("router's", certificate="router"),
    Credentials("batcher's", certificate="batcher"),
    Credentials("worker's", certificate="worker"),
    Credentials("administrator's", certificate="admin"),
)


@dataclass(frozen=True)
class Servers:
    """The ports of a mesh, and what its callers have."""

    ports: Mapping[str, int]
    callers: Callers
    own: Certificates
    foreign: Certificates

    def files(self, shown: Credentials) -> TlsFiles:
        """Return the files of a client that trusts the servers and shows *shown*."""
        if not shown.certificate:
            return TlsFiles(ca=self.own.ca)
        # A certificate of another authority for the highest role.
        issuer, name = (
            (self.foreign, "admin") if shown.certificate == "foreign" else (self.own, shown.certificate)
        )
        return TlsFiles(**{**issuer.client(name), "ca": self.own.ca})


@pytest.fixture(scope="module")
async def servers(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Servers, None]:
    """A mesh with certificates, whose router also takes tokens."""
    folder = tmp_path_factory.mktemp("access")
    own, foreign = issued(folder / "own"), issued(folder / "foreign", ["admin"])
    callers = Callers(folder / "callers.toml")
    callers.add("caller")
    callers.add("rater", scopes=("feedback",))
    callers.add("admin", scopes=("admin",))
    callers.add("expired", expires=LONG_AGO)
    quotas = folder / "quotas.toml"
    quotas.write_text("[default]\nrequests_per_minute = 100_000\n")
    with reserved_ports(1) as (mutual,):
        router = {
            **own.settings("router"),
            "tls_client_certificates": "none",
            "mtls_port": mutual,
            "auth_tokens": callers.path,
            "quotas": quotas,
            "quota_peers": f"127.0.0.1:{mutual}",
        }
        async with running_mesh(
            "only",
            engine=lambda: EchoEngine(step_seconds=0.01),
            router_settings=router,
            batcher_settings=own.settings("batcher"),
            worker_settings=own.settings("worker"),
            client_options={"ca": own.ca, "token": callers.tokens["caller"]},
        ) as mesh:
            yield Servers(_ports(mesh, mutual), callers, own, foreign)


def _ports(mesh: Mesh, mutual: int) -> dict[str, int]:
    tier = mesh.tiers["only"]
    own = (mesh.port, mutual, tier.batcher.server.port, tier.worker.server.port)
    return dict(zip(PORTS, own, strict=True))


async def end_of(channel: grpc.aio.Channel, method: str, metadata: Sequence[tuple[str, str]]) -> str:
    """Call *method*, and return "ok" if it is permitted, whatever the answer, else why it is not."""
    start: Any = channel.unary_stream(method)  # see tests.security.verdict
    call = start(RPCS[method], metadata=tuple(metadata), timeout=PATIENCE)
    try:
        with suppress(grpc.aio.AioRpcError):
            if await call.read() is not grpc.aio.EOF:
                return "ok"
        code, trailing = await call.code(), await call.trailing_metadata()
        if code is grpc.StatusCode.UNAVAILABLE and not trailing:  # the channel's own error has no details
            return NOT_CONNECTED
        if code not in REFUSALS:
            return "ok"
        details = await call.details()
        return statuses.from_rpc_error(grpc.aio.AioRpcError(code, Metadata(), trailing, details)).reason
    finally:
        call.cancel()


async def ends(servers: Servers, port: str, shown: Credentials) -> dict[str, str]:
    """Return how a call of each RPC ends at a port."""
    token = servers.callers.tokens.get(shown.token, shown.token)
    async with open_channel(
        f"127.0.0.1:{servers.ports[port]}", tls=TlsReader(servers.files(shown))
    ) as channel:
        return {rpc: await end_of(channel, rpc, bearer(token) if token else ()) for rpc in RPCS}


def table(heading: str, columns: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the lines of a table with a row for each RPC, without those that the port does not offer."""
    lines = [f"| {heading} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for rpc in RPCS:
        row = [seen[rpc] for seen in columns.values()]
        if set(row) - {NOT_OFFERED, NOT_CONNECTED}:
            cells = (cell if cell in ("ok", NOT_CONNECTED) else f"`{cell}`" for cell in row)
            lines.append(f"| `{rpc.removeprefix('/').removeprefix('headrace.v1.')}` | {' | '.join(cells)} |")
    return lines


@pytest.fixture(scope="module")
async def seen(servers: Servers) -> dict[str, list[str]]:
    """Make all calls. Returns the tables of the page as they should be, and writes them to build/."""
    tables = {}
    for port, heading in PORTS.items():
        kinds = WITH_TOKENS if port == "router" else WITH_CERTIFICATES
        tables[heading] = table(heading, {shown.heading: await ends(servers, port, shown) for shown in kinds})
    SEEN.parent.mkdir(exist_ok=True)
    SEEN.write_text("\n\n".join("\n".join(lines) for lines in tables.values()) + "\n")
    return tables


def tables_of(page: str) -> dict[str, list[str]]:
    """Return the tables of a page by their first cell."""
    blocks = (block.strip().splitlines() for block in page.split("\n\n"))
    return {
        lines[0].split(" | ")[0].removeprefix("| "): lines
        for lines in blocks
        if lines and lines[0].startswith("| ")
    }


@pytest.mark.parametrize("heading", PORTS.values())
def test_calls_end_as_the_page_says(seen: dict[str, list[str]], heading: str) -> None:
    written = tables_of(PAGE.read_text())

    assert seen[heading] == written[heading], f"{SEEN} has the tables that were seen"


def test_every_rpc_of_the_contract_is_called() -> None:
    """A new RPC needs a row."""
    modules = [
        importlib.import_module(f"headrace.v1.{found.name}")
        for found in pkgutil.iter_modules(headrace.v1.__path__)
        if found.name.endswith("_pb2")
    ]
    services = [each for module in modules for each in module.DESCRIPTOR.services_by_name.values()]

    offered = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert offered == {rpc for rpc in RPCS if rpc.startswith("/headrace.v1.")}

"""The ports of a server: which versions of TLS they speak, and to whom."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import warnings
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace import errors
from headrace.channel import open_channel
from headrace.cli.launch.mesh import reserved_ports
from headrace.client import connect
from headrace.router.__main__ import router
from headrace.router.settings import Settings
from headrace.runtime.serving.server import PortInUse, Serving, StartFailed
from tests.certificates import Certificates, issued, replace
from tests.harness import PATIENCE

TIERS = "small=127.0.0.1:1"  # no batcher: the router serves, and is not ready


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return issued(tmp_path_factory.mktemp("tls"))


@contextlib.asynccontextmanager
async def serving(certificates: Certificates, **settings: Any) -> AsyncGenerator[Serving, None]:
    chosen = {"port": 0, "tiers": TIERS, "drain_seconds": 1.0, **certificates.settings("router"), **settings}
    async with router(Settings(**chosen)) as running:
        yield running


def negotiated(port: int, certificates: Certificates, version: ssl.TLSVersion | None = None) -> str:
    """Offer *version* of TLS, or all, by OpenSSL; return the negotiated one, "" if the server refuses."""
    context = ssl.create_default_context(cafile=str(certificates.ca))
    context.load_cert_chain(certificates.client()["cert"], certificates.client()["key"])
    context.set_alpn_protocols(["h2"])
    context.set_ciphers("ALL:@SECLEVEL=0")  # otherwise OpenSSL itself refuses versions before 1.2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if version is not None:
            context.minimum_version = context.maximum_version = version
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secured,
        ):
            return secured.version() or ""
    except (ssl.SSLError, ConnectionError):
        return ""


async def test_versions_before_1_2_are_refused_and_1_3_is_preferred(certificates: Certificates) -> None:
    async with serving(certificates) as running:
        seen = {
            version.name: await asyncio.to_thread(negotiated, running.port, certificates, version)
            for version in (
                *(ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1),
                *(ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3),
            )
        }
        best = await asyncio.to_thread(negotiated, running.port, certificates)

    assert best == "TLSv1.3"
    assert seen == {"TLSv1": "", "TLSv1_1": "", "TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}


async def health(port: int, **options: Any) -> int:
    async with open_channel(f"127.0.0.1:{port}", **options) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=PATIENCE)
        return int(reply.status)


async def test_the_health_port_answers_probes_without_tls_and_nothing_else(
    certificates: Certificates,
) -> None:
    with reserved_ports(1) as (port,):
        async with serving(certificates, health_port=port):
            assert await health(port) == health_pb2.HealthCheckResponse.SERVING
            async with connect(f"127.0.0.1:{port}", retries=0) as client:
                with pytest.raises(errors.Unimplemented):
                    await client.list_tiers()


async def test_the_health_port_is_bound_like_the_main_one(certificates: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ExceptionGroup) as raised:
        async with serving(certificates, health_port=other.getsockname()[1]):
            pass

    assert isinstance(error := errors.unwrap(raised.value), PortInUse)
    assert "set another --health-port" in str(error)


async def test_a_router_has_a_port_for_callers_without_certificate_and_one_for_those_with_one(
    certificates: Certificates,
) -> None:
    """gRPC for Python cannot accept both kinds on one port."""
    with reserved_ports(1) as (mutual,):
        edge = {"tls_client_certificates": "none", "mtls_port": mutual, "auth_anonymous": "allow"}
        async with serving(certificates, **edge) as running:
            caller, admin = {"ca": certificates.ca}, certificates.client("admin")
            for port, options, served in (
                (running.port, caller, True),
                (running.port, admin, True),
                (mutual, caller, False),
                (mutual, admin, True),
            ):
                async with connect(f"127.0.0.1:{port}", retries=0, **options) as client:
                    with contextlib.nullcontext() if served else pytest.raises(errors.Unavailable):
                        await client.list_tiers()


async def test_a_certificate_without_authority_serves_callers_over_tls(certificates: Certificates) -> None:
    """TLS at the edge alone: the mesh behind is called in plaintext."""
    async with (
        serving(certificates, tls_ca=None) as running,
        connect(f"127.0.0.1:{running.port}", retries=0, ca=certificates.ca) as client,
    ):
        assert [tier.name for tier in (await client.list_tiers()).tiers] == ["small"]


async def test_an_expired_certificate_is_refused_and_its_replacement_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.tls.files.CHECK_SECONDS", 0.0)
    good, expired = issued(tmp_path / "good"), issued(tmp_path / "expired", days=-0.01)
    live = issued(tmp_path / "live")
    replace(live.ca, good.ca.read_bytes() + expired.ca.read_bytes())
    async with serving(live) as running:

        async def list_tiers(source: Certificates) -> None:
            for end in ("key", "pem"):
                for name in ("router", "admin"):
                    replace(live.folder / f"{name}.{end}", (source.folder / f"{name}.{end}").read_bytes())
            async with connect(f"127.0.0.1:{running.port}", retries=0, **live.client()) as client:
                await client.list_tiers()

        await list_tiers(good)
        with pytest.raises(errors.Unavailable, match="has expired"):
            await list_tiers(expired)
        await list_tiers(good)


async def test_unusable_files_stop_the_start_with_their_names(certificates: Certificates) -> None:
    with pytest.raises(StartFailed, match=r"cannot read .*none\.pem"):
        async with serving(certificates, tls_ca=certificates.folder / "none.pem"):
            pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls_cert": "a.pem"}, "HEADRACE_TLS_CERT .* and HEADRACE_TLS_KEY .* need each other"),
        ({"tls_key": "a.key"}, "HEADRACE_TLS_CERT .* and HEADRACE_TLS_KEY .* need each other"),
        ({"tls_ca": "ca.pem"}, "HEADRACE_TLS_CA .* needs --tls-cert and --tls-key"),
        ({"mtls_port": 1, "tls_cert": "a.pem", "tls_key": "a.key"}, "HEADRACE_MTLS_PORT .* needs --tls-ca"),
        ({"tls_peers": "cluster.local"}, "neither the start of a SPIFFE URI"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(tiers=TIERS, **settings)


async def test_a_flood_of_bytes_that_are_not_tls_leaves_the_port_usable(certificates: Certificates) -> None:
    async with serving(certificates) as running:

        async def noise(number: int) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(bytes([number % 256]) * 4096)
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()

        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(noise(number) for number in range(64)))
        async with connect(f"127.0.0.1:{running.port}", retries=0, **certificates.client()) as client:
            await client.list_tiers()


def test_grpc_for_python_still_cannot_ask_for_a_certificate_without_requiring_it() -> None:
    """If this fails, `--tls-client-certificates optional` has become possible, and `--mtls-port` needless."""
    import inspect

    parameters = inspect.signature(grpc.dynamic_ssl_server_credentials).parameters

    assert parameters["require_client_authentication"].default is False
    assert len(parameters) == 3


async def test_a_server_with_the_certificate_of_a_caller_is_not_trusted(tmp_path: Path) -> None:
    """So that a caller of the mesh cannot pose as a part of it."""
    certificates = issued(tmp_path)
    async with (
        serving(certificates, **certificates.settings("caller")) as running,
        connect(f"127.0.0.1:{running.port}", retries=0, **certificates.client()) as client,
    ):
        with pytest.raises(errors.Unavailable, match="certificate"):
            await client.list_tiers()

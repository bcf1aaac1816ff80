"""Tokens and certificates together."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from headrace import errors
from headrace.client import Client, connect
from headrace.worker.engine.echo import EchoEngine
from tests.certificates import Certificates, issued
from tests.harness import PATIENCE, Mesh, collect, eventually, prompt, running_mesh
from tests.security import Callers


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return issued(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def callers(tmp_path_factory: pytest.TempPathFactory) -> Callers:
    made = Callers(tmp_path_factory.mktemp("auth") / "callers.toml")
    made.add("search")
    made.add("gateway", tenant="*", max_priority=9)
    return made


def inside(certificates: Certificates) -> dict[str, Any]:
    return {f"{role}_settings": certificates.settings(role) for role in ("batcher", "worker")}


@pytest.fixture(scope="module")
async def edge(certificates: Certificates, callers: Callers) -> AsyncGenerator[Mesh, None]:
    """A router that asks callers for tokens over TLS; behind it, the services have certificates."""
    async with running_mesh(
        "only",
        engine=lambda: EchoEngine(step_seconds=0.01),
        **inside(certificates),
        router_settings={
            **certificates.settings("router"),
            "tls_client_certificates": "none",
            "auth_tokens": callers.path,
        },
        client_options={"ca": certificates.ca, "token": callers.tokens["search"]},
    ) as running:
        yield running


@pytest.fixture(scope="module")
async def mutual(certificates: Certificates, callers: Callers) -> AsyncGenerator[Mesh, None]:
    """A router that reads certificates and tokens."""
    async with running_mesh(
        "only",
        engine=lambda: EchoEngine(step_seconds=0.01),
        **inside(certificates),
        router_settings={**certificates.settings("router"), "auth_tokens": callers.path},
        client_options=certificates.client(),
    ) as running:
        yield running


async def tenant_of(mesh: Mesh, client: Client, tenant: str = "") -> str:
    """Send a request, and return the tenant with which it reaches the batcher."""
    asked = prompt("x", max_tokens=100, ignore_eos=True)
    asked.routing.tenant = tenant
    live = mesh.tiers["only"].batcher.coalescer.live
    async with aclosing(client.generate(asked, timeout=PATIENCE)) as stream:
        accepted = (await anext(stream)).accepted
        (found,) = (job.tenant for job in live if job.request_id == accepted.request_id)
    await eventually(lambda: not live)
    return found


async def test_callers_with_tokens_need_no_certificate(
    edge: Mesh, certificates: Certificates, callers: Callers
) -> None:
    assert await tenant_of(edge, edge.client) == "search"
    for token, error in (("", errors.CredentialsRequired), ("hr_wrong", errors.CredentialsInvalid)):
        async with connect(f"127.0.0.1:{edge.port}", ca=certificates.ca, token=token) as client:
            with pytest.raises(error):
                await collect(client, prompt("x"))


async def test_a_token_may_travel_to_another_machine_over_tls(certificates: Certificates) -> None:
    async with connect("router.example:50051", ca=certificates.ca, token="secret"):
        pass


async def test_a_token_decides_where_a_caller_has_also_a_certificate(
    mutual: Mesh, certificates: Certificates, callers: Callers
) -> None:
    """So a gateway with a certificate passes on the tokens of its callers."""
    target, admin = f"127.0.0.1:{mutual.port}", certificates.client("admin")
    async with connect(target, **admin) as client:
        assert await tenant_of(mutual, client, "any") == "any"
    async with connect(target, token=callers.tokens["search"], **admin) as client:
        assert await tenant_of(mutual, client) == "search"
        with pytest.raises(errors.Forbidden):
            await tenant_of(mutual, client, "any")
    async with connect(target, token="hr_wrong", **admin) as client:
        with pytest.raises(errors.CredentialsInvalid):
            await collect(client, prompt("x"))


async def test_a_certificate_without_a_role_is_a_tenant_of_its_name(
    mutual: Mesh, certificates: Certificates
) -> None:
    async with connect(f"127.0.0.1:{mutual.port}", **certificates.client("caller")) as client:
        assert await tenant_of(mutual, client) == "spiffe://headrace/caller"
        with pytest.raises(errors.Forbidden):
            await tenant_of(mutual, client, "search")


async def test_the_file_gives_certificates_their_tenants_and_those_it_omits_are_refused(
    certificates: Certificates, tmp_path: Path
) -> None:
    file = tmp_path / "callers.toml"
    listed = '[[certificates]]\nname = "spiffe://headrace/{}"\ntenant = "search"\n{}\n'
    file.write_text(listed.format("caller", "") + listed.format("late", "expires = 2020-01-01T00:00:00Z"))
    others = issued(certificates.folder, ["other", "late"])
    async with running_mesh(
        "only",
        engine=lambda: EchoEngine(step_seconds=0.01),
        **inside(certificates),
        router_settings={**certificates.settings("router"), "auth_tokens": file},
        client_options=certificates.client(),
    ) as mesh:
        target = f"127.0.0.1:{mesh.port}"
        async with connect(target, **certificates.client("caller")) as client:
            assert await tenant_of(mesh, client) == "search"
        for name, error in (("other", errors.CredentialsRequired), ("late", errors.CredentialsInvalid)):
            async with connect(target, **others.client(name)) as client:
                with pytest.raises(error):
                    await collect(client, prompt("x"))

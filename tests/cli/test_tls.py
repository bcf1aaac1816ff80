"""`headrace up --tls` and `headrace certs`, with real processes."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from headrace.channel import open_channel
from headrace.cli.launch.mesh import reserved_ports
from headrace.client import connect
from tests.certificates import Certificates, issued
from tests.cli.test_end_to_end import ENVIRONMENT, PATIENCE, Up, run, up
from tests.harness import eventually

GRPCURL = shutil.which("grpcurl")


@dataclass(frozen=True)
class Secured:
    """A mesh of `headrace up --tls`."""

    up: Up
    cache: Path
    certificates: Certificates

    @property
    def target(self) -> list[str]:
        return ["--target", self.up.address]

    def flags(self, name: str) -> list[str]:
        return [
            word
            for kind, path in self.certificates.client(name).items()
            for word in (f"--tls-{kind}", str(path))
        ]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("up")
    with up(folder / "logs", "--tls", "--cache", str(folder / "cache"), "--gateway-port", "0") as running:
        yield Secured(running, folder / "cache", Certificates(folder / "logs" / "tls"))
    assert not list((folder / "cache" / "tls").iterdir()), "nothing is left to find"


def test_commands_on_this_machine_find_the_certificates(mesh: Secured) -> None:
    out = run("chat", *mesh.target, "Hello, mesh!", HEADRACE_CACHE=str(mesh.cache))

    assert (out.returncode, out.stdout) == (0, "Hello, mesh!\n")


def test_commands_elsewhere_name_them(mesh: Secured) -> None:
    variables = {
        f"HEADRACE_TLS_{kind.upper()}": str(path) for kind, path in mesh.certificates.client().items()
    }

    assert run("chat", *mesh.target, *mesh.flags("admin"), "Hi").stdout == "Hi\n"
    assert run("chat", *mesh.target, "Hi", **variables).stdout == "Hi\n"


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ([], "it may require TLS"),
        (["--tls-ca", "{ca}"], "a client certificate that it trusts"),
        (["--tls-ca", "{ca}", "--tls-cert", "{cert}"], "a certificate needs its private key"),
        (["--tls-ca", "/none.pem"], "cannot read /none.pem"),
        (["--tls"], "not signed by a known authority"),
    ],
)
def test_a_wrong_connection_is_one_line_of_advice(mesh: Secured, flags: list[str], advice: str) -> None:
    files = mesh.certificates.client()

    out = run("tiers", *mesh.target, *(flag.format(**files) for flag in flags))

    assert out.returncode in (1, 2)
    assert len(out.stderr.splitlines()) == 1
    assert advice in out.stderr


def test_a_role_that_may_not_call_is_refused_by_name(mesh: Secured) -> None:
    out = run("tiers", *mesh.target, *mesh.flags("worker"))

    assert out.returncode == 1
    assert "spiffe://headrace/worker may not call /headrace.v1.RoutingService/ListTiers" in out.stderr
    assert "[FORBIDDEN]" in out.stderr


def test_the_gateway_serves_http_on_loopback_and_calls_the_mesh_over_tls(mesh: Secured) -> None:
    body = {"model": "auto", "messages": [{"role": "user", "content": "Hello!"}]}
    url = f"{mesh.up.gateway}/v1/chat/completions"
    answer = httpx.post(url, json=body, timeout=PATIENCE, trust_env=False).json()

    assert answer["choices"][0]["message"]["content"] == "Hello!"
    assert "both over plain HTTP, for this machine only" in mesh.up.printed


@pytest.mark.skipif(GRPCURL is None, reason="grpcurl is not installed")
def test_the_printed_command_for_grpcurl_works(mesh: Secured) -> None:
    command = next(line for line in mesh.up.printed.splitlines() if "grpcurl" in line and "list" in line)

    out = subprocess.run(command.split(), capture_output=True, text=True, timeout=PATIENCE, check=False)

    assert "headrace.v1.GenerationService" in out.stdout.splitlines(), out.stderr


def test_private_keys_are_in_no_log(mesh: Secured) -> None:
    keys = [path.read_text().splitlines()[1] for path in mesh.certificates.folder.glob("*.key")]
    logs = "".join(path.read_text() for path in mesh.certificates.folder.parent.glob("*.log"))

    assert len(keys) == 5
    assert '"certificate in use"' in logs
    assert not [key for key in keys if key in logs or key in mesh.up.printed]


def test_certs_issues_certificates_for_roles_and_callers(tmp_path: Path) -> None:
    out = run("certs", str(tmp_path), "router", "caller", "--host", "router.example", "--days", "1")
    again = run("certs", str(tmp_path), "batcher-small")

    assert out.stdout.split() == [str(tmp_path / name) for name in ("ca.pem", "router.pem", "caller.pem")]
    assert again.stdout.split() == [str(tmp_path / name) for name in ("ca.pem", "batcher-small.pem")]
    for name in ("router", "caller", "batcher-small"):
        verified = subprocess.run(
            ["openssl", "verify", "-CAfile", tmp_path / "ca.pem", tmp_path / f"{name}.pem"],
            capture_output=True,
            check=False,
        )
        assert verified.returncode == 0, verified.stderr


async def test_several_processes_of_a_router_share_all_ports(tmp_path: Path) -> None:
    certificates = issued(tmp_path)
    with reserved_ports(3) as (port, mutual, health):
        command = [sys.executable, "-m", "headrace.router", "--processes", "2", "--tiers", "a=127.0.0.1:1"]
        command += ["--port", str(port), "--mtls-port", str(mutual), "--health-port", str(health)]
        command += ["--tls-client-certificates", "none", "--auth-anonymous", "allow", "--drain-seconds", "1"]
        for name, path in certificates.settings("router").items():
            command += [f"--{name.replace('_', '-')}", str(path)]
        log = tmp_path / "log"
        with log.open("wb") as out:
            router = await asyncio.create_subprocess_exec(*command, env=ENVIRONMENT, stdout=out, stderr=out)
        try:
            await eventually(lambda: log.read_text().count('"serving"') == 2, timeout=PATIENCE)
            for each, options in ((port, {"ca": certificates.ca}), (mutual, certificates.client())):
                async with connect(f"127.0.0.1:{each}", **options) as client:
                    assert [tier.name for tier in (await client.list_tiers()).tiers] == ["a"]
            async with open_channel(f"127.0.0.1:{health}") as channel:
                await channel.channel_ready()
        finally:
            router.terminate()
            async with asyncio.timeout(PATIENCE):
                assert await router.wait() == 0
    loaded = [json.loads(line) for line in log.read_text().splitlines()]
    assert {record["message"] for record in loaded} >= {"certificate in use", "serving", "stopped"}

"""`python -m headrace.upstream` as a process: certificates, and its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from headrace import errors
from headrace.cli.launch.mesh import reserved_ports
from headrace.client import Client, connect
from tests.certificates import Certificates, issued
from tests.harness import PATIENCE, collect, eventually
from tests.upstream.fake import DONE, MODEL, Exchange, Fake, delta, fake_upstream, finish, usage
from tests.upstream.tier import answer_of, ask, running_upstream


@dataclass
class Process:
    """A running process, and a client of it."""

    process: asyncio.subprocess.Process
    client: Client

    async def log(self) -> list[dict[str, object]]:
        """Wait for its end, and return the lines of its log."""
        _, printed = await asyncio.wait_for(self.process.communicate(), PATIENCE)
        return [json.loads(line) for line in printed.decode().splitlines()]


@asynccontextmanager
async def process(fake: Fake, *flags: str, **environment: str) -> AsyncGenerator[Process, None]:
    """Run the service as a process, until it is healthy."""
    with reserved_ports(1) as (port,):
        command = ["--url", fake.url, "--model", MODEL, "--port", str(port), "--probe-seconds", "0.2", *flags]
        running = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "headrace.upstream", *command),
            env={**os.environ, **environment},
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with connect(f"127.0.0.1:{port}", retries=0) as client:

                async def healthy() -> bool:
                    try:
                        return (await client.list_tiers(timeout=5)).tiers[0].healthy
                    except errors.HeadraceError:
                        return False

                async with asyncio.timeout(PATIENCE):
                    while not await healthy():
                        assert running.returncode is None, await running.communicate()
                        await asyncio.sleep(0.05)
                yield Process(running, client)
        finally:
            if running.returncode is None:
                running.kill()
                await running.communicate()


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    """Issue certificates by an authority that the system does not know."""
    return issued(tmp_path, ["router"])


def tls_of(certificates: Certificates) -> ssl.SSLContext:
    """Return the context of a server with the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    files = certificates.client("router")
    context.load_cert_chain(files["cert"], files["key"])
    return context


async def test_a_certificate_of_an_unknown_authority_is_rejected(certificates: Certificates) -> None:
    async with (
        fake_upstream(tls_of(certificates)) as fake,
        running_upstream(fake, ready=False, probe_seconds=0.1) as tier,
    ):
        (url,) = tier.running.urls
        await eventually(lambda: "not checked" not in url.problem)

        assert "its certificate is not valid" in url.problem
        with pytest.raises(errors.NoWorkers, match="certificate"):
            await answer_of(tier, ask())
        assert not fake.seen


async def test_an_authority_of_your_own_is_accepted_by_ssl_cert_file(certificates: Certificates) -> None:
    async with (
        fake_upstream(tls_of(certificates)) as fake,
        process(fake, SSL_CERT_FILE=str(certificates.ca)) as running,
    ):
        assert (await collect(running.client, ask())).text == "Hello you"


async def test_sigterm_lets_an_answer_end_and_leaves_no_error_in_the_log() -> None:
    async def begins(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(delta("Hel"))
        await exchange.released_or_gone()
        await exchange.chunk(delta("lo") + finish() + usage(7, 2) + DONE)
        await exchange.chunk(b"")

    async with fake_upstream() as fake, process(fake) as running:
        fake.usual = begins
        answering = asyncio.create_task(collect(running.client, ask()))
        await eventually(lambda: fake.answering == 1)
        running.process.send_signal(signal.SIGTERM)
        fake.released.set()

        assert (await answering).text == "Hello"
        log = await running.log()
        assert running.process.returncode == 0
        assert {line["level"] for line in log} == {"INFO"}
        assert log[-1]["message"] == "stopped"


async def test_a_proxy_of_the_environment_is_used_with_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_upstream() as proxy:
        monkeypatch.setenv("http_proxy", f"http://user:secret@127.0.0.1:{proxy.port}")
        async with running_upstream("http://model.invalid/v1") as tier:
            answer = await answer_of(tier, ask())

        assert answer.text == "Hello you"
        assert proxy.seen[0].path == "http://model.invalid/v1/chat/completions"
        assert proxy.seen[0].headers["host"] == "model.invalid"
        assert proxy.seen[0].headers["proxy-authorization"] == "Basic dXNlcjpzZWNyZXQ="

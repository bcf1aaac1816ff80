"""The gateway as a service: its health, its metrics, and what stops its start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from headrace.gateway.__main__ import RunningGateway, gateway
from headrace.gateway.health import RouterHealth
from headrace.gateway.settings import Settings
from headrace.runtime.serving.server import PortInUse, StartFailed
from tests.harness import PATIENCE, eventually, running_mesh
from tests.security import Callers


def settings(router: str, **given: Any) -> Settings:
    return Settings(router=router, **{"port": 0, "drain_seconds": 0.0, **given})


@pytest.fixture
async def running() -> AsyncGenerator[RunningGateway, None]:
    async with (
        running_mesh("only") as mesh,
        gateway(settings(f"127.0.0.1:{mesh.port}", allow_origins="https://chat.example.org")) as started,
    ):
        await eventually(lambda: started.router.status()[0] == "ok")
        yield started


async def test_health_metrics_and_unknown_paths(running: RunningGateway) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.port}") as client:
        health, head = await client.get("/health"), await client.head("/health")
        metrics, nothing = await client.get("/metrics"), await client.post("/v2/x", content=b"x" * 100)
        allowed = await client.options(
            "/v1/chat/completions",
            headers={
                "origin": "https://chat.example.org",
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization",
            },
        )
        foreign = await client.get("/health", headers={"origin": "https://other.example.org"})
        running.http.requests.drain()
        draining, alive = await client.get("/health"), await client.get("/health/live")

    assert (health.status_code, head.status_code) == (200, 200)
    assert 'service_name="headrace-gateway"' in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain")
    assert nothing.status_code == 404
    assert nothing.json()["error"]["code"] == "unknown_path"
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "access-control-allow-origin" not in foreign.headers
    assert (draining.status_code, draining.json()["status"]) == (503, "draining")
    assert alive.status_code == 200


async def test_health_names_the_reason_while_the_router_cannot_serve() -> None:
    async with gateway(settings("127.0.0.1:1")) as started, httpx.AsyncClient() as client:
        await eventually(lambda: "reached" in started.router.status()[1])
        answer = await client.get(f"http://127.0.0.1:{started.port}/health")

    assert answer.status_code == 503
    assert answer.json()["status"] == "unavailable"
    assert "cannot be reached" in answer.json()["reason"]
    assert answer.headers["retry-after"] == "1"


async def test_tokens_do_not_leave_the_machine_in_plaintext(tmp_path: Path) -> None:
    callers = Callers(tmp_path / "callers.toml")
    with pytest.raises(StartFailed, match="--router-plaintext-tokens"):
        async with gateway(settings("router.example:50051", auth_tokens=callers.path)):
            pass
    async with gateway(
        settings("router.example:50051", auth_tokens=callers.path, router_plaintext_tokens=True)
    ):
        pass


async def test_a_web_page_cannot_rebind_its_name_to_an_open_gateway() -> None:
    async with gateway(settings("127.0.0.1:1", allow_hosts="Proxy.example")) as started:
        url = f"http://127.0.0.1:{started.port}/"
        async with httpx.AsyncClient() as client:
            answers = {
                host: (await client.get(url, headers={"host": host})).status_code
                for host in (
                    *("localhost", f"LOCALHOST:{started.port}", "localhost.", "a.localhost:1", "127.0.0.1"),
                    *("[::1]", "[::1]:80", "192.0.2.1:8080", "proxy.example:443"),
                    *(
                        "evil.example",
                        "127.0.0.1.evil.example",
                        "localhost.evil.example",
                        "evillocalhost",
                        "",
                    ),
                )
            }
            refused = await client.get(url, headers={"host": "evil.example"})

    assert [host for host, status in answers.items() if status != 200] == [*answers][-5:]
    assert refused.status_code == 421
    assert refused.json()["error"]["code"] == "unknown_host"


@pytest.mark.parametrize(
    ("given", "hosts"),
    [
        ({}, []),
        ({"allow_hosts": "*"}, None),
        ({"allow_hosts": "a, b"}, ["a", "b"]),
        ({"host": "0.0.0.0"}, None),
        ({"host": "0.0.0.0", "auth_anonymous": "allow"}, None),
        ({"host": "0.0.0.0", "allow_hosts": "a"}, ["a"]),
        ({"auth_tokens": "callers.toml"}, None),
        ({"auth_tokens": "callers.toml", "auth_anonymous": "allow"}, []),
        ({"auth_anonymous": "deny"}, None),
    ],
)
def test_names_matter_where_a_page_could_call_the_gateway(
    given: dict[str, Any], hosts: list[str] | None
) -> None:
    assert settings("127.0.0.1:1", **given).hosts == hosts


async def test_background_work_that_fails_stops_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would otherwise report forever what it saw last."""

    async def fail(self: RouterHealth) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(RouterHealth, "poll", fail)
    with pytest.RaisesGroup(RuntimeError):
        async with gateway(settings("127.0.0.1:1")), asyncio.timeout(PATIENCE):
            await asyncio.Event().wait()


async def test_a_port_in_use_stops_the_start(running: RunningGateway) -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(PortInUse, match="in use")):
        async with gateway(settings("127.0.0.1:1", port=running.port)):
            pass


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"https_cert": "a.pem"}, "need each other"),
        ({"tls_cert": "a.pem", "tls_key": "a.key"}, "needs --tls-ca"),
        ({"allow_origins": "chat.example.org"}, "is not an origin"),
        ({"allow_origins": "https://chat.example.org/"}, "is not an origin"),
        ({"allow_hosts": "https://gateway"}, "is not the name of a host"),
        ({"max_body_megabytes": 16}, "four times --max-body-megabytes"),
    ],
)
def test_settings_that_conflict_are_refused_in_words(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings("127.0.0.1:1", **given)

"""What a server's settings open, and what its start-up line reports."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from headrace import errors
from headrace.router.settings import Settings
from headrace.runtime.security.callers_file import entry_for, new_token
from headrace.runtime.security.guard import Guard, OpenGuard, Peer
from headrace.runtime.security.identity import ALL_SCOPES, Identity
from headrace.runtime.security.settings import only_loopback
from headrace.runtime.security_setup import security
from headrace.runtime.serving.server import StartFailed

LIST_TIERS = "/headrace.v1.RoutingService/ListTiers"
INSPECT = "/headrace.v1.AdminService/Inspect"


def settings(**changed: Any) -> Settings:
    return Settings(tiers="a=127.0.0.1:1", **changed)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "callers.toml"
    path.write_text(entry_for(new_token(), name="a", tenant="t"))
    return path


async def anonymous(guard: Guard, method: str = LIST_TIERS) -> Identity:
    return await guard.identify(method, (), Peer("ipv4:127.0.0.1:1"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "LOCALHOST"])
async def test_without_settings_a_server_on_loopback_is_open(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    guard = security(settings(host=host), "router").guard

    assert isinstance(guard, OpenGuard)
    assert (await anonymous(guard, INSPECT)).scopes == ALL_SCOPES
    assert lines(caplog) == [("INFO", "access to the server", "allow")]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "router.example", "0", "127.0.0.1.example"])
async def test_without_settings_a_server_elsewhere_serves_nobody_and_says_so(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    guard = security(settings(host=host), "router").guard

    with pytest.raises(errors.CredentialsRequired, match="--auth-tokens"):
        await anonymous(guard)
    assert lines(caplog)[0] == (
        "WARNING",
        "no caller is served: credentials are required, and none are configured",
        "deny",
    )
    assert "--auth-anonymous allow" in caplog.records[0].advice  # type: ignore[attr-defined]


async def test_an_open_server_elsewhere_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    guard = security(settings(host="0.0.0.0", auth_anonymous="allow"), "router").guard

    assert isinstance(guard, OpenGuard)
    assert lines(caplog) == [("WARNING", "callers without credentials are served", "allow")]
    assert "everything" in caplog.records[0].open  # type: ignore[attr-defined]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_where_credentials_are_configured_anonymous_callers_are_refused(
    host: str, tokens: Path
) -> None:
    """On loopback as well: a proxy on this machine may pass on calls of others."""
    with pytest.raises(errors.CredentialsRequired):
        await anonymous(security(settings(host=host, auth_tokens=tokens), "router").guard)


async def test_anonymous_callers_beside_others_are_a_tenant_of_their_own(tokens: Path) -> None:
    guard = security(settings(auth_tokens=tokens, auth_anonymous="allow"), "router").guard

    assert await anonymous(guard) == Identity(
        name="anonymous", scopes=frozenset(("generate", "feedback")), tenant="anonymous", max_priority=5
    )
    with pytest.raises(errors.CredentialsRequired, match="scope admin"):
        await anonymous(guard, INSPECT)


async def test_loopback_can_be_closed() -> None:
    with pytest.raises(errors.CredentialsRequired):
        await anonymous(security(settings(auth_anonymous="deny"), "router").guard)


@pytest.mark.parametrize("content", [None, "no", "[[tokens]]\n"])
def test_a_file_that_is_not_usable_stops_the_start(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "callers.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(StartFailed, match=f"--auth-tokens {path}: "):
        security(settings(auth_tokens=path), "router")
    with pytest.raises(StartFailed, match=f"--auth-jwks {path}: "):
        security(settings(auth_jwks=str(path), auth_issuer="i", auth_audience="a"), "router")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"auth_jwks": "keys.json"}, "AUTH_ISSUER"),
        ({"auth_jwks": "keys.json", "auth_issuer": "i"}, "AUTH_AUDIENCE"),
        ({"auth_issuer": "i"}, "no effect"),
        ({"auth_jwks": "http://issuer.example/", "auth_issuer": "i", "auth_audience": "a"}, "https://"),
        ({"auth_jwks": "file:///etc/keys", "auth_issuer": "i", "auth_audience": "a"}, "https://"),
        ({"auth_jwks": "https:///keys", "auth_issuer": "i", "auth_audience": "a"}, "https://"),
        ({"auth_jwks": "https://u:p@x/keys", "auth_issuer": "i", "auth_audience": "a"}, "credentials"),
        ({"auth_jwks": "https://x:port/keys", "auth_issuer": "i", "auth_audience": "a"}, "not a URL"),
    ],
)
def test_settings_that_would_accept_too_much_are_refused(changed: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changed)


def test_an_address_without_a_route_is_not_loopback() -> None:
    """0.0.0.0 as a target is this machine, as an address to listen on it is every one."""
    assert not only_loopback("0.0.0.0")
    assert not only_loopback("::")


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, str]]:
    return [
        (record.levelname, record.message, record.anonymous)  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name == "headrace.runtime.security_setup"
    ]

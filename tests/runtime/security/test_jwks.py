"""The keys of JWTs: which are used, how they are replaced, and what an outage of their server does."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace import errors
from headrace.runtime.security import jwks as module
from headrace.runtime.security.jwks import KeySource, parse
from headrace.runtime.security.watched_file import BadFile
from tests.harness import PATIENCE, eventually
from tests.issuer import SigningKey, jwks, published

FIRST, SECOND = SigningKey("first"), SigningKey("second")


@asynccontextmanager
async def watched(source: str, **options: Any) -> AsyncGenerator[KeySource, None]:
    """Keep the keys of a source up to date while the block runs."""
    keys = KeySource(source, **options)
    keys.load()
    watching = asyncio.create_task(keys.watch())
    try:
        yield keys
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def knows(keys: KeySource, key: SigningKey) -> bool:
    try:
        return (await keys.find(key.kid, key.algorithm)).kid == key.kid
    except errors.CredentialsInvalid:
        return False


def test_a_key_verifies_only_the_algorithms_of_its_type_and_of_its_entry() -> None:
    rsa, curve = SigningKey("rsa", "RS256"), SigningKey("curve")
    entries = [rsa.jwk(), rsa.jwk(alg="PS384"), curve.jwk(), curve.jwk(alg="RS256")]
    # The second entry of the curve is none: its algorithm is of another type.
    first, second, third = parse(json.dumps({"keys": entries}).encode())

    assert first.algorithms == {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
    assert second.algorithms == {"PS384"}
    assert third.algorithms == {"ES256"}


@pytest.mark.parametrize(
    "entry",
    [
        {"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"},
        {"kty": "RSA", "n": "AQAB", "e": "AQAB"},
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kty": "EC", "crv": "Ed25519"},
        {"kty": "EC"},
        FIRST.jwk(use="enc"),
        FIRST.jwk(d="AA"),
        FIRST.jwk(kid=7),
        "text",
        None,
    ],
)
def test_keys_that_are_not_public_ones_for_signatures_are_left_out(entry: object) -> None:
    assert [key.kid for key in parse(json.dumps({"keys": [entry, SECOND.jwk()]}).encode())] == ["second"]
    with pytest.raises(BadFile, match="no public key"):
        parse(json.dumps({"keys": [entry]}).encode())


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"{}", b'{"keys": 1}', b"[" * 100_000, b"\xff", jwks(*[FIRST] * 101)]
)
def test_what_is_no_key_set_is_refused(data: bytes) -> None:
    with pytest.raises(BadFile):
        parse(data)


async def test_two_keys_of_one_name_are_both_unknown() -> None:
    """A verifier cannot choose between them."""
    with published(jwks(FIRST, SigningKey("first"))) as server:
        async with watched(server.url) as keys:
            await eventually(lambda: keys.generation)
            assert not await knows(keys, FIRST)


async def test_a_file_is_read_again_when_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("headrace.runtime.security.watched_file.POLL_SECONDS", 0.01)
    path = tmp_path / "jwks.json"
    path.write_bytes(jwks(FIRST))
    async with watched(str(path)) as keys:
        assert await knows(keys, FIRST)
        for times, broken in enumerate((b"{", b""), start=1):
            replace(path, broken)
            await eventually(lambda: caplog.text.count("keeping its last content") == times)  # noqa: B023
            assert await knows(keys, FIRST)
        path.unlink()
        replace(path, jwks(SECOND))
        await eventually(lambda: keys.generation == 2)
        assert await knows(keys, SECOND)
        assert not await knows(keys, FIRST), "it was withdrawn"


async def test_a_file_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="cannot be read"):
        KeySource(str(tmp_path / "none.json")).load()
    (tmp_path / "bad.json").write_text("no")
    with pytest.raises(BadFile, match="not JSON"):
        KeySource(str(tmp_path / "bad.json")).load()


async def test_an_unknown_key_is_fetched_at_once_but_not_more_often_than_allowed() -> None:
    clock = Clock()
    with published(jwks(FIRST)) as server:
        async with watched(server.url, clock=clock) as keys:
            await eventually(lambda: keys.generation == 1)
            server.body = jwks(FIRST, SECOND)
            assert not await knows(keys, SECOND), "the last fetch was just now"
            clock.now += module.RETRY_SECONDS
            assert await knows(keys, SECOND), "its first token is accepted"
            for _ in range(20):
                assert not await knows(keys, SigningKey("forged"))
            assert server.fetches == 2


async def test_tokens_of_an_unknown_key_that_arrive_together_cause_one_fetch() -> None:
    clock = Clock()
    with published(jwks(FIRST)) as server:
        async with watched(server.url, clock=clock) as keys:
            await eventually(lambda: keys.generation == 1)
            clock.now += module.RETRY_SECONDS
            server.body = jwks(SECOND)
            server.go.clear()
            waiting = [asyncio.create_task(knows(keys, SECOND)) for _ in range(2 * module.MAX_WAITING)]
            # The event loop is free while the fetch lasts, and those beyond the limit are refused.
            await eventually(lambda: sum(task.done() for task in waiting) == module.MAX_WAITING)
            server.go.set()
            assert sum(await asyncio.gather(*waiting)) == module.MAX_WAITING
            assert server.fetches == 2


async def test_tokens_that_arrive_during_a_fetch_cause_no_other_one() -> None:
    clock = Clock()
    with published(jwks(FIRST)) as server:
        async with watched(server.url, clock=clock) as keys:
            await eventually(lambda: keys.generation == 1)
            clock.now += module.RETRY_SECONDS
            server.go.clear()
            waiting = [asyncio.create_task(knows(keys, SECOND))]
            await eventually(lambda: server.fetches == 2)
            waiting += [asyncio.create_task(knows(keys, SECOND)) for _ in range(3)]
            await asyncio.sleep(0)
            server.go.set()
            assert await asyncio.gather(*waiting) == [False] * 4
            clock.now += module.RETRY_SECONDS
            assert not await knows(keys, SECOND)
            assert server.fetches == 3


@pytest.mark.parametrize("body", [None, b"no keys", b'{"keys": []}', b" " * (module.MAX_BYTES + 1)])
async def test_an_outage_of_the_server_keeps_the_last_keys(body: bytes | None) -> None:
    clock = Clock()
    with published(jwks(FIRST)) as server:
        async with watched(server.url, clock=clock) as keys:
            await eventually(lambda: keys.generation == 1)
            server.body = body
            clock.now += module.RETRY_SECONDS
            assert not await knows(keys, SECOND)
            assert server.fetches == 2
            assert await knows(keys, FIRST)


async def test_without_any_keys_yet_the_caller_is_asked_to_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token may be right."""
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    with published(None) as server:
        async with watched(server.url) as keys:
            with pytest.raises(errors.Unavailable) as caught:
                await keys.find("first", "ES256")
            assert caught.value.retry_after
            server.body = jwks(FIRST)
            async with asyncio.timeout(PATIENCE):
                while not keys.generation:
                    await asyncio.sleep(0.01)
            assert await knows(keys, FIRST)


async def test_redirects_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a server could choose where this process connects to."""
    with published(jwks(FIRST)) as target, published(b"", redirect=target.url) as server:
        async with watched(server.url) as keys:
            with pytest.raises(errors.Unavailable):
                await keys.find("first", "ES256")
        assert server.fetches == 1
        assert target.fetches == 0


def replace(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(data)
    os.replace(new, path)

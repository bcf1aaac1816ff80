"""JWTs: which are accepted, and which attacks are refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from headrace import errors
from headrace.runtime.security import web_tokens
from headrace.runtime.security.identity import Identity
from headrace.runtime.security.jwks import KeySource
from headrace.runtime.security.web_tokens import WebTokens, WebTokenVerifier
from tests.issuer import AUDIENCE, ISSUER, SigningKey, jwks

KEY = SigningKey("k1")
RSA = SigningKey("rsa", "RS256")
OTHER = SigningKey("k1")  # of somebody else, with the same name


@pytest.fixture
def verifier(tmp_path: Path) -> WebTokenVerifier:
    return verifier_of(tmp_path, KEY, RSA)


def verifier_of(folder: Path, *keys: SigningKey, tenant_claim: str = "tenant") -> WebTokenVerifier:
    path = folder / "jwks.json"
    path.write_bytes(jwks(*keys))
    source = KeySource(str(path))
    source.load()
    return WebTokenVerifier(WebTokens(ISSUER, AUDIENCE, tenant_claim), source)


def encoded(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def claims(**changed: Any) -> dict[str, Any]:
    now = int(time.time())
    return {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "tenant": "search", "exp": now + 600, **changed}


async def test_the_claims_are_the_identity(verifier: WebTokenVerifier) -> None:
    assert await verifier.identify(KEY.token()) == Identity(
        name="alice", scopes=frozenset(("generate", "feedback")), tenant="search", max_priority=5
    )
    token = RSA.token(
        scope="openid headrace:generate admin", max_priority=8, quota="gold", aud=["x", AUDIENCE]
    )
    assert await verifier.identify(token) == Identity(
        name="alice",
        scopes=frozenset(("generate", "admin")),
        tenant="search",
        max_priority=8,
        quota="gold",
    )


@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "ES384", "EdDSA"])
async def test_asymmetric_algorithms_are_accepted(tmp_path: Path, algorithm: str) -> None:
    key = SigningKey("k", algorithm)

    assert (await verifier_of(tmp_path, key).identify(key.token())).name == "alice"


async def test_a_token_without_the_name_of_a_key_is_verified_if_only_one_fits(tmp_path: Path) -> None:
    nameless = SigningKey(None)

    assert (await verifier_of(tmp_path, nameless, RSA).identify(nameless.token())).name == "alice"
    with pytest.raises(errors.CredentialsInvalid):
        await verifier_of(tmp_path, nameless, KEY).identify(nameless.token())


async def test_another_claim_may_name_the_tenant(tmp_path: Path) -> None:
    verifier = verifier_of(tmp_path, KEY, tenant_claim="sub")

    assert (await verifier.identify(KEY.token(without="tenant"))).tenant == "alice"


FORGED = {
    "signed by another key": lambda: OTHER.token(),
    "unsigned": lambda: f"{encoded({'alg': 'none'})}.{encoded(claims())}.",
    "unsigned, in capitals": lambda: f"{encoded({'alg': 'NONE', 'kid': 'k1'})}.{encoded(claims())}.",
    "HMAC with the public key": lambda: hmac_token(RSA, "HS256"),
    "HMAC that claims to be RSA": lambda: hmac_token(RSA, "RS256"),
    "the key in the token": lambda: OTHER.token(headers={"jwk": OTHER.jwk()}),
    "the address of the key in the token": lambda: OTHER.token(headers={"jku": "http://127.0.0.1:1/"}),
    "the algorithm of another type of key": lambda: RSA.token(headers={"kid": "k1"}),
    "an unknown key": lambda: KEY.token(headers={"kid": "../../etc/passwd"}),
    "a changed payload": lambda: changed(KEY.token()),
    "no signature": lambda: KEY.token().rpartition(".")[0] + ".",
    "an unknown critical header": lambda: KEY.token(headers={"crit": ["x"], "x": 1}),
    "a detached payload": lambda: KEY.token(headers={"crit": ["b64"], "b64": False}),
}


def hmac_token(key: SigningKey, algorithm: str) -> str:
    signed = f"{encoded({'alg': algorithm, 'kid': key.kid})}.{encoded(claims())}"
    return f"{signed}.{encoded(hmac.digest(key.pem, signed.encode(), hashlib.sha256))}"


def changed(token: str) -> str:
    header, _, signature = token.split(".")
    return f"{header}.{encoded(claims(tenant='other'))}.{signature}"


@pytest.mark.parametrize("forgery", FORGED)
async def test_a_forged_token_is_refused(verifier: WebTokenVerifier, forgery: str) -> None:
    with pytest.raises(errors.CredentialsInvalid):
        await verifier.identify(FORGED[forgery]())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp": 1}, "expired"),
        ({"exp": int(time.time()) - 61}, "expired"),
        ({"without": "exp"}, "no claim 'exp'"),
        ({"without": "aud"}, "no claim 'aud'"),
        ({"without": "iss"}, "no claim 'iss'"),
        ({"without": "sub"}, "no claim 'sub'"),
        ({"without": "tenant"}, "'tenant' of the JWT does not name a tenant"),
        ({"aud": "another"}, "another audience"),
        ({"aud": f"{AUDIENCE} "}, "another audience"),
        ({"iss": f"{ISSUER}/"}, "another issuer"),
        ({"nbf": 4_000_000_000}, "not valid yet"),
        ({"iat": 4_000_000_000}, "not valid yet"),
        ({"tenant": ""}, "tenant"),
        ({"tenant": ["search"]}, "tenant"),
        ({"tenant": "a\nb"}, "tenant"),
        ({"tenant": "x" * 257}, "tenant"),
        ({"sub": 7}, "not a valid JWT"),
        ({"sub": ""}, "'sub'"),
        ({"max_priority": 10}, "max_priority"),
        ({"max_priority": True}, "max_priority"),
        ({"max_priority": "9"}, "max_priority"),
        ({"quota": 1}, "quota"),
        ({"exp": "soon"}, "not a valid JWT"),
        ({"exp": 1e400}, "not a valid JWT"),
    ],
)
async def test_a_token_with_wrong_claims_is_refused_with_the_reason(
    verifier: WebTokenVerifier, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(errors.CredentialsInvalid, match=message):
        await verifier.identify(KEY.token(**changes))


@pytest.mark.parametrize(("claim", "offset"), [("exp", -20), ("nbf", 40), ("iat", 40)])
async def test_clocks_may_differ_by_a_minute(verifier: WebTokenVerifier, claim: str, offset: int) -> None:
    late: dict[str, Any] = {claim: int(time.time()) + offset}

    assert (await verifier.identify(KEY.token(**late))).name == "alice"


@pytest.mark.parametrize("scope", ["openid profile", [], 7, ""])
async def test_scopes_of_others_permit_nothing(verifier: WebTokenVerifier, scope: object) -> None:
    assert (await verifier.identify(KEY.token(scope=scope))).scopes == frozenset()


async def test_a_token_cannot_make_its_owner_a_service(verifier: WebTokenVerifier) -> None:
    assert (await verifier.identify(KEY.token(scope="router batcher generate"))).scopes == {"generate"}


@pytest.mark.parametrize(
    "token",
    ["a.b.c", "..", "é.é.é", f"{'[' * 3000}.b.c", f"{encoded(b'[' * 3000)}.{encoded({})}.x"],
)
async def test_what_is_no_token_is_refused(verifier: WebTokenVerifier, token: str) -> None:
    with pytest.raises(errors.CredentialsInvalid):
        await verifier.identify(token)


async def test_a_verified_token_is_remembered_until_it_expires(
    verifier: WebTokenVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = 0
    decode = jwt.decode

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal verified
        verified += 1
        return decode(*arguments, **options)

    monkeypatch.setattr(jwt, "decode", counting)
    token = KEY.token()
    for _ in range(3):
        await verifier.identify(token)
    assert verified == 1

    later = time.time() + 700
    monkeypatch.setattr("headrace.runtime.security.web_tokens.time.time", lambda: later)
    await verifier.identify(token)  # jwt has a clock of its own: the token is verified again
    assert verified == 2


async def test_remembered_tokens_are_bounded(
    verifier: WebTokenVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_tokens, "MAX_VERIFIED", 2)
    for number in range(4):
        await verifier.identify(KEY.token(sub=f"caller {number}"))

    assert len(verifier._verified) == 2

"""Verify JWTs (RFC 7519) as bearer tokens, by the rules of RFC 8725.

The algorithm must be an asymmetric one that the type of the key allows. So `none` and HMAC with a public key
as the secret are refused, and keys that the JWT itself names or contains (`jku`, `x5u`, `jwk`) are not read.
The claims `exp`, `iss`, `aud` and `sub` are required.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jwt

from headrace import errors
from headrace.runtime.security.callers_file import DEFAULT_SCOPES, Grant, digest
from headrace.runtime.security.identity import DEFAULT_PRIORITY, MAX_PRIORITY, Identity, Scope, is_name
from headrace.runtime.security.jwks import ALGORITHMS, KeySource

log = logging.getLogger(__name__)

CLOCK_SKEW_SECONDS = 60
MAX_VERIFIED = 4096  # JWTs whose verification is remembered; one takes about 0.1 ms
SCOPE_PREFIX = "headrace:"  # optional
# Services have certificates; a JWT is a caller's.
_SCOPES: frozenset[Scope] = frozenset(("generate", "feedback", "admin"))


@dataclass(frozen=True, slots=True)
class WebTokens:
    """The JWTs that are accepted."""

    issuer: str
    audience: str
    tenant_claim: str = "tenant"


class WebTokenVerifier:
    """Verifies JWTs, and remembers those that were verified."""

    def __init__(self, accepted: WebTokens, keys: KeySource) -> None:
        self._accepted = accepted
        self._keys = keys
        self._generation = keys.generation
        self._verified: OrderedDict[bytes, Grant] = OrderedDict()  # by the hash of the JWT

    async def identify(self, token: str) -> Identity:
        """Return whose JWT it is. Raises CredentialsInvalid, and Unavailable if no keys are known yet."""
        if self._generation != self._keys.generation:  # a key may have been withdrawn
            self._generation = self._keys.generation
            self._verified.clear()
        key = digest(token)
        if (grant := self._verified.get(key)) is not None and not grant.expired(time.time()):
            return grant.identity
        generation = self._generation
        grant = _grant(await self._claims(token), self._accepted.tenant_claim)
        if generation == self._keys.generation:
            self._verified[key] = grant
            if len(self._verified) > MAX_VERIFIED:
                self._verified.popitem(last=False)
        return grant.identity

    async def _claims(self, token: str) -> Mapping[str, Any]:
        """Return the claims of a JWT whose signature, times, issuer and audience are right."""
        try:
            header = jwt.get_unverified_header(token)
            algorithm = header.get("alg")
            if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
                raise errors.CredentialsInvalid(
                    f"the JWT must be signed with one of {', '.join(sorted(ALGORITHMS))}"
                )
            key = await self._keys.find(header.get("kid"), algorithm)
            return jwt.decode(
                token,
                key.public,
                algorithms=[algorithm],
                audience=self._accepted.audience,
                issuer=self._accepted.issuer,
                leeway=CLOCK_SKEW_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except errors.HeadraceError:
            raise
        except jwt.PyJWTError as error:
            raise errors.CredentialsInvalid(_why(error)) from None
        except Exception as error:  # such as OverflowError for an infinite `exp`
            log.info("JWT not readable", extra={"problem": type(error).__name__})
            raise errors.CredentialsInvalid("the bearer token is not a valid JWT") from None


# The caller receives only what helps to correct its set-up. PyJWT's messages may quote the token.
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (jwt.ExpiredSignatureError, "the JWT has expired: obtain a new one"),
    (
        jwt.ImmatureSignatureError,
        "the JWT is not valid yet: check the clocks of its issuer and of this server",
    ),
    (jwt.InvalidAudienceError, "the JWT was issued for another audience"),
    (jwt.InvalidIssuerError, "the JWT is from another issuer"),
    (jwt.InvalidSignatureError, "the signature of the JWT is wrong"),
)


def _why(error: jwt.PyJWTError) -> str:
    if isinstance(error, jwt.MissingRequiredClaimError):
        return f"the JWT has no claim {error.claim!r}"
    found = (text for kind, text in _REASONS if isinstance(error, kind))
    return next(found, "the bearer token is not a valid JWT")


def _grant(claims: Mapping[str, Any], tenant_claim: str) -> Grant:
    """Return what the claims grant, until they expire. Raises CredentialsInvalid."""
    name, tenant = claims["sub"], claims.get(tenant_claim)
    if not is_name(name):
        raise errors.CredentialsInvalid("the claim 'sub' of the JWT is not a name")
    if not is_name(tenant):
        raise errors.CredentialsInvalid(f"the claim {tenant_claim!r} of the JWT does not name a tenant")
    priority, quota = claims.get("max_priority", DEFAULT_PRIORITY), claims.get("quota", "")
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= MAX_PRIORITY:
        raise errors.CredentialsInvalid(f"the claim 'max_priority' of the JWT must be 0 to {MAX_PRIORITY}")
    if quota != "" and not is_name(quota):
        raise errors.CredentialsInvalid("the claim 'quota' of the JWT is not a name")
    identity = Identity(
        name=name,
        scopes=_scopes(claims),
        tenant=cast("str", tenant),
        max_priority=priority,
        quota=quota,
    )
    return Grant(identity, float(claims["exp"]) + CLOCK_SKEW_SECONDS)


def _scopes(claims: Mapping[str, Any]) -> frozenset[Scope]:
    """Return our scopes among those of the claims `scope` (RFC 8693) and `scp`; default ones without both."""
    listed = claims.get("scope", claims.get("scp"))
    if listed is None:
        return frozenset(DEFAULT_SCOPES)
    names = listed.split() if isinstance(listed, str) else listed if isinstance(listed, list) else []
    found = {str(name).removeprefix(SCOPE_PREFIX) for name in names}
    return frozenset(scope for scope in _SCOPES if scope in found)

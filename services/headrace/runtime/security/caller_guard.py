"""Decide who may call what: `AccessGuard` combines bearer tokens, client certificates and anonymous access.

`guarding` makes the guard of a server from its settings. This module does not know the methods of a service:
each service passes the scopes that its methods need.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from headrace import errors
from headrace.runtime.security.callers_file import CallersFile
from headrace.runtime.security.guard import Metadata, Peer
from headrace.runtime.security.identity import ANONYMOUS, Identity, Scope

if TYPE_CHECKING:  # JWTs need PyJWT, which not every process has
    from headrace.runtime.security.web_tokens import WebTokenVerifier

log = logging.getLogger(__name__)

# The scopes, any one of which permits a method: by "/package.Service/Method", or "/package.Service/" for all.
Rules: TypeAlias = Mapping[str, frozenset[Scope]]

# Returns the identity of a verified client certificate, by the properties in `Peer.certificate`, or None.
RoleOf: TypeAlias = Callable[[Mapping[str, tuple[bytes, ...]]], Identity | None]

HEALTH = "/grpc.health.v1.Health/"
ADMIN: frozenset[Scope] = frozenset(("admin",))
MAX_TOKEN = 8192  # characters
AUTHORIZATION = "authorization"

_BEARER = "bearer "


class AccessGuard:
    """Accepts a call if a bearer token, a client certificate or the rule for anonymous callers permits it.

    Health is open. For other methods, the first of these decides, and the later ones are not tried: the bearer
    token, if the server accepts any; the certificate, by the file of callers and then by its role; *anonymous*.

    rules         scopes per method; methods that they do not name need the scope admin
    anonymous     the identity of callers without credentials; None: they are refused
    callers       returns the current file of callers; None: tokens of such a file are not accepted
    web_tokens    verifies JWTs; None: they are not accepted
    role          returns the identity of a certificate by the role that it names; None if it names none
    """

    def __init__(
        self,
        rules: Rules,
        *,
        anonymous: Identity | None,
        callers: Callable[[], CallersFile] | None = None,
        web_tokens: WebTokenVerifier | None = None,
        role: RoleOf | None = None,
    ) -> None:
        self._rules = rules
        self._anonymous = anonymous
        self._callers = callers
        self._web_tokens = web_tokens
        self._role = role
        self._reads_tokens = callers is not None or web_tokens is not None

    async def identify(self, method: str, metadata: Metadata, peer: Peer) -> Identity:
        """See `guard.Guard`."""
        if method.startswith(HEALTH):
            return ANONYMOUS
        identity: Identity | None = None
        try:
            identity = await self._who(metadata, peer)
            self._check(method, identity)
        except errors.HeadraceError as error:
            _log_refusal(error, method, peer, identity)
            raise
        except Exception as error:  # its text and its traceback may contain the token
            log.error("guard failed", extra={"method": method, "problem": type(error).__name__})
            raise errors.InternalError("internal error; the server's log has the details") from None
        return identity

    async def _who(self, metadata: Metadata, peer: Peer) -> Identity:
        """Return the identity that the credentials of a call prove."""
        if self._reads_tokens:
            sent = [value for key, value in metadata if key == AUTHORIZATION]
            if sent:
                return await self._whose_token(_bearer(sent))
        if peer.certificate and (identity := self._whose_certificate(peer.certificate)) is not None:
            return identity
        if self._anonymous is None:
            raise errors.CredentialsRequired(self._required())
        return self._anonymous

    async def _whose_token(self, token: str) -> Identity:
        if self._web_tokens is not None and token.count(".") == 2:
            return await self._web_tokens.identify(token)
        if self._callers is None:
            raise errors.CredentialsInvalid(
                "the bearer token is not a JWT, and this server accepts only JWTs"
            )
        return self._callers().identify(token, time.time())

    def _whose_certificate(self, certificate: Mapping[str, tuple[bytes, ...]]) -> Identity | None:
        if self._callers is not None and (listed := self._callers().certificates):
            now = time.time()
            for name in (*certificate.get("peer_uri", ()), *certificate.get("peer_dns", ())):
                grant = listed.get(name.decode(errors="replace"))
                if grant is not None and not grant.expired(now):
                    return grant.identity
        return None if self._role is None else self._role(certificate)

    def _check(self, method: str, identity: Identity) -> None:
        needed = self._rules.get(method)
        if needed is None:
            needed = self._rules.get(method[: method.rfind("/") + 1], ADMIN)
        if needed.isdisjoint(identity.scopes):
            listed = " or ".join(sorted(needed))
            if identity is self._anonymous:
                raise errors.CredentialsRequired(
                    f"{method} needs credentials with the scope {listed}", scope=listed
                )
            raise errors.Forbidden(
                f"the caller may not call {method}: it needs the scope {listed}", scope=listed
            )

    def _required(self) -> str:
        accepted: list[str] = []
        if self._reads_tokens:
            accepted.append("send `authorization: Bearer TOKEN`")
        if self._role is not None:
            accepted.append("use a client certificate that names a role or a caller of this server")
        if not accepted:
            return (
                "this server serves no callers yet: its operator must configure credentials (--auth-tokens, "
                "--auth-jwks or --tls-ca), or set --auth-anonymous allow"
            )
        return f"the call has no credentials that this server accepts: {', or '.join(accepted)}"


def _bearer(sent: list[str | bytes]) -> str:
    """Return the token of the authorization headers of a call. Raises CredentialsInvalid."""
    value = sent[0]
    if len(sent) > 1 or not isinstance(value, str) or value[: len(_BEARER)].lower() != _BEARER:
        raise errors.CredentialsInvalid("the metadata must contain `authorization: Bearer TOKEN` once")
    token = value[len(_BEARER) :].strip(" ")
    if not token or len(token) > MAX_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise errors.CredentialsInvalid(
            f"a bearer token has 1 to {MAX_TOKEN} characters, which are printable ASCII without spaces"
        )
    return token


def _log_refusal(error: errors.HeadraceError, method: str, peer: Peer, identity: Identity | None) -> None:
    caller = {} if identity is None else {"caller": identity.name}
    log.warning(
        "call refused", extra={"method": method, "peer": peer.address, "reason": error.reason, **caller}
    )

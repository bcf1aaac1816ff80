"""Decide who may call what: `CallerGuard` combines bearer tokens, client certificates and anonymous access.

`access` lists the scopes that methods need, `callers_file` and `web_tokens` read tokens, and `peers` knows
the roles of certificates. `headrace.runtime.security_setup` makes the guard from the settings.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace import errors
from headrace.bearer import AUTHORIZATION, MAX_TOKEN, is_token
from headrace.runtime.security.access import ServiceName, credential_settings, required_scope
from headrace.runtime.security.callers_file import CallersFile
from headrace.runtime.security.guard import Metadata, Peer
from headrace.runtime.security.identity import Identity, Scope
from headrace.runtime.security.peers import CALLER_SCOPES, Peers, has_certificate, names_of

if TYPE_CHECKING:  # JWTs need PyJWT, which not every process has
    from headrace.runtime.security.web_tokens import WebTokenVerifier

log = logging.getLogger(__name__)

REFLECTION = ("/grpc.reflection.v1.ServerReflection/", "/grpc.reflection.v1alpha.ServerReflection/")

_BEARER = "bearer "
_ANYBODY = Identity(name="anonymous", scopes=frozenset())  # where no scope is needed


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """What a server accepts as proof of an identity.

    anonymous    the identity of callers without credentials; None: they are refused
    callers      returns the current file of callers; None: its tokens are not accepted
    web_tokens   verifies JWTs; None: they are not accepted
    peers        the identities of client certificates; None: there are none
    """

    anonymous: Identity | None = None
    callers: Callable[[], CallersFile] | None = None
    web_tokens: WebTokenVerifier | None = None
    peers: Peers | None = None

    @property
    def tokens(self) -> bool:
        """Whether bearer tokens are read."""
        return self.callers is not None or self.web_tokens is not None


class CallerGuard:
    """Accepts a call if a bearer token, a client certificate or the rule for anonymous callers permits it.

    Health is open. For other methods, the first of these that is there decides: a bearer token, if the server
    accepts any; a certificate that the file of callers lists; a certificate by its role; *anonymous*.

    service            the service that is guarded
    reflection_open    whether all callers that are served may use reflection
    maintained         keep what is accepted up to date, until cancelled
    """

    def __init__(
        self,
        service: ServiceName,
        accepted: Accepted,
        *,
        reflection_open: bool = False,
        maintained: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = (),
    ) -> None:
        self._service = service
        self._accepted = accepted
        self._reflection_open = reflection_open
        self._maintained = maintained

    async def maintain(self) -> None:
        """See `guard.Guard`."""
        async with asyncio.TaskGroup() as tasks:
            for each in self._maintained:
                tasks.create_task(each())

    async def identify(self, method: str, metadata: Metadata, peer: Peer) -> Identity:
        """See `guard.Guard`."""
        scope = required_scope(self._service, method)
        if scope is None:
            return _ANYBODY
        if self._reflection_open and method.startswith(REFLECTION):
            scope = None
        identity: Identity | None = None
        try:
            identity = await self._who(metadata, peer)
            if scope is not None and scope not in identity.scopes:
                raise self._not_permitted(method, identity, scope)
        except errors.HeadraceError as error:
            _log_refusal(error, method, peer, identity)
            raise
        except Exception as error:  # its text and its traceback may contain the token
            log.error("guard failed", extra={"method": method, "problem": type(error).__name__})
            raise errors.InternalError("internal error; the server's log has the details") from None
        return identity

    async def _who(self, metadata: Metadata, peer: Peer) -> Identity:
        """Return the identity that the credentials of a call prove."""
        accepted = self._accepted
        if accepted.tokens:
            sent = [value for key, value in metadata if key == AUTHORIZATION]
            if sent:
                return await self._whose_token(_bearer(sent))
        if has_certificate(peer) and (identity := self._whose_certificate(peer)) is not None:
            return identity
        if accepted.anonymous is None:
            raise errors.CredentialsRequired(self._required())
        return accepted.anonymous

    async def _whose_token(self, token: str) -> Identity:
        accepted = self._accepted
        if accepted.web_tokens is not None and token.count(".") == 2:
            return await accepted.web_tokens.identify(token)
        if accepted.callers is None:
            raise errors.CredentialsInvalid(
                "the bearer token is not a JWT, and this server accepts only JWTs"
            )
        return accepted.callers().identify(token, time.time())

    def _whose_certificate(self, peer: Peer) -> Identity | None:
        """Return the identity of a certificate; None if it neither is listed nor has a role.

        Where the file of callers lists no certificate, each one that is verified is a caller's.
        """
        listed = {} if self._accepted.callers is None else self._accepted.callers().certificates
        if listed:
            uris, names = names_of(peer.certificate)
            for name in (*uris, *names):
                if (grant := listed.get(name)) is not None:
                    return grant.valid(time.time(), "the permission of the client certificate has expired")
        identity = None if self._accepted.peers is None else self._accepted.peers.identity(peer)
        return None if listed and identity is not None and identity.scopes == CALLER_SCOPES else identity

    def _not_permitted(self, method: str, identity: Identity, scope: Scope) -> errors.HeadraceError:
        if identity is self._accepted.anonymous:
            return errors.CredentialsRequired(
                f"{method} requires credentials with the scope {scope}", scope=scope
            )
        return errors.Forbidden(
            f"{identity.name} may not call {method}: it requires the scope {scope}", scope=scope
        )

    def _required(self) -> str:
        ways = ["send `authorization: Bearer TOKEN`"] if self._accepted.tokens else []
        if self._accepted.peers is not None:
            ways.append("use a client certificate")
        if not ways:
            return (
                "this server serves no callers yet: its operator must configure credentials "
                f"({credential_settings(self._service)}), or set --auth-anonymous allow"
            )
        return f"the call has no credentials that this server accepts: {' or '.join(ways)}"


def _bearer(sent: list[str | bytes]) -> str:
    """Return the token of the authorization headers of a call. Raises CredentialsInvalid."""
    value = sent[0]
    if len(sent) > 1 or not isinstance(value, str) or value[: len(_BEARER)].lower() != _BEARER:
        raise errors.CredentialsInvalid("the call must have the header `authorization: Bearer TOKEN` once")
    token = value[len(_BEARER) :].strip(" ")
    if not is_token(token):
        raise errors.CredentialsInvalid(
            f"a bearer token has 1 to {MAX_TOKEN} characters, which are printable ASCII without spaces"
        )
    return token


def _log_refusal(error: errors.HeadraceError, method: str, peer: Peer, identity: Identity | None) -> None:
    caller = {} if identity is None else {"caller": identity.name}
    log.warning(
        "call refused", extra={"method": method, "peer": peer.address, "reason": error.reason, **caller}
    )

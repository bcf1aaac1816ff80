"""Describe who calls: the identity behind a call, its scopes and its limits.

A `Guard` finds the identity before the call's message is read. The interceptor keeps it for the length of the
call, where `current` returns it. This module does not know how an identity is proved.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, TypeAlias

# generate: Generate, Multiplex, Explain, ListTiers. feedback: Feedback. admin: Inspect, reflection, channelz.
# router: what routers call on batchers. batcher: what batchers call on workers.
Scope: TypeAlias = Literal["generate", "feedback", "admin", "router", "batcher"]
ALL_SCOPES: frozenset[Scope] = frozenset(("generate", "feedback", "admin", "router", "batcher"))
MAX_PRIORITY = 9
MAX_NAME = 256  # characters
DEFAULT_PRIORITY = 5  # of requests that set none; higher ones are granted


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The identity behind a call.

    name          for logs: the id of a token, the subject of a JWT, the URI of a certificate; never a secret
    scopes        what it may call
    tenant        the tenant that its requests are accounted to; None: the one that the request names
    max_priority  the highest `routing.priority` of its requests; 0 to 9
    quota         the name of the limits that apply to its tenant; empty: the default ones
    """

    name: str
    scopes: frozenset[Scope]
    tenant: str | None = None
    max_priority: int = MAX_PRIORITY
    quota: str = ""


# Of every caller of a server that asks for no credentials.
ANONYMOUS = Identity(name="anonymous", scopes=ALL_SCOPES)
_current: ContextVar[Identity] = ContextVar("headrace_identity")


def is_name(value: object) -> bool:
    """Return whether a value can be the name of a caller, tenant or quota: printable and not too long."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


def current() -> Identity:
    """Return the identity behind the call that the current task serves.

    Raises LookupError outside a call: whoever forgets to pass an identity on gives nobody any rights.
    """
    return _current.get()


@contextmanager
def acting_as(identity: Identity) -> Generator[None, None, None]:
    """Make *identity* the current one while the block runs."""
    token = _current.set(identity)
    try:
        yield
    finally:
        _current.reset(token)

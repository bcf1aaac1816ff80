"""Read the file of callers: hashes of bearer tokens, and names in client certificates.

    [[tokens]]
    id = "search"                           # for logs
    sha256 = "9f86d081..."                  # of the token, in hexadecimal digits
    tenant = "search"                       # "*": any tenant, as each request names it
    scopes = ["generate", "feedback"]       # optional; this is the default
    max_priority = 5                        # optional; this is the default
    quota = "gold"                          # optional: the name of the tenant's limits
    expires = 2027-01-31T00:00:00Z          # optional

    [[certificates]]
    name = "spiffe://example.org/search"    # a URI or a DNS name in the certificate
    tenant = "search"                       # and the other keys of a token, except `sha256`

The file holds no secret. A token is 32 random bytes, so a fast hash is enough: nobody can try all tokens. A
token is looked up by its hash in a dict. The time of that depends on bits of the hash only, which a caller
cannot choose without knowing a token that has it. So there is no comparison whose time reveals a token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

from headrace import errors
from headrace.runtime.security.identity import (
    ALL_SCOPES,
    DEFAULT_PRIORITY,
    MAX_NAME,
    MAX_PRIORITY,
    Identity,
    Scope,
    is_name,
)
from headrace.runtime.security.watched_file import BadFile

ANY_TENANT = "*"
DEFAULT_SCOPES: tuple[Scope, ...] = ("generate", "feedback")

_TOKEN_PREFIX = "hr_"  # so that secret scanners can find tokens in code
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_LIMITS = ("tenant", "scopes", "max_priority", "quota", "expires")
_KEYS = {"tokens": ("id", "sha256", *_LIMITS), "certificates": ("id", "name", *_LIMITS)}


@dataclass(frozen=True, slots=True)
class Grant:
    """An identity until it expires.

    expires   seconds since the epoch; None: never
    """

    identity: Identity
    expires: float | None = None

    def expired(self, now: float) -> bool:
        """Whether it must not be used any more."""
        return self.expires is not None and now >= self.expires

    def valid(self, now: float, otherwise: str) -> Identity:
        """Return the identity. Raises CredentialsInvalid, with the message *otherwise*, if it has expired."""
        if self.expired(now):
            raise errors.CredentialsInvalid(otherwise)
        return self.identity


@dataclass(frozen=True, slots=True)
class CallersFile:
    """The callers that the file lists.

    tokens         by the SHA-256 of the token
    certificates   by a URI or DNS name of the certificate
    """

    tokens: Mapping[bytes, Grant] = field(default_factory=dict)
    certificates: Mapping[str, Grant] = field(default_factory=dict)

    def identify(self, token: str, now: float) -> Identity:
        """Return whose token it is. Raises CredentialsInvalid."""
        grant = self.tokens.get(digest(token))
        if grant is None:
            raise errors.CredentialsInvalid("the bearer token is not known to this server")
        return grant.valid(now, "the bearer token has expired: obtain a new one")


def parse(data: bytes) -> CallersFile:
    """Parse the content of the file. Raises BadFile for its first problem."""
    try:
        content = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadFile(f"it is not TOML: {error}") from None
    except UnicodeDecodeError:
        raise BadFile("it is not UTF-8") from None
    if unknown := content.keys() - _KEYS.keys():
        raise BadFile(f"unknown table {min(unknown)!r}; there are [[tokens]] and [[certificates]]")
    tokens: dict[bytes, Grant] = {}
    for place, entry in _entries(content, "tokens"):
        hashed = entry.get("sha256")
        if not isinstance(hashed, str) or not _SHA256.fullmatch(hashed):
            raise BadFile(f"{place}.sha256 must have 64 hexadecimal digits: the SHA-256 of the token")
        if (key := bytes.fromhex(hashed)) in tokens:
            raise BadFile(f"{place}.sha256 is listed twice")
        tokens[key] = _grant(place, entry, _text(place, entry, "id"))
    certificates: dict[str, Grant] = {}
    for place, entry in _entries(content, "certificates"):
        name = _text(place, entry, "name")
        if name in certificates:
            raise BadFile(f"{place}.name is listed twice")
        certificates[name] = _grant(place, entry, _text(place, entry, "id", default=name))
    return CallersFile(tokens, certificates)


def digest(token: str) -> bytes:
    """Return the hash by which a token is listed."""
    return hashlib.sha256(token.encode()).digest()


def new_token() -> str:
    """Return a random token of 256 bits."""
    return _TOKEN_PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")


def entry_for(
    token: str,
    *,
    name: str,
    tenant: str,
    scopes: tuple[str, ...] = DEFAULT_SCOPES,
    max_priority: int = DEFAULT_PRIORITY,
    quota: str = "",
    expires: datetime | None = None,
) -> str:
    """Return the lines that list *token* in a file of callers. Raises BadFile for invalid values."""
    lines = [
        "[[tokens]]",
        f"id = {_quoted(name)}",
        f'sha256 = "{digest(token).hex()}"',
        f"tenant = {_quoted(tenant)}",
        f"scopes = [{', '.join(map(_quoted, scopes))}]",
        f"max_priority = {max_priority}",
        *([f"quota = {_quoted(quota)}"] if quota else []),
        *([f"expires = {expires.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"] if expires is not None else []),
    ]
    entry = "\n".join(lines) + "\n"
    parse(entry.encode())
    return entry


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a string of JSON is one of TOML, but for surrogate pairs


def _entries(content: Mapping[str, Any], table: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return each entry of a table with its place, such as "tokens[0]"."""
    entries = content.get(table, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BadFile(f"{table} must be tables: write [[{table}]] above each")
    for number, entry in enumerate(entries):
        if unknown := entry.keys() - set(_KEYS[table]):
            raise BadFile(
                f"{table}[{number}] has the unknown key {min(unknown)!r}; the keys are "
                f"{', '.join(_KEYS[table])}"
            )
    return [(f"{table}[{number}]", entry) for number, entry in enumerate(entries)]


def _grant(place: str, entry: Mapping[str, Any], name: str) -> Grant:
    tenant = _text(place, entry, "tenant")
    scopes = entry.get("scopes", list(DEFAULT_SCOPES))
    names = [scope for scope in scopes if isinstance(scope, str)] if isinstance(scopes, list) else []
    if not names or names != scopes or not ALL_SCOPES.issuperset(names):
        raise BadFile(f"{place}.scopes must be a list of {', '.join(sorted(ALL_SCOPES))}")
    priority = entry.get("max_priority", DEFAULT_PRIORITY)
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= MAX_PRIORITY:
        raise BadFile(f"{place}.max_priority must be 0 to {MAX_PRIORITY}")
    expires = entry.get("expires")
    if expires is not None and (not isinstance(expires, datetime) or expires.tzinfo is None):
        raise BadFile(f"{place}.expires must be a time with a zone, such as 2027-01-31T00:00:00Z")
    identity = Identity(
        name=name,
        scopes=frozenset(cast("list[Scope]", scopes)),
        tenant=None if tenant == ANY_TENANT else tenant,
        max_priority=priority,
        quota=_text(place, entry, "quota", default="") if "quota" in entry else "",
    )
    return Grant(identity, None if expires is None else expires.timestamp())


def _text(place: str, entry: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = entry.get(key, default)
    if not is_name(value):
        raise BadFile(f"{place}.{key} must be a text of 1 to {MAX_NAME} printable characters")
    return cast("str", value)

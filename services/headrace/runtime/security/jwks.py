"""Keep the public keys (JWKS, RFC 7517) that sign JWTs, from a file or a URL.

A file is read again when it changes. A URL is fetched every `REFRESH_SECONDS`, and at most every
`RETRY_SECONDS` if a JWT names a key that is not known: issuers publish a new key shortly before they use it.
Fetches run on a thread. If one fails, the last keys stay in use.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt
from jwt.algorithms import get_default_algorithms

from headrace import errors
from headrace.runtime.security.settings import is_url
from headrace.runtime.security.watched_file import BadFile, WatchedFile

log = logging.getLogger(__name__)

REFRESH_SECONDS = 300.0
RETRY_SECONDS = 10.0
FETCH_SECONDS = 5.0  # for a whole fetch
MAX_BYTES = 1 << 20
MAX_KEYS = 100
MAX_WAITING = 64  # calls that wait for a fetch because of an unknown key
MIN_RSA_BITS = 2048

# The algorithms of each type of key. There is no symmetric one: a verifier of those could also sign.
_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES = {"P-256": ("ES256",), "P-384": ("ES384",), "P-521": ("ES512",), "Ed25519": ("EdDSA",)}
ALGORITHMS = frozenset(_RSA).union(*_CURVES.values())


@dataclass(frozen=True, slots=True)
class Key:
    """A public key. It verifies only the algorithms that its type and its `alg` allow."""

    kid: str | None
    algorithms: frozenset[str]
    public: Any


def parse(data: bytes) -> tuple[Key, ...]:
    """Parse a JWKS; keys that cannot verify signatures are left out. Raises BadFile."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise BadFile("it is not JSON") from None
    listed = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(listed, list) or len(listed) > MAX_KEYS:
        raise BadFile(f"it must have a list `keys` with at most {MAX_KEYS} entries")
    if not (keys := tuple(filter(None, map(_key, listed)))):
        raise BadFile(f"it has no public key for any of {', '.join(sorted(ALGORITHMS))}")
    return keys


def _key(entry: object) -> Key | None:
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    kind, kid, named = entry.get("kty"), entry.get("kid"), entry.get("alg")
    curve = str(entry.get("crv"))
    fits = _RSA if kind == "RSA" else _CURVES.get(curve, ()) if kind in ("EC", "OKP") else ()
    allowed = [name for name in fits if named is None or name == named]
    if not allowed or "d" in entry or not (kid is None or isinstance(kid, str)):  # `d`: a private key
        return None
    try:
        public = get_default_algorithms()[allowed[0]].from_jwk(entry)
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    if kind == "RSA" and getattr(public, "key_size", 0) < MIN_RSA_BITS:
        return None
    return Key(kid, frozenset(allowed), public)


class KeySource:
    """The current keys of a file or URL. Call `load` at the start, and run `watch` as a task afterwards.

    generation   changes with the keys
    """

    def __init__(self, source: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.generation = 0
        self._url = source if is_url(source) else ""
        self._file = WatchedFile(Path(source), self._set)
        self._clock = clock
        self._keys: tuple[Key, ...] = ()
        self._data = b""
        self._fetched_at: float | None = None  # when the last fetch began
        self._wanted = asyncio.Event()  # a fetch, because of an unknown key
        self._fetched = asyncio.Event()  # the next fetch has ended; replaced after each
        self._fetching = False
        self._waiting = 0

    def load(self) -> None:
        """Read the file, if the source is one. Raises BadFile."""
        if not self._url:
            self._file.load()

    async def watch(self) -> None:
        """Keep the keys up to date until cancelled."""
        if not self._url:
            await self._file.watch()  # which does not return
        while True:
            await self._fetch()
            with suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_SECONDS if self._keys else RETRY_SECONDS):
                    await self._wanted.wait()

    async def find(self, kid: str | None, algorithm: str) -> Key:
        """Return the key that verifies a JWT; fetch the keys again if it is not known.

        kid   names it; None: the only one for *algorithm*

        Raises CredentialsInvalid, and Unavailable if no keys could be fetched so far.
        """
        if (key := self._find(kid, algorithm)) is not None:
            return key
        if self._url and self._may_fetch() and self._waiting < MAX_WAITING:
            self._waiting += 1
            try:
                await self._next_fetch()
            finally:
                self._waiting -= 1
            if (key := self._find(kid, algorithm)) is not None:
                return key
        if not self._keys:
            raise errors.Unavailable(
                "the server could not fetch the keys of JWTs yet; try again", retry_after=RETRY_SECONDS
            )
        raise errors.CredentialsInvalid("the JWT is signed by a key that the server does not know")

    def _find(self, kid: str | None, algorithm: str) -> Key | None:
        found = [key for key in self._keys if algorithm in key.algorithms and (kid is None or key.kid == kid)]
        return found[0] if len(found) == 1 else None

    def _may_fetch(self) -> bool:
        ready = self._fetched_at is None or self._clock() - self._fetched_at >= RETRY_SECONDS
        return ready or self._fetching

    async def _next_fetch(self) -> None:
        ended = self._fetched
        if not self._fetching:
            self._wanted.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * FETCH_SECONDS):
                await ended.wait()

    async def _fetch(self) -> None:
        """Fetch the keys; keep the last ones if that fails."""
        self._wanted.clear()
        self._fetched_at, self._fetching = self._clock(), True
        try:
            self._set(await asyncio.to_thread(_download, self._url))
        except Exception as error:  # whatever it is, the next fetch is made
            problem = str(error) if isinstance(error, BadFile) else type(error).__name__
            log.warning(
                "keys of JWTs not fetched, keeping the last ones",
                extra={"url": _place(self._url), "problem": problem, "keys": len(self._keys)},
            )
        finally:
            self._fetching = False
            self._fetched.set()
            self._fetched = asyncio.Event()

    def _set(self, data: bytes) -> None:
        if data == self._data:
            return
        self._keys, self._data = parse(data), data
        self.generation += 1
        log.info("keys of JWTs read", extra={"keys": len(self._keys)})


def _place(url: str) -> str:
    """Return a URL for logs, without its query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Ends a redirect as an HTTPError with its status."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _download(url: str) -> bytes:
    """Fetch a URL, within FETCH_SECONDS and MAX_BYTES. Raises BadFile."""
    ends = time.monotonic() + FETCH_SECONDS
    data = b""
    try:
        opener = urllib.request.build_opener(_NoRedirects)
        with opener.open(url, timeout=FETCH_SECONDS) as response:
            while chunk := response.read1(65_536):
                data += chunk
                if len(data) > MAX_BYTES or time.monotonic() > ends:
                    raise BadFile(f"it is larger than {MAX_BYTES} bytes, or takes over {FETCH_SECONDS:g} s")
    except urllib.error.HTTPError as error:
        error.close()
        raise BadFile(f"the server responds with HTTP status {error.code}") from None
    except (OSError, http.client.HTTPException) as error:
        raise BadFile(f"it cannot be fetched: {type(error).__name__}: {error}") from None
    return data

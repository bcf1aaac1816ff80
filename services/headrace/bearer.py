"""Send a bearer token with calls: from a value, or from a file that is read again when it changes.

Issuers replace tokens while their owner runs; Kubernetes does so with the tokens of service accounts.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from headrace.channel import is_local

log = logging.getLogger(__name__)

AUTHORIZATION = "authorization"
CHECK_SECONDS = 1.0  # between two looks at the file
# Characters. Servers reject a call with over 8 KiB of metadata now and then, and with 16 KiB always.
MAX_TOKEN = 6144

Headers: TypeAlias = Sequence[tuple[str, str]]
# Returns the headers that prove who calls.
Authorization: TypeAlias = Callable[[], Headers]


class BadToken(Exception):
    """The token cannot be used. The message does not contain it."""


def is_token(text: str) -> bool:
    """Return whether a text can be a bearer token: 1 to MAX_TOKEN printable ASCII characters, no spaces."""
    return 0 < len(text) <= MAX_TOKEN and text.isascii() and text.isprintable() and " " not in text


def no_authorization() -> Headers:
    """Return no headers, for calls without a token."""
    return ()


def authorized(metadata: Headers, authorization: Headers) -> Headers:
    """Return *metadata* with *authorization*, unless it has one of its own."""
    if not authorization or any(key == AUTHORIZATION for key, _ in metadata):
        return metadata
    return (*metadata, *authorization)


def authorization_of(token: str, file: str | os.PathLike[str] | None) -> Authorization:
    """Return the authorization by a token or by the one in a file; `no_authorization` without both.

    Raises BadToken.
    """
    if file is not None:
        if token:
            raise BadToken("there are a token and a file with a token: give one of them")
        return TokenFile(file)
    if not token:
        return no_authorization
    headers = _headers(token, "the token")
    return lambda: headers


def check_plaintext(target: str, *, allowed: bool) -> None:
    """Raise BadToken if a token would be sent to another machine without TLS, unless that is *allowed*."""
    if not allowed and not is_local(target):
        raise BadToken(
            f"{target} would be called without TLS, so others could read the token: use TLS, or allow it "
            "explicitly where the network encrypts connections"
        )


class TokenFile:
    """The authorization by the token in a file. Raises BadToken if it is not usable at the start."""

    def __init__(self, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = Path(path)
        self._clock = clock
        self._checked = clock()
        self._stamp, self._headers = self._read()

    def __call__(self) -> Headers:
        """Return the current headers."""
        if (now := self._clock()) - self._checked >= CHECK_SECONDS:
            self._checked = now
            try:
                if _stamp(self._path) != self._stamp:
                    self._stamp, self._headers = self._read()
            except (BadToken, OSError):
                log.warning("new token not usable, keeping the last one", extra={"file": str(self._path)})
        return self._headers

    def _read(self) -> tuple[tuple[int, int, int], Headers]:
        try:
            stamp = _stamp(self._path)
            with self._path.open(encoding="ascii", errors="replace") as file:
                text = file.read(MAX_TOKEN + 2)
        except OSError as error:
            raise BadToken(f"the token in {self._path} cannot be read: {error.strerror}") from None
        return stamp, _headers(text.strip(), f"the token in {self._path}")


def _headers(token: str, what: str) -> Headers:
    if not is_token(token):
        raise BadToken(f"{what} must have 1 to {MAX_TOKEN} characters, printable ASCII without spaces")
    return ((AUTHORIZATION, f"Bearer {token}"),)


def _stamp(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_mtime_ns, found.st_size, found.st_ino

"""Read the files of TLS, and read them again when they change.

A certificate is replaced while its process runs: new connections use the new files, existing ones continue.
Files that cannot be used, for example half written ones, are reported once, and the last good ones remain in
use. This module depends on the standard library only.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0  # between two looks at the files

_Stamp: TypeAlias = tuple[tuple[int, int, int], ...]


class BadTls(Exception):
    """The files of TLS cannot be used. The message names the file and the cause."""


@dataclass(frozen=True)
class TlsFiles:
    """The files of one end of a connection, in PEM format.

    ca     certificates of the authorities that the other end's certificate is verified against; None: for a
           client the public ones that gRPC brings, for a server none
    cert   the own certificate, with intermediate ones after it; None: no own certificate
    key    its private key, without a passphrase
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, eq=False)
class Material:
    """The contents of the files at one time. Two reads differ in identity, so `is` detects a change."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None


class TlsReader:
    """The current contents of the files; safe to use on several threads.

    check_seconds   how often the files are looked at, at most; None: `CHECK_SECONDS`
    clock           returns the time in seconds

    Raises BadTls if the files cannot be used at the start.
    """

    def __init__(
        self,
        files: TlsFiles,
        *,
        check_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.files = files
        self.check_seconds = CHECK_SECONDS if check_seconds is None else check_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._checked = clock()
        self._problem = ""
        self._reported = False
        self._stamp = _stamp(files)
        self._material = _read(files)

    def current(self) -> Material:
        """Return the contents, which are at most `check_seconds` old. Files are local: this does not wait."""
        if self._clock() - self._checked < self.check_seconds:
            return self._material
        with self._lock:
            self._checked = self._clock()
            try:
                stamp = _stamp(self.files)
                if stamp != self._stamp:
                    self._material = _read(self.files)
                    self._stamp = stamp
                    log.info("certificate files changed", extra={"cert": str(self.files.cert)})
                self._problem, self._reported = "", False
            except BadTls as error:
                # The first time, they may be in the middle of their replacement.
                if str(error) == self._problem and not self._reported:
                    self._reported = True
                    log.warning("new certificate files not used", extra={"problem": str(error)})
                self._problem = str(error)
            return self._material


def _paths(files: TlsFiles) -> list[Path]:
    return [path for path in (files.ca, files.cert, files.key) if path is not None]


def _stamp(files: TlsFiles) -> _Stamp:
    """Return what changes with the files: Kubernetes replaces a symbolic link, others write or rename."""
    try:
        found = [os.stat(path) for path in _paths(files)]
    except OSError as error:
        raise _unreadable(error) from error
    return tuple((one.st_ino, one.st_mtime_ns, one.st_size) for one in found)


def _read(files: TlsFiles) -> Material:
    """Read and verify the files. Raises BadTls."""
    before = _stamp(files)
    try:
        ca, cert, key = (
            path.read_bytes() if path is not None else None for path in (files.ca, files.cert, files.key)
        )
    except OSError as error:
        raise _unreadable(error) from error
    _verify(files, ca)
    if _stamp(files) != before:
        raise BadTls("the certificate files changed while they were read")
    return Material(ca, cert, key)


def _verify(files: TlsFiles, ca: bytes | None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if (files.cert is None) != (files.key is None):
        raise BadTls("a certificate needs its private key, and a key its certificate")
    if ca is not None:
        try:
            context.load_verify_locations(cafile=files.ca)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise BadTls(f"{files.ca} contains no certificates in PEM format") from error
    if files.cert is not None:
        try:
            # An empty passphrase: by default OpenSSL asks for one on the terminal.
            context.load_cert_chain(files.cert, files.key, password="")
        except OSError as error:  # SSLError is one
            raise BadTls(f"{files.cert} and {files.key} cannot be used: {_cause(error)}") from error


def _cause(error: OSError) -> str:
    reason = getattr(error, "reason", None) or ""
    if reason == "KEY_VALUES_MISMATCH":
        return "the key is not that of the certificate"
    if reason in ("NO_START_LINE", "PEM_LIB", "PEM lib") or "PEM" in str(error):
        return "one of them is not in PEM format, or the key has a passphrase"
    return error.strerror or str(error)


def _unreadable(error: OSError) -> BadTls:
    return BadTls(f"cannot read {error.filename}: {error.strerror}")

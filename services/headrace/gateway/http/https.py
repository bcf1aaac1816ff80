"""Serve HTTPS with a certificate that may be replaced while the process runs."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

from headrace.runtime.serving.server import StartFailed
from headrace.tls.files import BadTls, Material, TlsFiles, TlsReader

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0


class Https:
    """The TLS of an HTTP server. TLS 1.2 is the oldest version that it accepts.

    context   for the listening sockets; each new connection uses the current certificate

    Raises StartFailed if the files cannot be used.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self._files = TlsFiles(cert=cert, key=key)
        try:
            self._reader = TlsReader(self._files)
            self._used: Material = self._reader.current()
            self._current = self._loaded()
        except (BadTls, OSError) as error:  # ssl.SSLError is an OSError
            raise StartFailed(f"--https-cert: {error}") from error
        self.context = self._loaded()
        # OpenSSL asks for the server's name, and with it for the certificate, at the start of each handshake.
        self.context.sni_callback = self._use_current

    async def follow(self) -> None:
        """Read the files again when they change, until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read the files again if they have changed."""
        material = self._reader.current()
        if material is self._used:
            return
        try:
            self._current = self._loaded()
        except OSError as error:  # changed since the reader verified them; the next change is read again
            log.warning("new certificate of HTTPS not used", extra={"problem": str(error)})
            return
        self._used = material

    def _use_current(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._current

    def _loaded(self) -> ssl.SSLContext:
        assert self._files.cert is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.set_alpn_protocols(["http/1.1"])
        # An empty passphrase: by default OpenSSL asks for one on the terminal.
        context.load_cert_chain(self._files.cert, self._files.key, password="")
        return context

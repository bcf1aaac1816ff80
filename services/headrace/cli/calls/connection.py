"""Connect to a mesh as the options of a command say.

`headrace up --tls` leaves the certificates of its throw-away authority in the cache folder while it runs, so
that commands on the same machine find them by the target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from headrace import models
from headrace.channel import is_local
from headrace.cli.launch.certificates import CA, CLIENT, cert_file, key_file, shared_folder
from headrace.client import connect

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from headrace.client import Client


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How a command reaches a mesh.

    target          gRPC target of a router or batcher
    ca, cert, key   files of TLS
    server_name     the name that the server's certificate must have; empty: the host of *target*
    tls             whether to use TLS although no file is given: with public authorities
    token_file      file with a bearer token
    plaintext_token whether to send it without TLS to another machine
    """

    target: str
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""
    tls: bool = False
    token_file: Path | None = None
    plaintext_token: bool = False

    def open(self, *, multiplex: bool | None = None) -> AbstractAsyncContextManager[Client]:
        """Open a client; *multiplex* as in `connect`. Raises BadTls and BadToken."""
        return connect(
            self.target,
            ca=self.ca,
            cert=self.cert,
            key=self.key,
            server_name=self.server_name,
            tls=self.tls or None,
            token_file=self.token_file,
            plaintext_token=self.plaintext_token,
            multiplex=multiplex,
        )

    def completed(self, cache: Path | None = None) -> Connection:
        """Return the connection with the files of a mesh of `headrace up --tls` at the target, if any."""
        chosen = replace(self, token_file=None, plaintext_token=False)
        if chosen != Connection(target=self.target) or not is_local(self.target):
            return self
        folder = shared_folder(cache or models.cache_folder(), self.target)
        return self.secured(folder if (folder / CA).is_file() else None)

    def secured(self, folder: Path | None) -> Connection:
        """Return the connection with the certificates in a folder of `headrace up --tls`, if there is one."""
        if folder is None:
            return self
        return replace(self, ca=folder / CA, cert=cert_file(folder, CLIENT), key=key_file(folder, CLIENT))

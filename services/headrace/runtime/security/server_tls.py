"""Give a gRPC server credentials of TLS that follow the rotation of their files.

TLS 1.2 is the oldest version that gRPC's servers accept; clients that offer TLS 1.3 get it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import grpc

from headrace.tls.files import Material, TlsReader

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerTls:
    """How a server speaks TLS.

    reader            reads the files
    ask_certificates  whether clients on the main port must have a certificate. gRPC for Python can require
                      one or not ask for it; it cannot accept both kinds of clients on one port
    """

    reader: TlsReader
    ask_certificates: bool

    def credentials(self, *, ask_certificates: bool) -> grpc.ServerCredentials:
        """Return credentials whose new connections use the files' current contents."""
        used = self.reader.current()

        def newer() -> Any:
            """Return the configuration for the next connection; None if it has not changed."""
            # gRPC calls this on its own threads, for each connection.
            nonlocal used
            material = self.reader.current()
            if material is used:
                return None
            used = material
            return _configuration(material)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(used), newer, require_client_authentication=ask_certificates
        )


def _configuration(material: Material) -> Any:
    return grpc.ssl_server_certificate_configuration(
        [(material.key or b"", material.cert or b"")], root_certificates=material.ca
    )

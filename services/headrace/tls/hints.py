"""Explain why a connection failed, where TLS or its absence is the probable cause.

gRPC reports the errors of its TLS library, and for a plaintext call to a TLS port only a closed socket.
"""

from __future__ import annotations

_HINTS = (
    (
        "WRONG_VERSION_NUMBER",
        "the server does not speak TLS on this port: call it without TLS, or use its TLS port",
    ),
    (
        "Hostname Verification Check failed",
        "the server's certificate is not for the name or address that was called: call the server by a name "
        "in its certificate, or give that name as the server name of TLS",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the server's certificate is not signed by a known authority, or has expired: give the authority's "
        "certificate as the CA",
    ),
    (
        "certificate signature failure",
        "the server's certificate is not signed by the given CA",
    ),
    (
        "handshake failed",
        "the TLS handshake failed",
    ),
    (
        # Seen before the first frame of HTTP/2: the port expects TLS, or a certificate.
        "Socket closed",
        "the server closed the connection at once: it may require TLS, or a client certificate that it "
        "trusts",
    ),
)
_CONNECTING = "failed to connect to all addresses"


def hint(details: str) -> str:
    """Return what to do about a failed connection, from gRPC's message; empty if TLS is not the cause."""
    if _CONNECTING not in details:
        return ""
    return next((text for sign, text in _HINTS if sign in details), "")

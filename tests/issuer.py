"""An issuer of JWTs for tests: keys, their JWKS, and a web server that publishes it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import get_default_algorithms

ISSUER, AUDIENCE = "https://issuer.example", "headrace"

_MADE = {
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "PS256": lambda: rsa.generate_private_key(65537, 2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


class SigningKey:
    """A key pair of the issuer."""

    def __init__(self, kid: str | None, algorithm: str = "ES256") -> None:
        self.kid = kid
        self.algorithm = algorithm
        self.private: Any = _MADE[algorithm]()

    @property
    def pem(self) -> bytes:
        """The public key, which everybody knows."""
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        data: bytes = self.private.public_key().public_bytes(encoding, form)
        return data

    def jwk(self, **extra: Any) -> dict[str, Any]:
        """Return the public key as an entry of a JWKS."""
        algorithm: Any = get_default_algorithms()[self.algorithm]
        entry = json.loads(algorithm.to_jwk(self.private.public_key()))
        return {**entry, **({} if self.kid is None else {"kid": self.kid}), **extra}

    def token(self, *, without: str = "", headers: dict[str, Any] | None = None, **claims: Any) -> str:
        """Sign a JWT with valid claims, changed by *claims*."""
        now = int(time.time())
        content = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "tenant": "search", "exp": now + 600}
        content |= {"iat": now, **claims}
        content.pop(without, None)
        named = {} if self.kid is None else {"kid": self.kid}
        return jwt.encode(
            content, self.private, algorithm=self.algorithm, headers={**named, **(headers or {})}
        )


def jwks(*keys: SigningKey) -> bytes:
    """Return the set of the public keys."""
    return json.dumps({"keys": [key.jwk() for key in keys]}).encode()


class Published:
    """A web server with a key set.

    body      what it responds; None: HTTP status 500
    fetches   number of requests so far
    go        responses wait for it
    """

    def __init__(self, body: bytes | None) -> None:
        self.body = body
        self.fetches = 0
        self.go = threading.Event()
        self.go.set()
        self.url = ""


@contextmanager
def published(body: bytes | None, *, redirect: str = "") -> Iterator[Published]:
    """Publish a key set on this machine; with *redirect*, respond with a redirect to there."""
    state = Published(body)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.fetches += 1
            state.go.wait(30)
            body = state.body
            self.send_response(302 if redirect else 500 if body is None else 200)
            if redirect:
                self.send_header("Location", redirect)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/keys"
    try:
        yield state
    finally:
        state.go.set()
        server.shutdown()
        thread.join()
        server.server_close()

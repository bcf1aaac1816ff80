"""The connections of the fault tests: in plaintext, or with HEADRACE_FAULTS_TLS=1 over mutual TLS."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc

from headrace import channel, client
from headrace.tls.channel import channel_credentials
from headrace.tls.files import TlsFiles, TlsReader
from tests.certificates import Certificates, issued

TLS = bool(os.environ.get("HEADRACE_FAULTS_TLS"))


@functools.cache
def _certificates() -> tuple[Certificates, tempfile.TemporaryDirectory[str]]:
    folder = tempfile.TemporaryDirectory()  # removed at the end of the process
    return issued(Path(folder.name)), folder


def flags(role: str) -> list[str]:
    """Return the flags of a service."""
    if not TLS:
        return []
    files = _certificates()[0].client(role)
    return [word for kind, path in files.items() for word in (f"--tls-{kind}", str(path))]


def connect(target: str, **options: Any) -> AbstractAsyncContextManager[client.Client]:
    """Open a client; see `headrace.client.connect`."""
    return client.connect(target, **(_certificates()[0].client() if TLS else {}), **options)


def open_channel(target: str) -> grpc.aio.Channel:
    """Open a channel."""
    reader = TlsReader(TlsFiles(**_certificates()[0].client())) if TLS else None
    return channel.open_channel(target, tls=reader)


def channel_with(target: str, options: Sequence[tuple[str, int]]) -> grpc.aio.Channel:
    """Open a channel with these options alone."""
    if not TLS:
        return grpc.aio.insecure_channel(target, options=options)
    material = TlsReader(TlsFiles(**_certificates()[0].client())).current()
    return grpc.aio.secure_channel(target, channel_credentials(material), options=options)


def listen(server: grpc.aio.Server, host: str) -> int:
    """Have a server of the tests listen as the services do. Returns its port."""
    if not TLS:
        return server.add_insecure_port(f"{host}:0")
    material = TlsReader(TlsFiles(**_certificates()[0].client("router"))).current()
    assert material.key
    assert material.cert
    credentials = grpc.ssl_server_credentials(
        [(material.key, material.cert)], root_certificates=material.ca, require_client_auth=True
    )
    return server.add_secure_port(f"{host}:0", credentials)

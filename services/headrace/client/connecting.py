"""Open clients: over TLS or not, with credentials or not, to one server or to all of a name."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from os import PathLike
from pathlib import Path

import grpc

from headrace.bearer import (
    authorization_of,
    check_plaintext,
    no_authorization,
)
from headrace.channel import open_channel, proxy_variable, target_problem
from headrace.client.calls import Client
from headrace.endpoints.endpoints import servers_of
from headrace.endpoints.resolving import replicated_name
from headrace.tls.files import TlsFiles, TlsReader


@asynccontextmanager
async def connect(
    target: str,
    *,
    ca: str | PathLike[str] | None = None,
    cert: str | PathLike[str] | None = None,
    key: str | PathLike[str] | None = None,
    tls: bool | None = None,
    server_name: str = "",
    credentials: grpc.ChannelCredentials | None = None,
    token: str = "",
    token_file: str | PathLike[str] | None = None,
    plaintext_token: bool = False,
    retries: int = 2,
    patience: float = 30.0,
    multiplex: bool | None = None,
) -> AsyncGenerator[Client, None]:
    """Open a client for *target*, such as "127.0.0.1:50051", "[::1]:50051" or "dns:///router:50051".

    If a DNS name has several addresses, calls are spread over them; see `endpoints`.

    ca                  file with the authorities that sign the server's certificate, for TLS; read again when
                        it changes, as are *cert* and *key*
    cert, key           files of the client's certificate and private key, for servers that require one
    tls                 whether to use TLS; None: if there is a *ca* or *cert*. Without *ca*, public
                        authorities are trusted
    server_name         the name that the server's certificate must have; empty: the host of *target*, of the
                        first address if it has several
    credentials         for TLS with credentials of gRPC instead
    token               bearer token that proves who calls
    token_file          file that contains it; read again when it changes
    plaintext_token     whether to send it without TLS to another machine, where others may read it
    retries, patience   see `Client`
    multiplex           whether requests share one stream, which costs a fraction of the CPU time of one call
                        each. None: they do once more than a few are in flight at a time, until the client was
                        idle for a minute. Behind a load balancer that
                        distributes calls, not connections, False keeps them distributed

    Raises BadTls and BadToken if the files cannot be used.
    """
    authorization = authorization_of(token, token_file)
    files = TlsFiles(*(Path(file) if file is not None else None for file in (ca, cert, key)))
    reader = TlsReader(files) if tls or (tls is None and files != TlsFiles()) else None
    if authorization is not no_authorization and credentials is None and reader is None:
        check_plaintext(target, allowed=plaintext_token)
    channel = open_channel(target, credentials=credentials, tls=reader, server_name=server_name)
    advice = target_problem(target) if credentials is None else ""
    spread = None
    if variable := proxy_variable(target):
        advice = (
            advice or f"connections to {target} use the proxy that {variable} sets; no_proxy exempts hosts"
        )
    elif (name := replicated_name(target)) is not None:
        # No proxy for the addresses either: the variables that exempt the name may not exempt them.
        open_address = functools.partial(
            open_channel,
            credentials=credentials,
            tls=reader,
            server_name=server_name or name[0],
            direct=True,
        )
        spread = servers_of(*name, open_address)
    async with Client(
        channel,
        spread=spread,
        retries=retries,
        patience=patience,
        advice=advice,
        target=target,
        multiplex=multiplex,
        authorization=authorization,
    ) as client:
        yield client

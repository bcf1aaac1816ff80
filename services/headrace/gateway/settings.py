"""Define the settings of a gateway, given as flags or HEADRACE_* variables."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from headrace.channel import target_problem
from headrace.gateway.http.limits import HttpLimits
from headrace.runtime.security.settings import only_loopback, serves_anonymous
from headrace.runtime.serving.inflight import CONNECTION_SHARE, INCOMPLETE_SHARE
from headrace.runtime.serving.limits import MIB
from headrace.runtime.settings import Port, ProcessSettings
from headrace.tls.files import TlsFiles

_HOST = re.compile(r"[A-Za-z0-9._-]+")


class Settings(ProcessSettings):
    """The gateway: serves the OpenAI-compatible HTTP API in front of a router.

    Each flag can also be given as a variable: HEADRACE_ROUTER is --router. Flags take precedence.
    """

    port: Port = 8080
    router: str = Field(
        description="gRPC target of the router, such as 127.0.0.1:50051 or dns:///router:50051"
    )
    router_server_name: str = Field(
        default="",
        description="the name that the router's certificate must have; by default the host of --router",
    )
    router_plaintext_tokens: bool = Field(
        default=False,
        description="pass the tokens of callers on to a --router on another machine without TLS, where the "
        "network encrypts connections",
    )
    processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="processes that listen on the port, each of which uses up to one core; each connection "
        "is served by one of them. More than 1 needs Linux",
    )
    https_cert: Path | None = Field(
        default=None,
        description="certificate for HTTPS, with intermediate ones, in PEM format: the gateway then serves "
        "HTTPS only. It is read again when it changes. --tls-cert is for calls of the router",
    )
    https_key: Path | None = Field(default=None, description="private key of --https-cert, in PEM format")
    allow_origins: str = Field(
        default="",
        description="origins of web pages whose scripts may call the gateway, separated by commas, such as "
        "https://chat.example.org; * for all; by default none",
    )
    allow_hosts: str = Field(
        default="",
        description="names by which clients may call the gateway besides localhost and its addresses, "
        "separated by commas, such as host.docker.internal; * for all. By default all, but none where "
        "callers without credentials are served on a loopback address: web pages could use them",
    )
    max_body_megabytes: float = Field(
        default=4.0, gt=0, le=256, description="size limit of a request's body, in MiB"
    )
    max_inflight_megabytes: float = Field(
        default=32.0,
        gt=0,
        description="limit of the bodies of requests in flight, in MiB; at least four times "
        "--max-body-megabytes. One host may hold three quarters of it; further requests are rejected with "
        "429",
    )
    max_calls: int = Field(
        default=2048,
        ge=16,
        description="limit of requests in flight; one host may have three quarters of it; further ones are "
        "rejected with 429",
    )
    max_connections: int = Field(
        default=4096, ge=16, description="limit of open connections; further ones get a 503 and are closed"
    )
    max_header_kilobytes: float = Field(
        default=32.0, ge=1, le=1024, description="size limit of the headers of a request, in KiB"
    )
    header_seconds: float = Field(
        default=10.0,
        gt=0,
        allow_inf_nan=False,
        description="how long the headers of a request may take, from the connection or their first byte",
    )
    body_seconds: float = Field(
        default=30.0,
        gt=0,
        allow_inf_nan=False,
        description="how long the body of a request may take, from its headers",
    )
    keep_alive_seconds: float = Field(
        default=75.0,
        gt=0,
        allow_inf_nan=False,
        description="after which an idle connection is closed; longer than a load balancer in front keeps it",
    )
    max_unread_seconds: float = Field(
        default=60.0,
        gt=0,
        allow_inf_nan=False,
        description="how long a client may read nothing of an answer that waits for it; then its connection "
        "is closed",
    )
    ping_seconds: float = Field(
        default=15.0,
        gt=0,
        allow_inf_nan=False,
        description="after how long without an event a comment is sent in a stream, so that proxies do not "
        "close it",
    )

    @field_validator("router")
    @classmethod
    def _is_target(cls, router: str) -> str:
        if problem := target_problem(router):
            raise ValueError(problem)
        return router

    @field_validator("processes")
    @classmethod
    def _share_a_port(cls, processes: int) -> int:
        if processes > 1 and sys.platform != "linux":
            raise ValueError("more than one process needs Linux")
        return processes

    @field_validator("allow_origins")
    @classmethod
    def _are_origins(cls, origins: str) -> str:
        for origin in _listed(origins):
            if origin != "*" and not _is_origin(origin):
                raise ValueError(
                    f"{origin!r} is not an origin, such as https://chat.example.org or http://localhost:3000"
                )
        return origins

    @field_validator("allow_hosts")
    @classmethod
    def _are_hosts(cls, hosts: str) -> str:
        for host in _listed(hosts):
            if host != "*" and not _HOST.fullmatch(host):
                raise ValueError(f"{host!r} is not the name of a host, such as host.docker.internal")
        return hosts

    @model_validator(mode="after")
    def _has_all_of_tls(self) -> Self:
        """Replaces the rule of gRPC servers: here the files are for calls alone."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(
                "HEADRACE_TLS_CERT (or --tls-cert) and HEADRACE_TLS_KEY (or --tls-key) need each other"
            )
        if self.tls_cert is not None and self.tls_ca is None:
            raise ValueError(
                "HEADRACE_TLS_CERT (or --tls-cert) needs --tls-ca: they are for calls of the router; the "
                "certificate for HTTPS is --https-cert"
            )
        return self

    @model_validator(mode="after")
    def _has_all_of_https(self) -> Self:
        if (self.https_cert is None) != (self.https_key is None):
            raise ValueError(
                "HEADRACE_HTTPS_CERT (or --https-cert) and HEADRACE_HTTPS_KEY (or --https-key) need each "
                "other"
            )
        return self

    @model_validator(mode="after")
    def _fits_a_body(self) -> Self:
        least = self.max_body_megabytes / (CONNECTION_SHARE * INCOMPLETE_SHARE)
        if self.max_inflight_megabytes < least:
            raise ValueError(
                f"HEADRACE_MAX_INFLIGHT_MEGABYTES={self.max_inflight_megabytes:g} (or "
                f"--max-inflight-megabytes) must be at least {least:g}, four times --max-body-megabytes"
            )
        return self

    @property
    def tls_files(self) -> TlsFiles | None:
        """The files of TLS for calls of the router; None if it is called without TLS."""
        if self.tls_ca is None:
            return None
        return TlsFiles(ca=self.tls_ca, cert=self.tls_cert, key=self.tls_key)

    @property
    def origins(self) -> list[str]:
        """The origins of --allow-origins."""
        return _listed(self.allow_origins)

    @property
    def hosts(self) -> list[str] | None:
        """The names that requests may be sent to, besides localhost and addresses; None: any."""
        listed = _listed(self.allow_hosts)
        exposed = only_loopback(self.host) and serves_anonymous(self, self.host, configured=self.reads_tokens)
        return None if "*" in listed or not (listed or exposed) else listed

    @property
    def reads_tokens(self) -> bool:
        """Whether callers may have bearer tokens."""
        return self.auth_tokens is not None or bool(self.auth_jwks)

    @property
    def limits(self) -> HttpLimits:
        """The limits of the server."""
        return HttpLimits(
            max_body_bytes=int(self.max_body_megabytes * MIB),
            max_inflight_bytes=int(self.max_inflight_megabytes * MIB),
            max_calls=self.max_calls,
            max_connections=self.max_connections,
            max_header_bytes=int(self.max_header_kilobytes * 1024),
            header_seconds=self.header_seconds,
            body_seconds=self.body_seconds,
            idle_seconds=self.keep_alive_seconds,
            unread_seconds=self.max_unread_seconds,
            ping_seconds=self.ping_seconds,
        )


def _listed(text: str) -> list[str]:
    return [entry for entry in (entry.strip() for entry in text.split(",")) if entry]


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        return False
    return (
        parts.scheme in ("http", "https")
        and bool(parts.hostname)
        and text == f"{parts.scheme}://{parts.netloc}"
    )

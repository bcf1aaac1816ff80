"""Read a process's settings from flags and the environment, once, at its start.

Flags take precedence over HEADRACE_* variables, and those over defaults. If settings are missing or invalid,
the process exits with one message that lists all of them.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import CliApp, CliSettingsSource, SettingsConfigDict

from headrace.runtime.security.peers import Domains
from headrace.runtime.security.settings import AuthSettings
from headrace.runtime.serving.inflight import CONNECTION_SHARE, INCOMPLETE_SHARE
from headrace.runtime.serving.limits import MIB, Limits
from headrace.tls.files import TlsFiles

PREFIX = "HEADRACE_"


# Fields that a service overrides with another default: `port: Port = 50051`.
Port = Annotated[int, Field(ge=0, le=65535, description="port to listen on; 0 picks a free one")]
MessageMegabytes = Annotated[float, Field(gt=0, le=64, description="size limit of a request message, in MiB")]
InflightMegabytes = Annotated[
    float,
    Field(
        gt=0,
        description="limit of request messages in flight, in MiB; at least four times "
        "--max-message-megabytes. One host may hold three quarters of it, one connection half; further "
        "requests are rejected with SERVER_BUSY",
    ),
]
ConcurrentStreams = Annotated[
    int, Field(ge=16, description="limit of open calls per connection; clients queue further ones")
]
ConnectionAge = Annotated[
    float,
    Field(
        ge=0,
        allow_inf_nan=False,
        description="seconds after which a connection accepts no further calls, give or take a tenth, so "
        "that its caller resolves the name of this service again; 0 for no limit",
    ),
]


class _Help(argparse.RawDescriptionHelpFormatter):
    """Omits empty defaults: the description of such a setting states what applies without it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return re.sub(r" \(default: (None)?\)$", "", action.help or "")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(inspect.cleandoc(text), width, indent)


class ProcessSettings(AuthSettings):
    """The settings of every process, whatever it speaks."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="ignore",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="address to listen on, such as ::1; 0.0.0.0 or :: for all addresses, of IPv4 and IPv6",
    )
    port: Port = 0
    tls_cert: Path | None = Field(
        default=None,
        description="certificate of this process, with intermediate ones, in PEM format: the server then "
        "requires TLS. Files of TLS are read again when they change",
    )
    tls_key: Path | None = Field(default=None, description="private key of --tls-cert, in PEM format")
    tls_ca: Path | None = Field(
        default=None,
        description="certificates of the authorities that sign the mesh's certificates. With it, clients "
        "must have a certificate, and other services are called over TLS",
    )
    tls_peers: str = Field(
        default="",
        description="what surrounds the role in the names of the mesh's certificates, separated by commas, "
        "such as spiffe://cluster.local/ns/headrace/sa/ or .headrace.svc; empty: the same as in --tls-cert",
    )
    drain_seconds: float = Field(
        default=25.0,
        ge=0,
        allow_inf_nan=False,
        description="after SIGTERM, how long requests in flight may continue",
    )
    trace_context: Literal["trust", "link", "ignore"] = Field(
        default="trust",
        description="what is done with the trace context of callers: trust makes their spans the parents of "
        "ours, so that their sampling decides what is recorded; link starts a new trace and links to theirs; "
        "ignore does not read it. Use link or ignore for callers that are not trusted",
    )
    metrics_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="port of the endpoint for Prometheus, /metrics over HTTP; 0 for none",
    )
    metrics_host: str = Field(
        default="127.0.0.1", min_length=1, description="address of the endpoint for Prometheus, as --host"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="lowest level of log lines"
    )

    @field_validator("host", "metrics_host")
    @classmethod
    def _without_brackets(cls, host: str) -> str:
        return host.strip().removeprefix("[").removesuffix("]")

    @field_validator("tls_peers")
    @classmethod
    def _is_domains(cls, peers: str) -> str:
        Domains.parse(peers.split(","))
        return peers

    @model_validator(mode="after")
    def _has_all_of_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(
                "HEADRACE_TLS_CERT (or --tls-cert) and HEADRACE_TLS_KEY (or --tls-key) need each other"
            )
        if self.tls_ca is not None and self.tls_cert is None:
            raise ValueError("HEADRACE_TLS_CA (or --tls-ca) needs --tls-cert and --tls-key")
        return self

    @property
    def tls_files(self) -> TlsFiles | None:
        """The files of TLS; None if the process uses none."""
        if self.tls_cert is None:
            return None
        return TlsFiles(ca=self.tls_ca, cert=self.tls_cert, key=self.tls_key)

    @classmethod
    def load(cls, arguments: list[str] | None = None, *, program: str = "") -> Self:
        """Read flags (*arguments*, by default those of the process) and environment.

        Prints what is missing or invalid and exits with status 2.
        """
        cls.model_config["cli_prog_name"] = program or None
        source: CliSettingsSource[Any] = CliSettingsSource(cls, formatter_class=_Help)
        given = sys.argv[1:] if arguments is None else arguments
        try:
            return CliApp.run(cls, cli_args=given, cli_settings_source=source)
        except ValidationError as error:
            print(complaint(error), file=sys.stderr)
            raise SystemExit(2) from None


class ServiceSettings(ProcessSettings):
    """The settings of every gRPC server; each service adds its own."""

    health_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="port for health checks alone, without TLS and credentials, for probes that "
        "support neither; 0: none",
    )
    tls_client_certificates: Literal["required", "none"] = Field(
        default="required",
        description="with --tls-ca, whether clients on --port must have a certificate; none: they are not "
        "asked for one, as on a router whose callers have tokens",
    )
    mtls_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="a second port, where clients must have a certificate whatever "
        "--tls-client-certificates is; 0: none",
    )
    max_message_megabytes: MessageMegabytes = 2.0
    max_inflight_megabytes: InflightMegabytes = 32.0
    max_calls: int = Field(
        default=4096,
        ge=16,
        description="limit of calls in flight, those on shared streams included, with the same shares for a "
        "host and a connection",
    )
    max_concurrent_streams: ConcurrentStreams = 2048
    max_connections: int = Field(
        default=4096, ge=16, description="limit of open connections; further ones are closed"
    )

    @model_validator(mode="after")
    def _fits_a_message(self) -> Self:
        least = self.max_message_megabytes / (CONNECTION_SHARE * INCOMPLETE_SHARE)
        if self.max_inflight_megabytes < least:
            raise ValueError(
                f"HEADRACE_MAX_INFLIGHT_MEGABYTES={self.max_inflight_megabytes:g} (or "
                f"--max-inflight-megabytes) must be at least {least:g}, four times --max-message-megabytes"
            )
        return self

    @model_validator(mode="after")
    def _mtls_has_an_authority(self) -> Self:
        if self.mtls_port and self.tls_ca is None:
            raise ValueError("HEADRACE_MTLS_PORT (or --mtls-port) needs --tls-ca")
        return self

    @property
    def limits(self) -> Limits:
        """The limits of the server."""
        return Limits(
            max_message_bytes=int(self.max_message_megabytes * MIB),
            max_inflight_bytes=int(self.max_inflight_megabytes * MIB),
            max_concurrent_streams=self.max_concurrent_streams,
            max_calls=self.max_calls,
            max_connections=self.max_connections,
        )


class CalledServiceSettings(ServiceSettings):
    """The settings of servers that callers choose by a name, of which more may be added: all but workers."""

    max_connection_age: ConnectionAge = 0.0
    max_connection_age_grace: float = Field(
        default=600.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds for which calls in flight on a connection may continue after "
        "--max-connection-age; longer than the longest answer",
    )

    @property
    def limits(self) -> Limits:
        """The limits of the server."""
        return replace(
            super().limits,
            max_connection_age=self.max_connection_age or None,
            max_connection_age_grace=self.max_connection_age_grace,
        )


def one_of(first: str, is_first: object, second: str, is_second: object) -> None:
    """Check that exactly one of two settings is set. Raises ValueError."""
    (one, one_flag), (other, other_flag) = (
        (PREFIX + name.upper(), "--" + name.replace("_", "-")) for name in (first, second)
    )
    if is_first and is_second:
        raise ValueError(f"{one} (or {one_flag}) and {other} (or {other_flag}) are both set: use one of them")
    if not (is_first or is_second):
        raise ValueError(
            f"{one} is not set (or {one_flag}), and neither is {other} (or {other_flag}): set one of them"
        )


def complaint(error: ValidationError) -> str:
    """Return all problems of the settings in one line."""
    parts = []
    for item in error.errors():
        place = "_".join(str(part) for part in item["loc"])
        variable, flag = PREFIX + place.upper(), "--" + place.replace("_", "-")
        if item["type"] == "missing":
            parts.append(f"{variable} is not set (or {flag})")
        elif place:
            message = item["msg"].removeprefix("Value error, ")
            if _SERVICE_LINK.fullmatch(str(item["input"])):
                message = _link_advice(variable)
            parts.append(f"{variable}={str(item['input'])!r} (or {flag}): {message}")
        else:
            parts.append(item["msg"].removeprefix("Value error, "))
    return "; ".join(parts)


# Kubernetes sets this in every pod for a Service named `headrace`: HEADRACE_PORT=tcp://10.0.0.1:50051.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+:\d+")


def _link_advice(variable: str) -> str:
    service = variable.removesuffix("_PORT").replace("_", "-").lower()
    return (
        f"Kubernetes set it for a Service named {service!r} in the namespace; set "
        f"`enableServiceLinks: false` in the pod's spec, or {variable} to the intended value"
    )

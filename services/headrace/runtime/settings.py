"""Read a process's settings from flags and the environment: once, frozen, complete.

Flags win over HEADRACE_* variables, which win over defaults. What is wrong or missing stops the start,
and the message lists all of it at once.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, SettingsConfigDict

from headrace.runtime.budget import CONNECTION_SHARE, SLOW_SHARE
from headrace.runtime.limits import MIB, Limits

PREFIX = "HEADRACE_"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Leaves out defaults that say nothing: such a setting tells in words what holds without it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return re.sub(r" \(default: (None)?\)$", "", action.help or "")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(inspect.cleandoc(text), width, indent)


class ServiceSettings(BaseSettings):
    """What every server needs; each service adds its own."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="ignore",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="address to listen on, such as ::1; 0.0.0.0 or :: for all, of IPv4 and IPv6",
    )
    port: int = Field(default=0, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    drain_seconds: float = Field(
        default=25.0,
        ge=0,
        allow_inf_nan=False,
        description="after SIGTERM, how long requests in flight may go on",
    )
    trace_context: Literal["trust", "link", "ignore"] = Field(
        default="trust",
        description="what becomes of the trace context that callers send: trust makes their spans the "
        "parents of ours, so that their sampling decides what is recorded here; link begins a trace of its "
        "own that links to theirs; ignore does not read it. Use one of these two where callers are strangers",
    )
    max_message_megabytes: float = Field(
        default=2.0, gt=0, le=64, description="size of the longest request message, in MiB"
    )
    max_inflight_megabytes: float = Field(
        default=32.0,
        gt=0,
        description="MiB of request messages in flight at the same time, at least four times "
        "--max-message-megabytes. One host may hold three quarters, one connection half; further requests "
        "are rejected with SERVER_BUSY",
    )
    max_calls: int = Field(
        default=2048,
        ge=16,
        description="calls in hand at the same time, with the same shares for a host and a connection",
    )
    max_concurrent_streams: int = Field(
        default=2048,
        ge=16,
        description="calls that one connection may have open; clients wait with what is more",
    )
    max_connections: int = Field(
        default=4096, ge=16, description="connections at the same time; further ones are closed"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="least level of log lines"
    )

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, host: str) -> str:
        return host.strip().removeprefix("[").removesuffix("]")

    @model_validator(mode="after")
    def _holds_a_message(self) -> Self:
        least = self.max_message_megabytes / (CONNECTION_SHARE * SLOW_SHARE)
        if self.max_inflight_megabytes < least:
            raise ValueError(
                f"HEADRACE_MAX_INFLIGHT_MEGABYTES={self.max_inflight_megabytes:g} (or "
                f"--max-inflight-megabytes) must be at least {least:g}, four times --max-message-megabytes"
            )
        return self

    @property
    def limits(self) -> Limits:
        """What the server holds for its callers at most."""
        return Limits(
            message_bytes=int(self.max_message_megabytes * MIB),
            held_bytes=int(self.max_inflight_megabytes * MIB),
            streams=self.max_concurrent_streams,
            calls=self.max_calls,
            connections=self.max_connections,
        )

    @classmethod
    def load(cls, arguments: list[str] | None = None, *, program: str = "") -> Self:
        """Read flags (*arguments*, or the process's own) and environment.

        Prints what is wrong and exits with status 2 where the settings are not usable.
        """
        cls.model_config["cli_prog_name"] = program or None
        source: CliSettingsSource[Any] = CliSettingsSource(cls, formatter_class=_Help)
        given = sys.argv[1:] if arguments is None else arguments
        try:
            return CliApp.run(cls, cli_args=given, cli_settings_source=source)
        except ValidationError as error:
            print(complaint(error), file=sys.stderr)
            raise SystemExit(2) from None


def one_of(first: str, is_first: object, second: str, is_second: object) -> None:
    """Check that just one of two settings is given. Raises ValueError."""
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
    """All that is wrong with the settings, in one line for people."""
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


# What Kubernetes sets in every pod, for a Service called `headrace`: HEADRACE_PORT=tcp://10.0.0.1:50051.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+:\d+")


def _link_advice(variable: str) -> str:
    service = variable.removesuffix("_PORT").replace("_", "-").lower()
    return (
        f"Kubernetes set it, for a Service called {service!r} in the namespace; set "
        f"`enableServiceLinks: false` in the pod's spec, or {variable} to what is meant"
    )

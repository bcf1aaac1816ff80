"""Select exporters by the standard OTEL_* variables, and report those that are not available.

Follows https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/: lists of exporters
per signal, protocols and endpoints per signal or for all. Exporters are found by entry point, as in the SDK's
own auto-configuration. The SDK reads the other variables (headers, sampler, intervals, limits) itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal
from urllib.parse import urlsplit

from headrace.channel import NO_PROXY, is_loopback, split

Signal = Literal["traces", "metrics"]

_GRPC, _HTTP = "otlp_proto_grpc", "otlp_proto_http"
_BY_PROTOCOL = {"grpc": _GRPC, "http/protobuf": _HTTP, "http/json": _HTTP}


@dataclass(frozen=True)
class Plan:
    """The exporters of one signal.

    names      entry points of exporters, without duplicates, in the order of the variable
    problems   exporters that are configured but not available, a line each
    """

    names: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def disabled(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether OTEL_SDK_DISABLED turns telemetry off."""
    return _value("OTEL_SDK_DISABLED", environment).lower() == "true"


def plan(signal: Signal, environment: Mapping[str, str] | None = None) -> Plan:
    """Select the exporters of *signal*.

    Without OTEL_<SIGNAL>_EXPORTER the exporter is OTLP if an endpoint is set, otherwise none. OTLP without an
    endpoint exports to its default endpoint on this machine.
    """
    if disabled(environment):
        return Plan()
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    asked = _value(variable, environment)
    if not asked:
        asked = "otlp" if _endpoint(signal, environment) else "none"
    names: list[str] = []
    problems: list[str] = []
    installed = {point.name for point in entry_points(group=_group(signal))}
    for name in dict.fromkeys(part.strip().lower() for part in asked.split(",")):
        if name in ("", "none"):
            continue
        if name == "otlp":
            name, problem = _otlp(signal, environment)
            problems += [problem] if problem else []
            if not name:
                continue
        if name not in installed:
            known = ", ".join(sorted({"otlp", "console", *installed} - {_GRPC, _HTTP}))
            problems.append(f"{variable}: {name!r} is not installed; available: {known}, none")
        elif name not in names:
            names.append(name)
    return Plan(tuple(names), tuple(problems))


def unsupported(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return a line for each variable that Headrace does not support."""
    if disabled(environment):
        return []
    lines = []
    if _value("OTEL_LOGS_EXPORTER", environment).lower() not in ("", "none"):
        lines.append("OTEL_LOGS_EXPORTER: not supported; logs are JSON lines on standard error")
    lines += [
        f"{name}: configuration files are not supported; set the OTEL_* variables"
        for name in ("OTEL_CONFIG_FILE", "OTEL_EXPERIMENTAL_CONFIG_FILE")
        if _value(name, environment)
    ]
    return lines


def create(signal: Signal, name: str) -> Any:
    """Create the exporter *name* of a plan: a SpanExporter, MetricExporter or MetricReader of the SDK.

    Endpoints on this machine are never reached through a proxy.
    """
    (point, *_) = entry_points(group=_group(signal), name=name)
    given: dict[str, Any] = {}
    if name in (_GRPC, _HTTP) and _is_local(_endpoint(signal, None)):
        if name == _GRPC:
            given["channel_options"] = (NO_PROXY,)
        else:
            import requests

            given["session"] = requests.Session()
            given["session"].trust_env = False
    return point.load()(**given)


def _group(signal: Signal) -> str:
    return f"opentelemetry_{signal}_exporter"


def _value(name: str, environment: Mapping[str, str] | None) -> str:
    """Return a variable's value; by the specification an empty value means unset."""
    return (os.environ if environment is None else environment).get(name, "").strip()


def _endpoint(signal: Signal, environment: Mapping[str, str] | None) -> str:
    return _value(f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT", environment) or _value(
        "OTEL_EXPORTER_OTLP_ENDPOINT", environment
    )


def _otlp(signal: Signal, environment: Mapping[str, str] | None) -> tuple[str, str]:
    """Return the entry point of the OTLP exporter for its protocol, empty if unsupported; and the problem."""
    for variable in (f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := _value(variable, environment).lower():
            break
    else:
        # 4318 is OTLP's port for HTTP. The specification lets each SDK choose its default protocol.
        protocol = "http/protobuf" if re.search(r":4318(/|$)", _endpoint(signal, environment)) else "grpc"
    if protocol == "http/json":
        return _HTTP, f"{variable}: {protocol!r} is not supported; using http/protobuf instead"
    if protocol not in _BY_PROTOCOL:
        return (
            "",
            f"{variable}: {protocol!r} is not supported; use grpc or http/protobuf",
        )
    return _BY_PROTOCOL[protocol], ""


def _is_local(endpoint: str) -> bool:
    if not endpoint:  # the default endpoint is
        return True
    return is_loopback((urlsplit(endpoint).hostname or "") if "://" in endpoint else split(endpoint)[0])

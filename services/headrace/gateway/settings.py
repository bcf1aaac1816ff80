"""Define the settings of a gateway, given as flags or HEADRACE_* variables."""

from __future__ import annotations

from pydantic import Field

from headrace.runtime.settings import Port, ProcessSettings


class Settings(ProcessSettings):
    """The gateway: serves the OpenAI-compatible HTTP API in front of a router.

    Each flag can also be given as a variable: HEADRACE_ROUTER is --router. Flags take precedence.
    """

    port: Port = 8080
    router: str = Field(
        description="gRPC target of the router, such as 127.0.0.1:50051 or dns:///router:50051"
    )

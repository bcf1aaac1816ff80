"""Define the settings of an upstream, given as flags or HEADRACE_* variables."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from headrace.runtime.settings import CalledServiceSettings, MessageMegabytes, Port


class Settings(CalledServiceSettings):
    """The upstream of one tier: answers requests by a service that speaks OpenAI's API over HTTP.

    Each flag can also be given as a variable: HEADRACE_URL is --url. Flags take precedence.
    """

    port: Port = 50054
    # What routers accept, as of a batcher.
    max_message_megabytes: MessageMegabytes = 4.0
    tier: str = Field(default="default", min_length=1, description="name of the tier to serve")
    url: str = Field(
        description="base URLs of the upstream, separated by commas, such as https://api.openai.com/v1; the "
        "first one is preferred, and the others are used while it fails"
    )
    model: str = Field(
        min_length=1, max_length=256, description="name of the model at the upstream, and in the mesh"
    )
    api_key_file: Path | None = Field(
        default=None,
        description="file with the key that is sent as bearer token; it is read again when it changes",
    )
    api: Literal["openai", "vllm", "llama.cpp"] = Field(
        default="openai",
        description="which parameters beyond those of OpenAI's API the upstream accepts; vllm: vLLM, SGLang "
        "and the gateway of another mesh. Requests that need others are rejected",
    )
    max_concurrent: int = Field(
        default=64, ge=1, le=100_000, description="most requests in flight at the upstream; others wait"
    )
    queue_limit: int = Field(
        default=256, ge=0, description="most requests that may wait; further ones fail with QUEUE_FULL"
    )
    requests_per_minute: int = Field(
        default=0,
        ge=0,
        description="most requests per minute, retries included; further ones fail with QUEUE_FULL and the "
        "time to wait. 0: no limit",
    )
    tokens_per_minute: int = Field(
        default=0,
        ge=0,
        description="most tokens of prompts and answers per minute, estimated before a request and corrected "
        "by its usage. 0: no limit",
    )
    connect_seconds: float = Field(
        default=5.0, gt=0, le=300, description="how long the upstream may take to accept a connection"
    )
    first_token_seconds: float = Field(
        default=60.0,
        gt=0,
        le=86_400,
        description="how long the upstream may take from a request to the first token; then the request is "
        "sent again, or fails",
    )
    stall_seconds: float = Field(
        default=30.0,
        gt=0,
        le=86_400,
        description="how long the upstream may send nothing within an answer; then it fails with "
        "UPSTREAM_LOST",
    )
    retries: int = Field(
        default=3,
        ge=0,
        le=20,
        description="how often a request is repeated that failed at all usable URLs before its first token",
    )
    context_length: int = Field(
        default=0,
        ge=0,
        le=2**32 - 1,
        description="most tokens of prompt and answer together; 0: as the upstream's list of models says, or "
        "unknown",
    )
    max_tokens: int = Field(default=1024, ge=1, description="most tokens of an answer")
    max_unread_seconds: float = Field(
        default=30.0,
        gt=0,
        description="how long the caller may read nothing of an answer that waits for it; then the answer "
        "fails with SLOW_READER",
    )
    probe_seconds: float = Field(
        default=10.0, gt=0, le=3600, description="time between two checks of each URL, GET URL/models"
    )
    breaker_failures: int = Field(
        default=5,
        ge=1,
        description="failed requests in a row after which a URL is not used for a while",
    )
    breaker_seconds: float = Field(
        default=5.0,
        gt=0,
        le=3600,
        description="how long it is not used at first; twice as long each time that the next request fails "
        "too, up to a minute",
    )
    upstream_trace: bool = Field(
        default=False,
        description="send the trace context (traceparent) to the upstream, for one of your own",
    )

    @field_validator("url")
    @classmethod
    def _are_base_urls(cls, text: str) -> str:
        urls = _listed(text)
        if not urls:
            raise ValueError("it names no URL")
        for url in urls:
            if problem := _problem(url):
                raise ValueError(f"{problem}; a base URL is such as https://api.openai.com/v1")
        if len(set(urls)) < len(urls):
            raise ValueError("it names a URL twice")
        return text

    @model_validator(mode="after")
    def _has_no_password(self) -> Self:
        # Not in the validator of the field, whose complaint quotes the value.
        for parts in map(urlsplit, self.urls):
            if parts.username is not None or parts.password is not None:
                raise ValueError(
                    "HEADRACE_URL (or --url) must not contain a user or a password: use --api-key-file"
                )
        return self

    @property
    def urls(self) -> list[str]:
        """The base URLs of `url`, without a slash at the end; the first is preferred."""
        return _listed(self.url)


def _listed(text: str) -> list[str]:
    return [url.strip().rstrip("/") for url in text.split(",") if url.strip()]


def _problem(url: str) -> str:
    """Return what is wrong with the form of a base URL; empty if nothing is."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "a URL is malformed"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "a URL must start with http:// or https:// and have a host"
    if parts.query or parts.fragment:
        return "a URL must not have a query or a fragment"
    if parts.path.endswith(("/completions", "/models")):
        return "a URL must not name an endpoint"
    return ""

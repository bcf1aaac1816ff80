"""Define the settings of a batcher, given as flags or HEADRACE_* variables."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from headrace.channel import target_problem
from headrace.runtime.settings import CalledServiceSettings, MessageMegabytes, Port, one_of
from headrace.template_arguments import read_arguments


class Settings(CalledServiceSettings):
    """The batcher of one tier: coalesces requests into batches for its workers.

    Each flag can also be given as a variable: HEADRACE_WORKERS is --workers. Flags take precedence.
    """

    port: Port = 50052
    # What routers accept, and the tokens of an answer that is resumed.
    max_message_megabytes: MessageMegabytes = 4.0
    tier: str = Field(default="default", min_length=1, description="name of the tier to serve")
    workers: str = Field(
        description="gRPC targets of the tier's workers, separated by commas, such as 127.0.0.1:50053; "
        "dns:///NAME:PORT stands for all addresses of NAME, which is resolved again every second or two"
    )
    model: str = Field(
        default="",
        description="model whose tokenizer to use: a default model's name, a folder, a .gguf or a hub id",
    )
    cache: str = Field(default="", description="folder for downloaded models; default ~/.cache/headrace")
    fake: bool = Field(default=False, description="use the echo engine's tokenizer, which needs no model")
    queue_limit: int = Field(
        default=256,
        ge=1,
        description="most requests that may wait, to be tokenised or for a worker, besides those for which "
        "workers have free slots",
    )
    intake_bytes: int = Field(
        default=8 * 1024 * 1024,
        ge=1,
        description="most bytes of long requests (64 KiB and more) that may wait to be tokenised; a single "
        "request may exceed it",
    )
    batch_size: int = Field(default=32, ge=1, description="most sequences in a batch")
    batch_tokens: int = Field(
        default=16384,
        ge=1,
        description="most prompt tokens that may wait at a worker; fewer if it computes fewer in 0.5 s or "
        "three steps, whichever is more",
    )
    linger: float = Field(
        default=0.005,
        ge=0,
        le=10,
        description="most seconds that a batch waits for more requests; it waits less or not at all if no "
        "request is expected, or if a worker has no prompt to compute",
    )
    ageing_seconds: float = Field(
        default=10.0, gt=0, description="seconds after which the priority of a waiting request rises by one"
    )
    quantum_tokens: int = Field(
        default=512, ge=1, description="tokens of prompt and answer that a tenant may take per turn"
    )
    max_unread_tokens: int = Field(
        default=16384,
        ge=1,
        description="most unread tokens kept for a slow caller; at this number its answer is paused until "
        "the caller has read some, and the worker computes other requests",
    )
    max_unread_seconds: float = Field(
        default=30.0,
        gt=0,
        description="how long an answer stays paused for a slow caller before it fails with SLOW_READER",
    )
    failover_seconds: float = Field(
        default=30.0,
        ge=0,
        description="how long requests wait for a worker when none is ready, within their deadlines",
    )
    share_prefixes: bool = Field(
        default=False,
        description="share cached prompt prefixes and guesses from answers between tenants; this saves work, "
        "but usage.cached_tokens and response times reveal to a tenant what another one has asked",
    )
    generation_config: Literal["none", "auto"] = Field(
        default="none",
        description="auto: sampling fields that a request leaves out (temperature, top_p, top_k, min_p, "
        "repetition_penalty) take their values from generation_config.json in the model folder, as in vLLM; "
        "none: the defaults of the contract. Use the same for all batchers of a tier",
    )
    template_arguments: str = Field(
        default="",
        description='variables for the chat template, as a JSON object such as {"enable_thinking": false}; '
        "those of a request take precedence, one by one. Use the same for all batchers of a tier",
    )
    tool_format: Literal["auto", "hermes", "llama3", "mistral", "json"] = Field(
        default="auto",
        description="format in which the model writes calls of tools; auto: as its chat template does, or "
        "json, with the tools in a system message, if the template knows none. Use the same for all batchers "
        "of a tier",
    )
    reasoning: Literal["auto", "off", "think"] = Field(
        default="auto",
        description="how the model marks what it thinks before its answer; think: between <think> and "
        "</think>; auto: think if its chat template or its tokenizer has these markers; off: not at all. Use "
        "the same for all batchers of a tier",
    )
    max_tokens: int = Field(default=1024, ge=1, description="most tokens of an answer")
    trace_content: bool = Field(
        default=False,
        description="record prompts and answers in traces, at most 8192 characters of each; by default they "
        "contain neither",
    )

    @field_validator("template_arguments")
    @classmethod
    def _is_an_object(cls, text: str) -> str:
        read_arguments(text)
        return text

    @model_validator(mode="after")
    def _one_tokenizer(self) -> Settings:
        one_of("model", self.model, "fake", self.fake)
        if not self.worker_targets:
            raise ValueError("HEADRACE_WORKERS (or --workers) names no target")
        if problem := next(filter(None, map(target_problem, self.worker_targets)), ""):
            raise ValueError(f"HEADRACE_WORKERS (or --workers): {problem}")
        return self

    @property
    def default_template_arguments(self) -> dict[str, Any]:
        """The variables for the chat template that a request leaves out."""
        return read_arguments(self.template_arguments)

    @property
    def worker_targets(self) -> list[str]:
        """The targets of `workers`, as a list."""
        return [target.strip() for target in self.workers.split(",") if target.strip()]

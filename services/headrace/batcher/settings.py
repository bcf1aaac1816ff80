"""What a batcher can be told, by flags or HEADRACE_* variables."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from headrace.channel import target_problem
from headrace.runtime.settings import MessageMegabytes, Port, ServiceSettings, one_of


class Settings(ServiceSettings):
    """The batcher of one tier: coalesces request streams into batches for its workers.

    Each flag may be given as a variable instead: HEADRACE_WORKERS is --workers. Flags win.
    """

    port: Port = 50052
    # What routers accept, and the tokens of an answer that is resumed.
    max_message_megabytes: MessageMegabytes = 4.0
    tier: str = Field(default="default", min_length=1, description="name of the tier that it serves")
    workers: str = Field(
        description="gRPC targets of the tier's workers, separated by commas, such as 127.0.0.1:50053; "
        "dns:///NAME:PORT stands for every address of a name and is looked up again every second or two"
    )
    model: str = Field(
        default="",
        description="whose tokenizer to use: a default model's name, a folder, a .gguf or a hub id",
    )
    cache: str = Field(default="", description="folder for fetched models; default ~/.cache/headrace")
    fake: bool = Field(default=False, description="use the echo engine's tokenizer, which needs no model")
    queue_limit: int = Field(
        default=256,
        ge=1,
        description="requests that may wait, to be tokenised and for a worker, beyond those that workers "
        "have room for",
    )
    intake_bytes: int = Field(
        default=8 * 1024 * 1024,
        ge=1,
        description="most bytes of long requests, of 64 KiB and more, that wait to be tokenised; a single "
        "one may have more",
    )
    batch_size: int = Field(default=32, ge=1, description="most sequences in a batch")
    batch_tokens: int = Field(
        default=4096,
        ge=1,
        description="most prompt tokens that may wait at a worker; less, where it computes less in 0.5 s",
    )
    linger: float = Field(
        default=0.005,
        ge=0,
        le=10,
        description="most seconds that a batch waits for company; it waits less, or not at all, where no "
        "request is expected, or a worker has nothing to take in",
    )
    ageing_seconds: float = Field(
        default=10.0, gt=0, description="a waiting request rises by one priority each so many seconds"
    )
    quantum_tokens: int = Field(
        default=512, ge=1, description="tokens that a tenant may take on its turn, prompt and answer"
    )
    unread_limit: int = Field(
        default=16384,
        ge=1,
        description="most tokens kept for a caller that does not read its answer; at that many the answer is "
        "paused until the caller has read them, for its worker to compute others",
    )
    unread_seconds: float = Field(
        default=30.0,
        gt=0,
        description="how long an answer stays paused for a caller that does not read, before it ends as "
        "SLOW_READER",
    )
    failover_seconds: float = Field(
        default=30.0,
        ge=0,
        description="how long requests wait for a worker to come back when none is left, their deadline "
        "permitting",
    )
    share_prefixes: bool = Field(
        default=False,
        description="let tenants share what workers have computed of equal beginnings of prompts; it saves "
        "work, and lets a tenant find out by usage.cached_tokens or by time what another one has asked",
    )
    generation_config: Literal["none", "auto"] = Field(
        default="none",
        description="auto: sampling fields that a request leaves out (temperature, top_p, top_k, min_p, "
        "repetition_penalty) have the values of the model folder's generation_config.json, where it names "
        "them, as in vLLM; none: those of the contract. The same for all batchers of a tier",
    )
    max_tokens: int = Field(default=1024, ge=1, description="most tokens of an answer")

    @model_validator(mode="after")
    def _one_tokenizer(self) -> Settings:
        one_of("model", self.model, "fake", self.fake)
        if not self.worker_targets:
            raise ValueError("HEADRACE_WORKERS (or --workers) names no target")
        if problem := next(filter(None, map(target_problem, self.worker_targets)), ""):
            raise ValueError(f"HEADRACE_WORKERS (or --workers): {problem}")
        return self

    @property
    def worker_targets(self) -> list[str]:
        """The targets of `workers`, one by one."""
        return [target.strip() for target in self.workers.split(",") if target.strip()]

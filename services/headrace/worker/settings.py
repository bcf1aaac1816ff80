"""What a worker can be told, by flags or HEADRACE_* variables."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from headrace.runtime.settings import InflightMegabytes, MessageMegabytes, Port, ServiceSettings, one_of
from headrace.worker import cpus
from headrace.worker.faults import FaultPlan


class Settings(ServiceSettings):
    """A model worker: runs one model and computes tokens for batchers.

    Each flag may be given as a variable instead: HEADRACE_MODEL is --model. Flags win.
    """

    port: Port = 50053
    max_message_megabytes: MessageMegabytes = 16.0
    max_inflight_megabytes: InflightMegabytes = 64.0  # messages of Run are not counted
    model: str = Field(
        default="", description="what to run: a default model's name, a folder, a .gguf or a hub id"
    )
    cache: str = Field(default="", description="folder for fetched models; default ~/.cache/headrace")
    device: str = Field(default="cpu", description="where to run: cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        default="auto",
        description="what is computed in; auto takes int8 on CPUs that multiply it, for models that can",
    )
    threads: int = Field(default=0, ge=0, description="CPU threads of the model; 0 leaves it to torch")
    cpus: str = Field(
        default="",
        description="CPUs that the worker keeps to: a list such as 0-7,16 or a NUMA node such as node0",
    )
    kv_memory: float = Field(
        default=0,
        ge=0,
        description="GiB of memory for keys and values; 0 takes a quarter of what is free on CPUs, nine "
        "tenths on GPUs, and no more than --max-running sequences can use",
    )
    context_length: int = Field(
        default=0, ge=0, description="tokens of prompt and answer together; 0 takes the model's own"
    )
    max_running: int = Field(default=32, ge=1, le=1024, description="sequences that run at the same time")
    step_tokens: int = Field(
        default=0,
        ge=0,
        description="most tokens that one engine step computes, prompts included: fewer keep answers under "
        "way even, more compute prompts faster; 0 takes 256 on CPUs, 2048 on GPUs",
    )
    prefix_cache: bool = Field(
        default=True,
        description="keep what earlier prompts computed in spare KV memory, for prompts that begin alike",
    )
    max_streams: int = Field(
        default=32,
        ge=1,
        description="batchers' streams that are open at the same time; one more takes the place of one that "
        "has been idle, or is refused",
    )
    fake: bool = Field(default=False, description="run the echo engine, which needs no model")
    fake_step_seconds: float = Field(
        default=0.0, ge=0, description="how long a step of the echo engine takes"
    )

    faults: str = Field(
        default="",
        description="make the engine fail on purpose, such as step_delay=0.05,crash_after_tokens=100; see "
        "headrace.worker.faults. For tests only",
    )

    @property
    def tokens_per_step(self) -> int:
        """`step_tokens`, or what suits the device."""
        return self.step_tokens or (256 if self.device == "cpu" else 2048)

    @field_validator("cpus")
    @classmethod
    def _known_cpus(cls, text: str) -> str:
        cpus.parse(text)
        return text

    @model_validator(mode="after")
    def _one_engine(self) -> Settings:
        one_of("model", self.model, "fake", self.fake)
        try:
            FaultPlan.parse(self.faults)
        except ValueError as error:
            raise ValueError(f"HEADRACE_FAULTS (or --faults): {error}") from None
        return self

"""The worker's settings, from flags or HEADRACE_* variables."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from headrace.runtime.settings import InflightMegabytes, MessageMegabytes, Port, ServiceSettings
from headrace.worker import cpus
from headrace.worker.faults import FaultPlan

# Arguments of vLLM that the worker sets itself, and why.
_OWN = {
    "--model": "the model is HEADRACE_MODEL (or --model), whose tokenizer the batchers use as well",
    "--tokenizer": "the batchers use the tokenizer of HEADRACE_MODEL (or --model)",
    "--scheduling-policy": "the worker orders sequences by their priorities",
    "--logits-processors": "the worker loads its own",
    "--logprobs-mode": "answers contain the model's own log-probabilities",
}


class Settings(ServiceSettings):
    """A model worker: runs one model and computes tokens for batchers.

    Each flag can also be set by a variable: HEADRACE_MODEL is --model. Flags take precedence.
    """

    port: Port = 50053
    max_message_megabytes: MessageMegabytes = 16.0
    max_inflight_megabytes: InflightMegabytes = 64.0  # messages of Run are not counted
    engine: Literal["torch", "vllm", "echo"] = Field(
        default="torch",
        description="what computes the tokens: torch is Headrace's own engine, vllm needs an environment "
        "with vLLM, echo repeats the prompt and needs no model",
    )
    engine_args: str = Field(
        default="",
        description="arguments for vLLM, as after `vllm serve MODEL`, such as '--tensor-parallel-size 2 "
        "--config FILE.yaml'; only with --engine vllm",
    )
    model: str = Field(
        default="", description="model to run: a default model's name, a folder, a .gguf file or a hub id"
    )
    tier: str = Field(
        default="default", min_length=1, description="name of the tier that it works for, for its metrics"
    )
    cache: str = Field(default="", description="folder for fetched models; ~/.cache/headrace by default")
    device: str = Field(default="cpu", description="where to run: cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        default="auto",
        description="data type of the computation; auto uses bfloat16 on GPUs, and on CPUs with int8 dot "
        "products int8, for models that support it",
    )
    threads: int = Field(default=0, ge=0, description="CPU threads of the model; 0 for torch's default")
    cpus: str = Field(
        default="",
        description="CPUs that the worker is bound to: a list such as 0-7,16 or a NUMA node such as node0",
    )
    exact: bool = Field(
        default=False,
        description="on GPUs, compute each answer bit-identically alone, in a batch and resumed, which is "
        "slower; CPUs do so anyway",
    )
    allow_pickle: bool = Field(
        default=False,
        description="load weights from pytorch_model.bin, a pickle: for folders that you trust, because the "
        "format can hold code",
    )
    kv_memory: float = Field(
        default=0,
        ge=0,
        description="GiB of KV memory; 0 uses nine tenths of free memory on GPUs, and on CPUs a quarter, but "
        "no more than --max-running sequences can use",
    )
    gpu_memory_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the GPU's memory that the worker may use; less than 1 if several use one GPU",
    )
    context_length: int = Field(
        default=0,
        ge=0,
        description="most tokens of prompt and answer together; 0 for the model's own limit, at most 8192",
    )
    max_running: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="most sequences that run at a time; 0 uses 32 on CPUs, 256 on GPUs",
    )
    step_tokens: int = Field(
        default=0,
        ge=0,
        description="most tokens that one engine step computes, prompts included: a lower limit makes token "
        "times more even, a higher one computes prompts faster; 0 uses 256 on CPUs, 2048 on GPUs",
    )
    prefix_cache: bool = Field(
        default=True,
        description="cache prefixes of earlier prompts and answers in spare KV memory",
    )
    speculation: Literal["lookup", "off"] = Field(
        default="lookup",
        description="speculative decoding: lookup guesses the next tokens from what followed the same tokens "
        "before and from what a form such as a JSON schema leaves no choice about, and verifies them in one "
        "step, while few sequences run and it pays; answers are the same. "
        "Only on CPUs with the torch engine",
    )
    delivery_seconds: float = Field(
        default=0.03,
        ge=0,
        le=1,
        description="most seconds that new tokens wait for those of the next steps, to be sent together, "
        "which takes less CPU time; first tokens and ends of answers never wait; 0 sends the tokens of each "
        "step at once",
    )
    max_batcher_streams: int = Field(
        default=32,
        ge=1,
        description="most batchers' streams open at the same time; a further one replaces an idle stream, or "
        "is rejected",
    )
    fake_step_seconds: float = Field(
        default=0.0, ge=0, description="seconds that a step of the echo engine takes"
    )

    faults: str = Field(
        default="",
        description="inject faults into the engine, such as step_delay=0.05,crash_after_tokens=100; see "
        "headrace.worker.faults. For tests only",
    )

    @classmethod
    def load(cls, arguments: list[str] | None = None, *, program: str = "") -> Self:
        """Read flags and environment, as every service does; `--engine-args TEXT` may begin with a dash."""
        given = sys.argv[1:] if arguments is None else arguments
        return super().load(_joined(given), program=program)

    @property
    def tokens_per_step(self) -> int:
        """`step_tokens`, or the default of the device."""
        return self.step_tokens or (256 if self.device == "cpu" else 2048)

    @property
    def running_sequences(self) -> int:
        """`max_running`, or the default of the device."""
        return self.max_running or (32 if self.device == "cpu" else 256)

    @field_validator("cpus")
    @classmethod
    def _known_cpus(cls, text: str) -> str:
        cpus.parse(text)
        return text

    @model_validator(mode="after")
    def _one_engine(self) -> Settings:
        if self.engine == "echo" and self.model:
            raise ValueError(
                "HEADRACE_MODEL (or --model) is set, but HEADRACE_ENGINE (or --engine) is echo, which needs "
                "no model: use one of them"
            )
        if self.engine != "echo" and not self.model:
            raise ValueError(
                "HEADRACE_MODEL is not set (or --model); only HEADRACE_ENGINE=echo (or --engine echo) needs "
                "no model"
            )
        if self.engine_args and self.engine != "vllm":
            raise ValueError(
                f"HEADRACE_ENGINE_ARGS (or --engine-args) is for vLLM, but HEADRACE_ENGINE (or --engine) is "
                f"{self.engine}"
            )
        if self.engine == "vllm":
            self._check_vllm()
        try:
            FaultPlan.parse(self.faults)
        except ValueError as error:
            raise ValueError(f"HEADRACE_FAULTS (or --faults): {error}") from None
        return self

    def _check_vllm(self) -> None:
        """Raise ValueError for settings of our own engine that vLLM has no equal of."""
        if self.dtype == "int8":
            raise ValueError(
                "HEADRACE_DTYPE (or --dtype) int8 is a format of the torch engine; for vLLM, use a quantised "
                "model, or HEADRACE_ENGINE_ARGS (or --engine-args) '--quantization METHOD'"
            )
        if self.threads:
            raise ValueError(
                "HEADRACE_THREADS (or --threads) is for the torch engine; vLLM on a CPU uses the variable "
                "VLLM_CPU_OMP_THREADS_BIND, such as 0-7"
            )
        try:
            words = shlex.split(self.engine_args)
        except ValueError as error:
            raise ValueError(f"HEADRACE_ENGINE_ARGS (or --engine-args): {error}") from None
        if problem := own_argument(words):
            raise ValueError(f"HEADRACE_ENGINE_ARGS (or --engine-args) has {problem}")


def own_argument(words: Sequence[str]) -> str:
    """Return the first of vLLM's arguments that the worker sets itself, and why; empty if there is none."""
    for word in words:
        name = "--" + word.partition("=")[0].lstrip("-").replace("_", "-")
        if word.startswith("--") and name in _OWN:
            return f"{word}: {_OWN[name]}"
    return ""


def _joined(words: list[str]) -> list[str]:
    """Write `--engine-args TEXT` as one word: argparse would take a TEXT of one flag for a flag of ours."""
    if "--engine-args" not in words[:-1]:
        return words
    place = words.index("--engine-args")
    return [*words[:place], f"--engine-args={words[place + 1]}", *words[place + 2 :]]

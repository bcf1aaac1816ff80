"""The worker's settings that depend on the device, and on the engine."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from headrace.runtime.settings import complaint
from headrace.worker.settings import Settings


@pytest.mark.parametrize(
    ("device", "sequences", "tokens"), [("cpu", 32, 256), ("cuda", 256, 2048), ("cuda:1", 256, 2048)]
)
def test_a_gpu_computes_more_sequences_and_tokens_at_a_time(device: str, sequences: int, tokens: int) -> None:
    settings = Settings(model="m", device=device)

    assert (settings.running_sequences, settings.tokens_per_step) == (sequences, tokens)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_limits_that_are_set_hold_on_every_device(device: str) -> None:
    settings = Settings(model="m", device=device, max_running=7, step_tokens=99)

    assert (settings.running_sequences, settings.tokens_per_step) == (7, 99)


def test_exact_results_are_off_by_default() -> None:
    assert not Settings(model="m").exact


def refused(**settings: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        Settings(**settings)
    return complaint(caught.value)


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_a_model_is_needed_unless_the_engine_only_repeats(engine: str) -> None:
    assert "HEADRACE_MODEL is not set" in refused(engine=engine)
    assert Settings(engine="echo").model == ""


def test_arguments_for_vllm_are_refused_by_other_engines() -> None:
    problem = refused(model="m", engine_args="--quantization fp8")

    assert "HEADRACE_ENGINE_ARGS (or --engine-args) is for vLLM" in problem


@pytest.mark.parametrize(
    "flags",
    [["--engine-args", "--enforce-eager"], ["--engine-args=--enforce-eager"]],
    ids=["two words", "one word"],
)
def test_arguments_for_vllm_may_be_one_flag(flags: list[str]) -> None:
    settings = Settings.load([*flags, "--engine", "vllm", "--model", "m"])

    assert (settings.engine_args, settings.model) == ("--enforce-eager", "m")


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"dtype": "int8"}, "--quantization METHOD"),
        ({"threads": 4}, "VLLM_CPU_OMP_THREADS_BIND"),
        ({"engine_args": "--model=other"}, "HEADRACE_MODEL"),
        ({"engine_args": "--scheduling_policy fcfs"}, "priorities"),
        ({"engine_args": "--config 'a.yaml"}, "No closing quotation"),
    ],
)
def test_what_vllm_does_not_have_is_refused_with_what_it_has(settings: dict[str, Any], advice: str) -> None:
    assert advice in refused(model="m", engine="vllm", **settings)


_OURS = ["numba", "gguf", "accelerate", "safetensors"]  # of our engine alone
_SHARED = ["torch", "transformers", "llguidance", "vllm"]  # of an engine, ours or vLLM's
_IMPORT = """
import importlib, sys
for name in sys.argv[2:]:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("module", "absent"),
    [("headrace.worker.__main__", _OURS + _SHARED), ("headrace.worker.vllm.loading", [*_OURS, "vllm"])],
)
def test_a_worker_starts_without_the_dependencies_of_other_engines(module: str, absent: list[str]) -> None:
    """An environment with vLLM has none of our engine's; each engine is imported only where it runs."""
    done = subprocess.run([sys.executable, "-c", _IMPORT, module, *absent], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr

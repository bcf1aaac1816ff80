"""Translate a worker's settings into vLLM's arguments and environment. Without vLLM itself."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from headrace.worker.settings import Settings, own_argument
from headrace.worker.vllm.log_lines import CONFIG

_GIB = 2**30


def arguments(settings: Settings, folder: Path) -> list[str]:
    """Return the arguments that vLLM's parser reads, as after `vllm serve`.

    folder   of the model

    What stands in --engine-args comes last, so it takes precedence. Settings that are not set leave the
    choice to vLLM.
    """
    given = ["--model", str(folder)]
    if settings.dtype != "auto":
        given += ["--dtype", settings.dtype]
    # vLLM shortens the context to what KV memory holds, as our own engine does.
    given += ["--max-model-len", str(settings.context_length or "auto")]
    if settings.max_running:
        given += ["--max-num-seqs", str(settings.max_running)]
    if settings.step_tokens:
        given += ["--max-num-batched-tokens", str(settings.step_tokens)]
    if settings.kv_memory:
        given += ["--kv-cache-memory-bytes", str(int(settings.kv_memory * _GIB))]
    if settings.gpu_memory_share < 1:
        given += ["--gpu-memory-utilization", str(settings.gpu_memory_share)]
    if not settings.allow_pickle:
        given += ["--load-format", "safetensors"]
    if ":" in settings.device:
        given += ["--device-ids", settings.device.partition(":")[2]]
    given.append("--enable-prefix-caching" if settings.prefix_cache else "--no-enable-prefix-caching")
    return given + shlex.split(settings.engine_args)


def environment(current: Mapping[str, str], *, debug: bool) -> dict[str, str]:
    """Return the variables to set before vLLM is imported. Those that are set in *current* stay as they are.

    debug   whether vLLM logs more than warnings
    """
    wanted = {
        # Started processes share no threads and ports with the worker, and receive `lifetime.EndWithParent`.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "DO_NOT_TRACK": "1",
        # The worker has resolved the name of the model to a folder.
        "HF_HUB_OFFLINE": "1",
        # `drawing.processor` is written for the first of vLLM's two runners of models.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_LOGGING_LEVEL": "INFO" if debug else "WARNING",
    }
    if "VLLM_CONFIGURE_LOGGING" not in current:
        wanted["VLLM_LOGGING_CONFIG_PATH"] = str(CONFIG)
    forced = {"VLLM_WORKER_MULTIPROC_METHOD"}
    return {name: value for name, value in wanted.items() if name in forced or name not in current}


def with_file(words: Sequence[str], read: Callable[[str], list[str]]) -> list[str]:
    """Return arguments with those of the file that `--config` names in its place; later ones take precedence.

    read   returns the arguments in a file

    Raises ValueError if there are several files, a file without arguments, or one with an argument that the
    worker sets itself.
    """
    spread = [piece for word in words for piece in _pair(word)]
    if (files := spread.count("--config")) == 0:
        return spread
    place = spread.index("--config")
    if files > 1 or place == len(spread) - 1:
        raise ValueError("--config names one file")
    file = spread[place + 1]
    try:
        found = read(file)
    except AttributeError as error:  # vLLM asks whatever the file contains for its names
        raise ValueError(f"{file} has no arguments: write lines such as `tensor-parallel-size: 2`") from error
    if problem := own_argument(found):
        raise ValueError(f"{file} has {problem}")
    return [*spread[:place], *found, *spread[place + 2 :]]


def _pair(word: str) -> Sequence[str]:
    """Write `--config=FILE` as two words."""
    name, equals, file = word.partition("=")
    return (name, file) if name == "--config" and equals else (word,)

"""Fetch the models of tiers, and unpack those that their engine cannot read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from headrace import models
from headrace.cli.launch import child
from headrace.cli.launch.boards import FetchBoard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from headrace.cli.launch.tiers import TierSpec

# By name, because the CLI imports no service.
_UNPACKING = "headrace.worker.engine.load.gguf.unpacking"


def fetch_models(names: Sequence[str], cache: Path, console: Console) -> dict[str, Path]:
    """Fetch the models that are not on this machine, and show progress. Raises ModelUnavailable."""
    with FetchBoard(console) as board:
        return {name: models.resolve(name, cache, board) for name in dict.fromkeys(names)}


def prepare_models(tiers: Sequence[TierSpec], cache: Path, console: Console) -> dict[str, Path]:
    """Fetch the models of *tiers*, and unpack those for vLLM, which reads no .gguf files, in the cache.

    Workers on vLLM find the unpacked folder by the file. Returns the fetched files or folders by the names
    of the models. Raises ModelUnavailable.
    """
    paths = fetch_models([tier.model for tier in tiers if tier.computes], cache, console)
    for model in dict.fromkeys(tier.model for tier in tiers if tier.engine == "vllm"):
        if paths[model].is_file():
            unpack(model, cache, console)
    return paths


def unpack(model: str, cache: Path, console: Console, folder: Path | None = None) -> Path:
    """Write a default model or .gguf file as a model folder, and return the folder.

    folder   where; None: in the cache, unless it is there

    Raises ModelUnavailable.
    """
    command = [sys.executable, "-P", child.__file__, str(os.getpid()), _UNPACKING, model]
    command += [str(folder)] if folder else []
    last = ""
    with subprocess.Popen(
        [*command, "--cache", str(cache)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            assert process.stdout is not None
            for line in filter(None, map(str.rstrip, process.stdout)):
                if last:
                    console.print(f"{model}: {last}", highlight=False, markup=False, soft_wrap=True)
                last = line
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise models.ModelUnavailable(f"cannot unpack {model}: {last or f'exit code {process.returncode}'}")
    return Path(last)

"""Write a .gguf file as a model folder: `python -m headrace.worker.engine.load.gguf.unpacking --help`.

The folder is in transformers' format: config, generation config, tokenizer, chat template, and weights as
safetensors in bfloat16. Engines that read no .gguf files, such as vLLM, read it. Without FOLDER it is made in
the cache, once per file, where workers on vLLM find it. The folder states the fingerprint of the file's
tokenizer, so that batchers with the file and workers with the folder recognise each other.

Prints its progress, and the path of the folder as the last line. `headrace unpack` and `headrace up` run it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from headrace import models
from headrace.models import ModelUnavailable
from headrace.models.tokenizers.files import write_tokenizer
from headrace.worker.engine.load.gguf.folders import made_once, write_whole
from headrace.worker.engine.load.gguf.weights import dequantised
from headrace.worker.engine.load.network import quiet_transformers
from headrace.worker.engine.load.refusals import LoadingError


def unpack(model: str, cache: Path, progress: Callable[[str], None], folder: Path | None = None) -> Path:
    """Return the folder of *model*, a default model or a .gguf file, written now or at an earlier call.

    cache      for the fetched model, its weights in float32, and the folder if none is given
    progress   receives a sentence before each step that takes time
    folder     where to write, anew even if the model is in the cache; must not exist. None: in the cache

    Raises ModelUnavailable and LoadingError, and FileExistsError for a *folder* that exists.
    """
    path = models.resolve(model, cache)
    if path.is_dir():
        raise ModelUnavailable(f"{model} is a model folder already: {path}")
    if folder is not None and folder.exists():
        raise FileExistsError(f"{folder} exists already: name a folder that does not")
    digest = models.file_digest(path)
    target = folder or models.unpacked_folder(path, cache)

    def make(made: Path) -> None:
        source = dequantised(path, digest=digest, cache=cache, progress=progress)
        progress(f"writing {path.name} in bfloat16 to {target}")
        auto: Any = AutoModelForCausalLM
        with quiet_transformers():
            network = auto.from_pretrained(source, dtype=torch.bfloat16, trust_remote_code=False)
            network.save_pretrained(made)
        write_tokenizer(path, made)
        made.chmod(0o755)  # other users read it: that of a container
        for file in made.iterdir():
            file.chmod(0o644)

    try:
        if folder is None:
            return made_once(target, make)
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder, make)
        return folder
    except OSError as error:
        raise LoadingError(f"cannot write {target}: {error}; free space, or choose another folder") from error


def main(arguments: Sequence[str]) -> None:
    """Parse *arguments* and unpack, or exit with the reason why not."""
    parser = argparse.ArgumentParser(
        prog="python -m headrace.worker.engine.load.gguf.unpacking",
        description="Write a default model or a .gguf file as a model folder in bfloat16.",
    )
    parser.add_argument("model", help="a default model's name or a .gguf file")
    parser.add_argument("folder", type=Path, nargs="?", help="where to write; by default in the cache")
    parser.add_argument("--cache", type=Path, default=None, help="the folder for fetched models")
    given = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        folder = unpack(
            given.model,
            given.cache or models.cache_folder(),
            lambda line: print(line, flush=True),
            given.folder,
        )
    except (ModelUnavailable, LoadingError, FileExistsError) as error:
        raise SystemExit(str(error)) from error
    print(folder)


if __name__ == "__main__":
    main(sys.argv[1:])

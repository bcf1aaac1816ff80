"""Shorten text that callers chose before it goes into error messages, logs and identifiers."""

from __future__ import annotations

MAX_QUOTED = 64  # characters


def quoted(text: str) -> str:
    """Return the repr of *text* on one line; of a long text its first 64 characters and its length."""
    if len(text) <= MAX_QUOTED:
        return repr(text)
    return f"{text[:MAX_QUOTED]!r}... ({len(text)} characters)"


def clipped(text: str, limit: int) -> str:
    """Return *text* within *limit* bytes of UTF-8: its middle is left out if it is longer.

    Both ends are kept because messages quote the caller's text in the middle. *limit* is at least 32.
    """
    data = text.encode(errors="replace")
    if len(data) <= limit:
        return text
    half = limit // 2 - 10
    return f"{data[:half].decode(errors='ignore')} [...] {data[-half:].decode(errors='ignore')}"

"""Read the events of a streamed answer of OpenAI's API, with as little work for a token as possible.

A token's event is recognized by a regular expression and not parsed: parsing would take the load generator as
long as receiving it. Only the few other events are parsed: the first and the last ones, usage and errors.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from headrace.cli.bench.records import ENDED_EARLY, ERROR_EVENT, MALFORMED, Failed

if TYPE_CHECKING:
    from headrace.cli.bench.records import Record

MAX_EVENT_BYTES = 2**20
_MOST = 2**53  # of what a server may report: larger numbers, infinity and NaN fail in sums or in the result

# A field with a text that is not empty. Quotes in a JSON string are escaped, so that no text looks like one.
_TEXT = re.compile(rb'"(?:content|text|reasoning_content|reasoning)"\s*:\s*"(?!")')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"([^"\\]{1,40})"')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_DATA = b"data:"
_TEXT_FIELDS = ("content", "text", "reasoning_content", "reasoning")


class EventReader:
    """The events of one answer, as they arrive in pieces of any size. It writes into a record."""

    def __init__(self, record: Record) -> None:
        self.done = False
        self._record = record
        self._rest = b""
        self._usage = b""  # the last event with usage; some servers repeat it with each token

    def feed(self, piece: bytes, now: float) -> None:
        """Process what arrived at *now*. Raises Failed for an event that is an error or malformed."""
        data = self._rest + piece if self._rest else piece
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            self._event(event, now)
        if len(self._rest) > MAX_EVENT_BYTES:
            raise Failed(MALFORMED, f"an event has more than {MAX_EVENT_BYTES} bytes")

    def end(self) -> None:
        """Complete the record at the end of the stream. Raises Failed if the answer is not complete."""
        rest, self._rest = self._rest.strip(), b""
        if rest and not self.done:
            # Some servers send no empty line after the last event.
            self._event(rest, self._record.times[-1] if self._record.times else 0.0)
        if not self.done and not self._record.finish:
            raise Failed(ENDED_EARLY, "the stream ended without a finish_reason and without [DONE]")
        if self._usage:
            _read_usage(self._record, _parsed(self._usage))
        self._record.succeed()

    def _event(self, event: bytes, now: float) -> None:
        if not event.startswith(_DATA) or b"\n" in event:
            event = _data_of(event)
            if not event:
                return  # a comment, which keeps the connection alive
        if _TEXT.search(event) and event.endswith(b"}"):
            record = self._record
            record.times.append(now)
            if record.parts is not None:
                record.parts.append(event[len(_DATA) :].decode(errors="replace"))
        else:
            self._other(event[len(_DATA) :].strip())
        if found := _FINISH.search(event):
            self._record.finish = found[1].decode(errors="replace")
        if _USAGE.search(event):
            self._usage = event[len(_DATA) :]

    def _other(self, data: bytes) -> None:
        """Process an event without text."""
        if data == b"[DONE]":
            self.done = True
            return
        event = _parsed(data)
        if error := event.get("error"):
            raise Failed(*described(error, ERROR_EVENT))


def _data_of(event: bytes) -> bytes:
    """Return the data of an event that has other fields or several lines, as one line; b"" if it has none."""
    lines = [line[len(_DATA) :] for line in event.split(b"\n") if line.startswith(_DATA)]
    return _DATA + b"\n".join(lines) if lines else b""


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        raise Failed(MALFORMED, f"an event is not JSON: {data[:100].decode(errors='replace')!r}") from None
    if not isinstance(event, dict):
        raise Failed(MALFORMED, f"an event is not an object: {data[:100].decode(errors='replace')!r}")
    return event


def described(error: object, kind: str) -> tuple[str, str]:
    """Return kind and message of an OpenAI error object; *kind* with its code or type added."""
    if not isinstance(error, dict):
        return kind, str(error)[:1000]
    detail = next((one for name in ("code", "type") if isinstance(one := error.get(name), str) and one), "")
    return f"{kind} {detail[:60]}".strip(), str(error.get("message") or detail or error)[:1000]


def _read_usage(record: Record, event: dict[str, Any]) -> None:
    usage = event.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    record.input_tokens = _whole(usage.get("prompt_tokens"))
    # A server that reports fewer tokens than it sent messages with text has not counted yet.
    tokens = _whole(usage.get("completion_tokens"))
    record.output_tokens = tokens or None
    details = usage.get("prompt_tokens_details")
    record.cached_tokens = _whole(details.get("cached_tokens")) if isinstance(details, dict) else None
    if isinstance(event.get("model"), str):
        record.model = event["model"][:200]
    ours = event.get("headrace")
    if isinstance(ours, dict):
        record.tier = str(ours.get("tier") or record.tier)[:200]
        cost = ours.get("cost")
        if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost < _MOST:
            cost = None
        record.cost = cost


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST else None


def text_in(event: str) -> str:
    """Return the text in an event that was kept."""
    try:
        choices = json.loads(event).get("choices") or [{}]
        choice = choices[0]
        holder = choice.get("delta") or choice.get("message") or choice
        return "".join(text for name in _TEXT_FIELDS if isinstance(text := holder.get(name), str))
    except (ValueError, RecursionError, AttributeError, KeyError, IndexError, TypeError):
        return ""

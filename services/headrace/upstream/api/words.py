"""Prepare text of an upstream for the mesh: its answers, and its messages for people."""

from __future__ import annotations

import re
from typing import Any

from headrace.upstream.api.malformed import Malformed, object_in, text_in

MAX_CHARACTERS = 300  # of a message
MAX_READ = 2048  # characters of a message that are read

# Keys of common providers, what follows "Bearer", and keys that were masked.
_KEYS = re.compile(
    r"\b(?:sk|pk|rk|gsk|xai|hf|nvapi|csk|r8|AIza)[-_][\w*.\-]{6,}|\bAIza[\w\-]{10,}"
    r"|(?<=\bBearer )\S+|[^\s*]{0,64}\*{3,}\S*",
    re.I,
)
_START = 8  # characters of a key that do not occur in other texts
_HIDDEN = "[key]"
_TITLE = re.compile(r"<title[^>]*>([^<]{1,200})", re.I)


def valid(text: str) -> str:
    """Return *text* as valid Unicode: halves of surrogate pairs, as JSON allows, are joined or replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def passed_on(text: str, key: str, *, most: int = MAX_CHARACTERS, empty: str = "no message") -> str:
    """Return a message of an upstream on one line of at most *most* characters, without control characters.

    The API key and everything that looks like one are removed. A page of HTML is replaced by its title.

    key     the API key; empty: none
    empty   returned for a message without text
    """
    text = valid(text[:MAX_READ])
    if text.lstrip()[:1] == "<":
        title = _TITLE.search(text)
        text = f"a page of HTML, {title[1].strip()!r}" if title else "a page of HTML"
    if key:
        text = text.replace(key, _HIDDEN)
        if len(key) >= 2 * _START:
            text = re.sub(rf"{re.escape(key[:_START])}\S*", _HIDDEN, text)
    text = _KEYS.sub(_HIDDEN, text)
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return f"{line[: most - 3]}..." if len(line) > most else line or empty


def words_of(body: dict[str, Any]) -> tuple[str, str]:
    """Return the text of a message or a delta, and what the model thinks. Raises Malformed.

    What it refuses with is text. Some servers send lists of parts, and most have thoughts in a field of their
    own, some in two.
    """
    text, thoughts = [], []
    content = body.get("content")
    if isinstance(content, list):
        for each in content:
            part = object_in(each, "a part of a text")
            if (kind := part.get("type")) == "thinking":
                thoughts.append(_thought(part.get("thinking")))
            elif kind in ("text", "refusal"):
                text.append(text_in(part.get(kind), "a text"))
            else:
                raise Malformed("a part of a text that is no text")
    else:
        text.append(text_in(content, "a text"))
    text.append(text_in(body.get("refusal"), "a text"))
    thoughts.append(_thought(body.get("reasoning_content")) or _thought(body.get("reasoning")))
    return valid("".join(text)), valid("".join(thoughts))


def _thought(value: object) -> str:
    if isinstance(value, list):
        return "".join(text_in(object_in(part, "a thought").get("text"), "a thought") for part in value)
    return text_in(value, "a thought")

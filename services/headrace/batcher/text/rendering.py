"""Render one chat template in a process of its own, which can be ended; `templates` starts it.

A template is a program that came with a model. Here it may loop, or ask for all memory, and harm nobody:
the process ends itself when a rendering takes too much CPU time, however deep in C it is, and cannot take
more memory than its share. It ends when its standard input does.

Frames in both directions: four bytes of length, big-endian, and JSON in UTF-8. The first frame in is
{"template", "tokens"}; each later one is {"messages", "opening"} and is answered by {"text"},
{"refused"} (the template's own `raise_exception`) or {"failed"}. Nothing of headrace is imported: the
file runs as a script.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, Any

CPU_SECONDS = 2.0  # of one rendering; ordinary ones take well under a millisecond
MEMORY_BYTES = 768 << 20  # beyond what the process has when it starts
MOST_GROWTH = 4  # times the messages, and
MOST_EXTRA = 1 << 20  # characters more, may a rendering come to


def send(pipe: IO[bytes], frame: dict[str, Any]) -> None:
    """Write one frame."""
    data = json.dumps(frame, ensure_ascii=False).encode(errors="replace")
    pipe.write(len(data).to_bytes(4, "big") + data)
    pipe.flush()


def receive(pipe: IO[bytes]) -> dict[str, Any] | None:
    """Read one frame; None at the end of the pipe."""
    size = pipe.read(4)
    data = pipe.read(int.from_bytes(size, "big"))
    if len(size) < 4 or len(data) < int.from_bytes(size, "big"):
        return None
    frame: dict[str, Any] = json.loads(data)
    return frame


def rendered(template: str, tokens: dict[str, Any], messages: list[Any], opening: bool) -> dict[str, str]:
    """What *template* makes of *messages*, as the frame that answers.

    tokens    the tokenizer's special tokens by name, such as bos_token
    opening   whether the opening of the next answer follows the messages
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        result: Any = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=opening, **tokens
        )
    except jinja2.TemplateError as error:
        if type(error) is jinja2.TemplateError:  # of `raise_exception`; Jinja's own are subclasses
            return {"refused": str(error)}
        return {"failed": f"{type(error).__name__}: {error}"}
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # whatever a program can raise
        return {"failed": f"{type(error).__name__}: {error}"}
    text = str(result[0][0])
    limit = MOST_EXTRA + MOST_GROWTH * sum(_characters(message["content"]) for message in messages)
    if len(text) > limit:
        return {"failed": f"it makes {len(text)} characters of these messages, at most {limit} are taken"}
    return {"text": text}


def _characters(content: str | list[dict[str, str]]) -> int:
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)


def _limit_memory() -> None:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, OSError, ValueError):
        pass  # not on Linux: the limit of CPU time remains


def _limit_time(seconds: float) -> None:
    """End this process after so much CPU time, unless called again before; 0 sets no limit."""
    import signal

    if hasattr(signal, "ITIMER_PROF"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends a process that does not handle it


def main() -> None:
    """Answer frames until there are no more."""
    import transformers.utils.chat_template_utils  # noqa: F401 # before the limits count

    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nobody else writes frames
    given = receive(requests)
    _limit_memory()
    while given is not None and (frame := receive(requests)) is not None:
        _limit_time(CPU_SECONDS)
        answer = rendered(given["template"], given["tokens"], frame["messages"], frame["opening"])
        _limit_time(0)
        send(answers, answer)


if __name__ == "__main__":
    main()

"""Render one chat template in a separate process, which `renderer` starts and can end.

A template is a program that came with a model. In this process it may loop or request all memory without
harm: the process is killed when a rendering takes too much CPU time, even inside of C code, and its memory is
limited. It exits when its standard input closes.

Frames in both directions are four bytes of length, big-endian, and JSON in UTF-8. The first incoming frame is
{"template", "tokens"}. Each later one is {"messages", "tools", "add_generation_prompt", "arguments"}, and the
response is {"text"}, {"refused"} (the template's own `raise_exception`) or {"failed"}. The file runs as a
script and imports nothing of headrace.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, Any

CPU_SECONDS = 2.0  # per rendering; ordinary ones take well under a millisecond
MEMORY_BYTES = 768 << 20  # in addition to what the process has at its start
# A rendering may have this many times the characters of the messages and tools, and this many more.
MAX_GROWTH = 4
MAX_EXTRA = 1 << 20


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


def rendered(
    template: str,
    tokens: dict[str, Any],
    messages: list[Any],
    tools: list[Any] | None,
    add_generation_prompt: bool,
    arguments: dict[str, Any],
) -> dict[str, str]:
    """Return the response frame for *messages* rendered by *template*.

    tokens                  the tokenizer's special tokens by name, such as bos_token
    tools                   the tools that the model may call; None: it has none
    add_generation_prompt   whether the start of the next answer follows the messages
    arguments               further variables, with other names than the tokens
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        result: Any = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            **tokens,
            **arguments,
        )
    except jinja2.TemplateError as error:
        if type(error) is jinja2.TemplateError:  # from `raise_exception`; Jinja's own are subclasses
            return {"refused": str(error)}
        return {"failed": f"{type(error).__name__}: {error}"}
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # a template is a program and may raise anything
        return {"failed": f"{type(error).__name__}: {error}"}
    text = str(result[0][0])
    limit = MAX_EXTRA + MAX_GROWTH * (_characters(messages) + _characters(tools))
    if len(text) > limit:
        return {"failed": f"its text has {len(text)} characters, but these messages allow at most {limit}"}
    return {"text": text}


def _characters(value: Any) -> int:
    """Return about how many characters *value* has as JSON."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(name) + _characters(each) for name, each in value.items())
    return sum(map(_characters, value)) if isinstance(value, list) else 1


def _limit_memory() -> None:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, OSError, ValueError):
        pass  # not on Linux: only the limit of CPU time applies


def _limit_time(seconds: float) -> None:
    """Kill this process after *seconds* of CPU time, unless called again before; 0 removes the limit."""
    import signal

    if hasattr(signal, "ITIMER_PROF"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF kills a process that does not handle it


def main() -> None:
    """Render frames until standard input closes."""
    import transformers.utils.chat_template_utils  # noqa: F401 # before the limits apply

    requests, responses = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # only frames go to the pipe
    start = receive(requests)
    _limit_memory()
    while start is not None and (frame := receive(requests)) is not None:
        _limit_time(CPU_SECONDS)
        response = rendered(start["template"], start["tokens"], **frame)
        _limit_time(0)
        send(responses, response)


if __name__ == "__main__":
    main()

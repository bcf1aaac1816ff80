"""Check grammars in a separate process, which `checker` starts and can end.

What callers write is compiled here first, where it may take all time and memory, or make llguidance crash,
without harm: the process is killed when a grammar takes too much CPU time, even inside of native code, and
its memory is limited. It exits when its standard input closes.

Frames in both directions are lines of JSON. The first incoming one has the vocabulary: {"tokens": the bytes
of each as Latin-1, "specials": ids by name}. The next ones are {"grammar"}, and each response is {"problem",
"place", "part"} as of `FormProblem`, or {} for a grammar without a problem.
"""

from __future__ import annotations

import json
import sys
import threading
from functools import partial
from pathlib import Path
from typing import IO, Any

import llguidance

from headrace.grammars.compiling import GrammarProblem, compile_grammar
from headrace.grammars.places import NOTHING_MATCHES, explain
from headrace.grammars.vocabulary import Vocabulary, byte_vocabulary

CPU_SECONDS = 2.0  # per grammar; ordinary ones take 1 to 20 ms
MEMORY_BYTES = 512 << 20  # in addition to what the process has with its vocabulary
# llguidance recurses as deep as a grammar does. A worker compiles on larger stacks, and computes masks on
# those of usual threads, so that what passes here does not exhaust them there.
STACK_BYTES = 2 << 20


def frame_of(content: dict[str, Any]) -> bytes:
    """Return a frame."""
    return json.dumps(content).encode() + b"\n"


def send(pipe: IO[bytes], frame: bytes) -> None:
    """Write one frame."""
    pipe.write(frame)
    pipe.flush()


def receive(pipe: IO[bytes]) -> dict[str, Any] | None:
    """Read one frame; None at the end of the pipe."""
    line = pipe.readline()
    frame: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
    return frame


def checked(vocabulary: Vocabulary, grammar: str) -> dict[str, str]:
    """Return the response for *grammar*. The compiled one is not kept: its memory would be the next one's."""
    try:
        problem = first_problem(compile_grammar(vocabulary, grammar, stack_bytes=STACK_BYTES))
    except GrammarProblem as error:
        problem = str(error)
    except BaseException as error:  # native code panics with one that is no Exception
        return {"problem": f"it cannot be compiled ({type(error).__name__})", "place": "", "part": ""}
    if not problem:
        return {}
    found = explain(grammar, problem, partial(_compiled, byte_vocabulary()))
    return {"problem": found.message, "place": found.place, "part": found.part}


def first_problem(matcher: llguidance.LLMatcher) -> str:
    """Return why an answer cannot start, or nothing: some problems show with the first mask only."""
    mask = b"" if matcher.is_error() else matcher.compute_bitmask()
    if matcher.is_error():
        return matcher.get_error()
    return "" if any(mask) else NOTHING_MATCHES


def _compiled(vocabulary: Vocabulary, grammar: str) -> str:
    matcher = llguidance.LLMatcher(vocabulary.tokenizer, grammar, log_level=0)
    return matcher.get_error() if matcher.is_error() else ""


def _vocabulary(start: dict[str, Any]) -> Vocabulary:
    tokens = [text.encode("latin-1") for text in start["tokens"]]
    # An end of its own, and any encoding: neither makes a difference to whether a grammar works.
    vocabulary = Vocabulary(
        [*tokens, b""],
        specials={**start["specials"], "<|end of checked answers|>": len(tokens)},
        eos_ids=[len(tokens)],
        encode=lambda text: vocabulary.tokenizer.greedy_tokenize(text),
    )
    return vocabulary


def _limit_memory() -> None:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass  # not on Linux: only the limit of CPU time applies


def _limit_time(seconds: float) -> None:
    """Kill this process after *seconds* of CPU time, unless called again before; 0 removes the limit."""
    import signal

    if hasattr(signal, "ITIMER_PROF"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF kills a process that does not handle it


def _serve() -> None:
    requests, responses = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # only frames go to the pipe
    start = receive(requests)
    if start is None:
        return
    vocabulary = _vocabulary(start)
    del start
    _limit_memory()
    while (frame := receive(requests)) is not None:
        _limit_time(CPU_SECONDS)
        response = checked(vocabulary, frame["grammar"])
        _limit_time(0)
        send(responses, frame_of(response))


def main() -> None:
    """Check frames until standard input closes."""
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()

"""Check grammars of callers before they are used, in a separate process (`checking`), and remember them."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.grammars import checking
from headrace.grammars.problems import FormProblem

MAX_REMEMBERED = 4096  # grammars, of which only the digest and the problem are kept
_PACKAGES = str(Path(__file__).parents[2])  # the folder with this package

# The bytes of each token, empty for special ones, and the ids of special tokens by name.
Tokens = tuple[Sequence[bytes], Mapping[str, int]]


class Checker:
    """Checks grammars for one vocabulary. Safe to use from several threads; checks one grammar at a time.

    tokens   returns the vocabulary; called each time a process starts, which takes about a second for
             150,000 tokens
    """

    def __init__(self, tokens: Callable[[], Tokens]) -> None:
        self._tokens = tokens
        self._known: OrderedDict[bytes, FormProblem | None] = OrderedDict()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Any = None

    def start(self) -> None:
        """Start the process now rather than for the first grammar. Blocks until it has the vocabulary."""
        with self._lock:
            self._running()

    def is_known(self, grammar: str) -> bool:
        """Whether `check` returns or raises for *grammar* without waiting."""
        return _digest(grammar) in self._known

    def check(self, grammar: str) -> None:
        """Check a grammar made by `forms`. Blocks, unless it is known. Raises FormProblem."""
        digest = _digest(grammar)
        if digest not in self._known:
            with self._lock:
                if digest not in self._known:
                    self._known[digest] = self._checked(grammar)
                    while len(self._known) > MAX_REMEMBERED:
                        self._known.popitem(last=False)
        if (problem := self._known.get(digest)) is not None:
            raise FormProblem(problem.message, problem.place, problem.part)

    def close(self) -> None:
        """End the process; the next check starts a new one."""
        if self._end is not None:
            self._end()
        self._process = None

    def _checked(self, grammar: str) -> FormProblem | None:
        response = None
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            checking.send(process.stdin, {"grammar": grammar})
            response = checking.receive(process.stdout)
        except BrokenPipeError:
            pass  # it ended before it had read the whole frame
        if response is None:
            code = process.wait()
            self.close()
            if code == -signal.SIGPROF:
                return FormProblem(
                    f"compiling it takes more than {checking.CPU_SECONDS:g} s of CPU time: make it simpler"
                )
            if code >= 0:
                raise RuntimeError(f"the process that checks grammars ended with status {code}")
            return FormProblem("it cannot be compiled within the limits of memory and depth: make it simpler")
        if "problem" in response:
            return FormProblem(response["problem"], response["place"], response["part"])
        return None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            process = subprocess.Popen(
                # -P: do not import from the current folder, whose modules may shadow Python's
                [sys.executable, "-P", "-m", checking.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # llguidance reports panics there, with the caller's text
                start_new_session=True,  # a Ctrl-C reaches only this process, which ends the other
                env={**os.environ, "PYTHONPATH": _PACKAGES},
            )
            self._process, self._end = process, weakref.finalize(self, _end, process)
            assert process.stdin is not None
            tokens, specials = self._tokens()
            checking.send(
                process.stdin,
                {"tokens": [token.decode("latin-1") for token in tokens], "specials": dict(specials)},
            )
        return self._process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()  # also closes the pipes


def _digest(grammar: str) -> bytes:
    return hashlib.blake2b(grammar.encode(), digest_size=16).digest()

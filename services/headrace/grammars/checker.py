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
from contextlib import suppress
from pathlib import Path
from typing import Any

from headrace.grammars import checking
from headrace.grammars.problems import FormProblem

MAX_REMEMBERED = 4096  # grammars, of which only the digest and the problem are kept
_PACKAGES = str(Path(__file__).parents[2])  # the folder with this package

_ATTEMPTS = 2  # if the process ends for a reason of its own, such as a signal from outside
# The signals with which a grammar that is too large or too deep ends the process.
_CRASHES = frozenset((-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGTRAP))


class _Unknown:
    """In place of the result of a check that was not made yet."""


_UNKNOWN = _Unknown()

# The bytes of each token, empty for special ones, and the ids of special tokens by name.
Tokens = tuple[Sequence[bytes], Mapping[str, int]]


class Checker:
    """Checks grammars for one vocabulary. Safe to use from several threads; checks one grammar at a time.

    tokens   returns the vocabulary; called once, when the first process starts
    """

    def __init__(self, tokens: Callable[[], Tokens]) -> None:
        self._tokens = tokens
        self._vocabulary = b""  # its frame, for each process that starts
        self._known: OrderedDict[bytes, FormProblem | None] = OrderedDict()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Any = None
        self._closed = False

    def start(self) -> None:
        """Start the process now rather than for the first grammar. Blocks until it has the vocabulary.

        A process takes about a second for a vocabulary of 150,000 tokens.
        """
        with self._lock:
            self._running()

    def is_known(self, grammar: str) -> bool:
        """Whether `check` returns or raises for *grammar* without waiting."""
        return _digest(grammar) in self._known

    def check(self, grammar: str) -> None:
        """Check a grammar made by `forms`. Blocks, unless it is known. Raises FormProblem.

        Raises RuntimeError if the process ends for another reason than the grammar, twice; such a grammar
        stays unknown.
        """
        digest = _digest(grammar)
        problem = self._known.get(digest, _UNKNOWN)
        if isinstance(problem, _Unknown):
            with self._lock:
                problem = self._known.get(digest, _UNKNOWN)
                if isinstance(problem, _Unknown):
                    self._known[digest] = problem = self._checked(grammar)
                    while len(self._known) > MAX_REMEMBERED:
                        self._known.popitem(last=False)
        if problem is not None:
            raise FormProblem(problem.message, problem.place, problem.part)

    def close(self) -> None:
        """End the process, and a check that is running; later ones of unknown grammars fail."""
        self._closed = True
        self._discard()

    def _discard(self) -> None:
        if self._end is not None:
            self._end()
        self._process = None

    def _checked(self, grammar: str) -> FormProblem | None:
        code = 0
        for _ in range(_ATTEMPTS):
            response, code = self._response(grammar)
            if response is not None:
                if "problem" in response:
                    return FormProblem(response["problem"], response["place"], response["part"])
                return None
            if code == -signal.SIGPROF:
                return FormProblem(
                    f"compiling it takes more than {checking.CPU_SECONDS:g} s of CPU time: make it simpler"
                )
            if code in _CRASHES:
                return FormProblem(
                    "it cannot be compiled within the limits of memory and depth: make it simpler"
                )
        raise RuntimeError(f"the process that checks grammars ended with status {code}")

    def _response(self, grammar: str) -> tuple[dict[str, Any] | None, int]:
        """Return the response of the process; None with its status if it ended before."""
        response = None
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            checking.send(process.stdin, checking.frame_of({"grammar": grammar}))
            response = checking.receive(process.stdout)
        except BrokenPipeError:
            pass  # it ended before it had read the whole frame
        if response is not None:
            return response, 0
        code = process.wait()
        self._discard()
        return None, code

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            if not self._vocabulary:
                tokens, specials = self._tokens()
                spelled = [token.decode("latin-1") for token in tokens]
                self._vocabulary = checking.frame_of({"tokens": spelled, "specials": dict(specials)})
            paths = (_PACKAGES, os.environ.get("PYTHONPATH", ""))
            process = subprocess.Popen(
                # -P: do not import from the current folder, whose modules may shadow Python's
                [sys.executable, "-P", "-m", checking.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # llguidance reports panics there, with the caller's text
                start_new_session=True,  # a Ctrl-C reaches only this process, which ends the other
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )
            self._process, self._end = process, weakref.finalize(self, _end, process)
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it ended, which `_response` notices
                checking.send(process.stdin, self._vocabulary)
        if self._closed:
            self._discard()
            raise RuntimeError("the process that checks grammars is closed")
        return self._process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()  # also closes the pipes


def _digest(grammar: str) -> bytes:
    return hashlib.blake2b(grammar.encode(), digest_size=16).digest()

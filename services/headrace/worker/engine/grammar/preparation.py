"""Hold sequences back while their grammars are compiled, so that no step waits for a compiler.

A grammar is compiled, and the resumed part of its answer is replayed, on threads of its own. Meanwhile the
sequence is not in the scheduler: others run on, and it can be cancelled or reach its deadline here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic

from headrace.grammars.compiling import GrammarProblem
from headrace.grammars.matching import Matcher, follow
from headrace.worker.engine.interface import Fault, Grammars
from headrace.worker.runner import FinishReason, K, SequenceSpec, SequenceUpdate

log = logging.getLogger(__name__)

# A grammar takes milliseconds, and at worst about a second. Steps need the CPUs as well.
_THREADS = 2

UNSUPPORTED = Fault("the engine does not support grammars", invalid=True)
_FAILED = Fault("the grammar cannot be compiled; see the worker's log")


class Preparing(Generic[K]):
    """A sequence with a grammar.

    at_once   whether its matcher was there when it arrived: its grammar compiled, and nothing to replay
    job       makes the matcher; None before it is started
    """

    __slots__ = ("at_once", "job", "spec")

    def __init__(self, spec: SequenceSpec[K], *, at_once: bool) -> None:
        self.spec = spec
        self.at_once = at_once
        self.job: Future[None] | None = None


Prepared = Callable[[Preparing[K], Matcher | Fault], None]


class Preparation(Generic[K]):
    """The sequences of one engine that are held back.

    One thread uses it; `enter` and `start` may be called on any.

    grammars   of the engine; None if it does not support them
    prepared   called on another thread with the outcome of each sequence
    """

    def __init__(self, grammars: Grammars | None, prepared: Prepared[K]) -> None:
        self._grammars = grammars
        self._prepared = prepared
        self._held: dict[K, Preparing[K]] = {}
        self._leaving: set[K] = set()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammars")

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: K) -> bool:
        return key in self._held

    @property
    def specs(self) -> list[SequenceSpec[K]]:
        """The sequences that are held back, in the order of their arrival."""
        return [own.spec for own in self._held.values()]

    def enter(self, spec: SequenceSpec[K]) -> Preparing[K]:
        """Return a sequence with a grammar as it is prepared."""
        grammars = self._grammars
        at_once = grammars is not None and not spec.resumed and spec.params.grammar in grammars
        return Preparing(spec, at_once=at_once)

    def start(self, own: Preparing[K]) -> None:
        """Begin to make the matcher of a sequence, if it is not there at once."""
        if not own.at_once:
            with suppress(RuntimeError):  # stopped: it is held back until it ends
                own.job = self._threads.submit(self._run, own)

    def hold(self, own: Preparing[K]) -> Matcher | None:
        """Return the matcher of a sequence if it is there; else hold the sequence back until it is taken."""
        if own.at_once and self._grammars is not None:
            inner = self._grammars.kept(own.spec.params.grammar)
            if inner is not None:
                return Matcher(inner)
            own.at_once = False  # the grammar was dropped meanwhile
            self.start(own)
        self._held[own.spec.key] = own
        return None

    def take(self, own: Preparing[K]) -> bool:
        """Hold a sequence back no longer. Returns whether it was; it may have ended."""
        if self._held.get(own.spec.key) is not own:
            return False
        del self._held[own.spec.key]
        self._leaving.discard(own.spec.key)
        return True

    def cancel(self, keys: Iterable[K]) -> None:
        """Let sequences end before the next step. Unknown keys are ignored."""
        self._leaving.update(key for key in keys if key in self._held)

    def cancel_all(self) -> None:
        """Let all sequences end before the next step."""
        self._leaving.update(self._held)

    def remove_ended(self, now: float) -> list[SequenceUpdate[K]]:
        """Remove sequences that are cancelled or past their deadlines. Returns their last updates."""
        ended = [
            (own, FinishReason.CANCELLED if key in self._leaving else FinishReason.DEADLINE)
            for key, own in self._held.items()
            if key in self._leaving or own.spec.deadline.passed(now)
        ]
        for own, _ in ended:
            self.take(own)
            if own.job is not None:
                own.job.cancel()
        return [ended_early(own.spec, reason) for own, reason in ended]

    def timeout(self, now: float) -> float | None:
        """Return in how many seconds the first deadline passes; None if there is none."""
        first = min((own.spec.deadline.at for own in self._held.values()), default=math.inf)
        return None if first == math.inf else max(first - now, 0.0)

    def stop(self) -> None:
        """Compile no more grammars; does not wait for those that are being compiled."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, own: Preparing[K]) -> None:
        spec = own.spec
        outcome: Matcher | Fault = UNSUPPORTED
        try:
            if self._grammars is not None:
                outcome = follow(self._grammars, spec.params.grammar, spec.ids[spec.prompt :])
        except GrammarProblem as problem:
            outcome = Fault(f"the grammar cannot be used: {problem}", invalid=True)
        except Exception:
            log.exception("a grammar cannot be compiled")
            outcome = _FAILED
        self._prepared(own, outcome)


def ended_early(spec: SequenceSpec[K], reason: FinishReason, fault: str = "") -> SequenceUpdate[K]:
    """Return the last update of a sequence that was in no step."""
    return SequenceUpdate(spec.key, spec.resumed, finish=reason, fault=fault)

"""Compile grammars for one vocabulary, within bounds of time and memory, and keep the compiled ones."""

from __future__ import annotations

import _thread
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable

import llguidance

from headrace.grammars.vocabulary import Vocabulary

log = logging.getLogger(__name__)

# Compiled grammars that are kept, and the bytes of their texts.
MAX_KEPT = 32
MAX_KEPT_BYTES = 8 << 20
# A mask takes tens of microseconds as a rule, and at worst some 50 ms: its time grows with the square of the
# items of a row. A schema has about 4 of them for each optional property of an object. A state of the lexer
# takes up to 1 KiB, so a compiled grammar grows to some 50 MiB at most. Messages quote nothing of an answer.
LIMITS = llguidance.LLParserLimits(
    max_items_in_row=1_000,
    step_lexer_fuel=100_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
# llguidance compiles rules that refer to each other recursively, with up to some 5 KiB of stack for each.
# Beyond the 8 MiB of a usual thread, the process would end. The stack is reserved, not used.
STACK_BYTES = 512 << 20
_LONGEST_PROBLEM = 500  # characters

_stack_lock = threading.Lock()


class GrammarProblem(Exception):
    """A grammar cannot be compiled or followed; the message says why, for people."""


def problem_of(matcher: llguidance.LLMatcher) -> GrammarProblem:
    """Return the problem of a matcher that is in an error state."""
    text = matcher.get_error().removesuffix("<non-verbose/>").strip()
    return GrammarProblem(text if len(text) <= _LONGEST_PROBLEM else text[:_LONGEST_PROBLEM] + "...")


def compile_grammar(
    vocabulary: Vocabulary, grammar: str, *, stack_bytes: int = STACK_BYTES
) -> llguidance.LLMatcher:
    """Return a matcher at the start of *grammar*, in llguidance's format. Raises GrammarProblem.

    stack_bytes   of the thread that compiles; a grammar that needs more ends the process
    """
    compiled = _on_own_stack(
        lambda: llguidance.LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=LIMITS), stack_bytes
    )
    if compiled.is_error():
        raise problem_of(compiled)
    return compiled


class Grammars:
    """The compiled grammars of one vocabulary. Safe to use from several threads; releases Python's lock."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._kept: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __contains__(self, grammar: str) -> bool:
        """Return whether the compiled grammar is kept."""
        return grammar in self._kept

    def matcher(self, grammar: str, *, afresh: bool = False) -> llguidance.LLMatcher:
        """Return a new matcher at the start of *grammar*, in llguidance's format. Raises GrammarProblem.

        afresh   compile it for this matcher alone, and keep the compiled one no longer: its matchers share
                 the states of their lexer, whose number is limited, so others may have used it up
        """
        kept = None if afresh else self.kept(grammar)
        if kept is not None:
            return kept
        compiled = compile_grammar(self.vocabulary, grammar)
        if afresh:
            self._forget(grammar)
            return compiled
        self._keep(grammar, compiled)
        return compiled.deep_copy()

    def kept(self, grammar: str) -> llguidance.LLMatcher | None:
        """Return a new matcher as `matcher` does if that takes no time; None if the grammar is not kept."""
        with self._lock:
            compiled = self._kept.get(grammar)
            if compiled is None:
                return None
            self._kept.move_to_end(grammar)
        return compiled.deep_copy()

    def _forget(self, grammar: str) -> None:
        with self._lock:
            if self._kept.pop(grammar, None) is not None:
                self._bytes -= len(grammar)

    def _keep(self, grammar: str, compiled: llguidance.LLMatcher) -> None:
        with self._lock:
            if self._kept.pop(grammar, None) is None:
                self._bytes += len(grammar)
            self._kept[grammar] = compiled
            while len(self._kept) > MAX_KEPT or self._bytes > MAX_KEPT_BYTES:
                oldest, _ = self._kept.popitem(last=False)
                self._bytes -= len(oldest)


def _on_own_stack(make: Callable[[], llguidance.LLMatcher], stack_bytes: int) -> llguidance.LLMatcher:
    """Call *make* on a thread with a stack of this size."""
    made: list[llguidance.LLMatcher] = []
    ended = threading.Lock()

    def run() -> None:
        try:
            made.append(make())
        except BaseException:
            log.exception("a grammar cannot be compiled")
        finally:
            ended.release()

    ended.acquire()
    # The size is that of all threads of the process which start meanwhile: `Thread.start` would wait here
    # until the new one runs, and others could start.
    with _stack_lock:
        before = threading.stack_size(stack_bytes)
        try:
            _thread.start_new_thread(run, ())
        finally:
            threading.stack_size(before)
    ended.acquire()
    if not made:
        raise GrammarProblem("it cannot be compiled")
    return made[0]

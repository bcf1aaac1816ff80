"""Compile grammars for one vocabulary, within bounds of time and memory, and keep the compiled ones."""

from __future__ import annotations

import threading
from collections import OrderedDict

import llguidance

from headrace.grammars.vocabulary import Vocabulary

# Compiled grammars that are kept, and the bytes of their texts.
MAX_KEPT = 128
MAX_KEPT_BYTES = 8 << 20
_LONGEST_PROBLEM = 500  # characters
LIMITS = llguidance.LLParserLimits(verbose_errors=False)


class GrammarProblem(Exception):
    """A grammar cannot be compiled or followed; the message says why, for people."""


def problem_of(matcher: llguidance.LLMatcher) -> GrammarProblem:
    """Return the problem of a matcher that is in an error state."""
    text = matcher.get_error().removesuffix("<non-verbose/>").strip()
    return GrammarProblem(text if len(text) <= _LONGEST_PROBLEM else text[:_LONGEST_PROBLEM] + "...")


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

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """Return a new matcher at the start of *grammar*, in llguidance's format. Raises GrammarProblem."""
        kept = self.kept(grammar)
        if kept is not None:
            return kept
        compiled = llguidance.LLMatcher(self.vocabulary.tokenizer, grammar, log_level=0, limits=LIMITS)
        if compiled.is_error():
            raise problem_of(compiled)
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

    def _keep(self, grammar: str, compiled: llguidance.LLMatcher) -> None:
        with self._lock:
            if self._kept.pop(grammar, None) is None:
                self._bytes += len(grammar)
            self._kept[grammar] = compiled
            while len(self._kept) > MAX_KEPT or self._bytes > MAX_KEPT_BYTES:
                oldest, _ = self._kept.popitem(last=False)
                self._bytes -= len(oldest)

"""Follow answers through grammars, and compute which tokens may come next.

A `Matcher` is a function of its grammar and the ids of the answer so far: any worker computes an equal one.
`Masks` computes the masks of the matchers of a step. Both release Python's lock while they compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import llguidance
import numpy as np
import numpy.typing as npt

from headrace.grammars.compiling import GrammarProblem, Grammars, problem_of
from headrace.grammars.vocabulary import Vocabulary

Bits = npt.NDArray[np.int32]

# Computing one mask takes some 100 us, and handing it to a thread as long. With two threads, 32 masks took
# 6 ms, and 3.5 ms one after the other.
_FEWEST_PARALLEL, _FEWEST_THREADS = 24, 4
_MOST_THREADS = 8


class Matcher:
    """Follows one answer through its grammar. One thread at a time uses it.

    inner      at the first *consumed* ids of the answer
    consumed   number of ids
    alone      whether it shares no limit with other matchers, so that a problem is its own
    """

    __slots__ = ("alone", "consumed", "inner")

    def __init__(self, inner: llguidance.LLMatcher, *, alone: bool = False) -> None:
        self.inner = inner
        self.consumed = 0
        self.alone = alone

    def advance(self, ids: Sequence[int]) -> None:
        """Consume the next ids of the answer. Raises GrammarProblem if the grammar does not allow them."""
        if ids:
            if not self.inner.consume_tokens(list(ids)):
                raise problem_of(self.inner)
            self.consumed += len(ids)

    @property
    def forced(self) -> bool:
        """Whether the next bytes are known, or the end: a mask has one token, or those of one text."""
        return bool(self.inner.is_stopped() or self.inner.compute_ff_bytes())

    def forced_ids(self) -> list[int]:
        """Return the ids that probably come next because their text must; often none.

        The grammar may allow the same text in other tokens. Takes some 2 us.
        """
        return [] if self.inner.is_stopped() else list(self.inner.compute_ff_tokens())

    def allows(self, id: int) -> bool:
        """Return whether an id may come next, as its bit in the mask says unless the matcher is `forced`.

        False if the matcher exceeds a limit.
        """
        return bool(self.inner.validate_tokens([id]) == 1)


def follow(grammars: Grammars, grammar: str, answer: Sequence[int]) -> Matcher:
    """Return a matcher of *grammar* that has consumed an answer.

    Takes milliseconds, or seconds for the largest grammars that are within the limits. Safe on any thread.
    Raises GrammarProblem if the grammar cannot be compiled or does not allow the answer.
    """
    kept = grammars.kept(grammar)
    if kept is not None:
        matcher = Matcher(kept)
        try:
            matcher.advance(answer)
            return matcher
        except GrammarProblem:  # perhaps because other answers have used up a limit that they share
            matcher = Matcher(grammars.matcher(grammar, afresh=True), alone=True)
    else:
        matcher = Matcher(grammars.matcher(grammar))
    matcher.advance(answer)
    return matcher


class Masks:
    """Computes masks of tokens: one bit per token, set if it may come next.

    vocabulary   of the matchers
    threads      that compute the masks of many matchers

    words        numbers of a mask: bit t % 32 of number t // 32 is that of token t
    """

    def __init__(self, vocabulary: Vocabulary, *, threads: int) -> None:
        self.words = -(-vocabulary.size // 32)
        self._threads = min(threads, _MOST_THREADS)
        self._executor: llguidance.LLExecutor | None = None

    def fill(self, matchers: Mapping[int, Matcher], bits: Bits) -> dict[int, GrammarProblem]:
        """Compute the mask of each matcher, in the row of *bits* that is its key.

        bits   [rows, words or more] int32, each row contiguous; receives the masks. The ids that end an
               answer are set exactly where the grammar may end

        Returns the problems of matchers that exceed a limit, by key; their masks are undefined.
        """
        address, stride, size = bits.ctypes.data, bits.strides[0], 4 * self.words
        if len(matchers) < _FEWEST_PARALLEL or self._threads < _FEWEST_THREADS:
            for place, matcher in matchers.items():
                matcher.inner.unsafe_compute_mask_ptr(address + place * stride, size)
        else:
            self._fill_parallel(matchers, bits)
        return {
            place: problem_of(matcher.inner)
            for place, matcher in matchers.items()
            if matcher.inner.is_error()
        }

    def _fill_parallel(self, matchers: Mapping[int, Matcher], bits: Bits) -> None:
        if self._executor is None:
            self._executor = llguidance.LLExecutor(self._threads)
        # The executor needs contiguous masks.
        masks = np.empty((len(matchers), self.words), np.int32)
        jobs = [(matcher.inner, index) for index, matcher in enumerate(matchers.values())]
        self._executor.unsafe_compute_mask_ptr(jobs, masks.ctypes.data, 4 * self.words, len(matchers))
        bits[list(matchers), : self.words] = masks

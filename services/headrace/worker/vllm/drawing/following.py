"""Follow structured answers in the worker's own process, beside the processor that restricts them in vLLM's.

A grammar that cannot be compiled is found before vLLM has the sequence. The processor cannot report a problem
that it finds later; it ends the answer, and here the answer is then found not to be complete.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from headrace.grammars.compiling import GrammarProblem, Grammars
from headrace.grammars.matching import Matcher, follow
from headrace.worker.runner import K, SequenceSpec

_THREADS = 2  # a grammar takes milliseconds, and at worst about a second


class Follower:
    """Follows one answer. Not safe to use on several threads at a time."""

    def __init__(self, matcher: Matcher, eos_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids

    def problem(self, ids: Sequence[int], end: int | None) -> str:
        """Follow the answer's next ids; return why they are not allowed, or an empty text.

        end   the id after them that ended the answer; None if it goes on or was cut off
        """
        try:
            self._matcher.advance(ids)
        except GrammarProblem as problem:
            return f"the answer cannot follow its grammar: {problem}"
        if end is None or self._may_end(end):
            return ""
        return "the answer cannot follow its grammar: following it exceeds a limit"

    def _may_end(self, end: int) -> bool:
        inner = self._matcher.inner
        if end in self._eos_ids:
            return bool(inner.is_stopped() or inner.is_accepting())
        return self._matcher.allows(end)


class Structure:
    """Prepares the followers of one model's answers.

    grammars   of the model; None if it supports none
    """

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammars")

    async def follower(self, spec: SequenceSpec[K]) -> Follower:
        """Return the follower of a sequence with a grammar, after the resumed part of its answer.

        Raises GrammarProblem if the grammar cannot be compiled or does not allow that part.
        """
        grammars = self._grammars
        if grammars is None:
            raise GrammarProblem("the worker does not support grammars")
        answer = spec.ids[spec.prompt :]
        loop = asyncio.get_running_loop()
        matcher = await loop.run_in_executor(self._threads, follow, grammars, spec.params.grammar, answer)
        return Follower(matcher, grammars.vocabulary.eos_ids)

    def close(self) -> None:
        """Compile no more grammars; does not wait for those that are being compiled."""
        self._threads.shutdown(wait=False, cancel_futures=True)

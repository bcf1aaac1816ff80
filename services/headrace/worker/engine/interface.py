"""The interface between the scheduler, which decides what a step computes, and the engine that computes it.

The scheduler turns sequences into `Row`s, and an `Engine` turns the rows of one step into `Token`s. The
engine owns the KV memory, which is divided into blocks of equally many tokens. The scheduler decides which
block holds which part of which sequence, and lets sequences with a common prefix share blocks. The engine
does not know why a row is in the step, which caller it belongs to, or when to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

# Part of this interface as well: an engine needs no other import.
from headrace.grammars.compiling import Grammars as Grammars
from headrace.worker.runner import ModelInfo as ModelInfo
from headrace.worker.runner import PromptLogprobs as PromptLogprobs
from headrace.worker.runner import SamplingParams as SamplingParams
from headrace.worker.runner import TopTokens as TopTokens

UNSCORED = range(0)


class Memo:
    """What an engine keeps of one sequence between its rows, to save work.

    It is a function of the rows' ids and params. If it is lost, as on another worker, the engine computes an
    equal one.
    """

    __slots__ = ("kept", "matcher")

    def __init__(self) -> None:
        self.kept: Any = None
        self.matcher: Any = None  # of its grammar


# Rows and tokens are not frozen, though nothing changes them: one of each is made per token, and a frozen
# dataclass takes four times as long to make.
@dataclass(slots=True)
class Row:
    """One sequence's part of one step: a chunk of its prompt, or its latest token. Never modified.

    blocks   the sequence's block table: block `blocks[p // block_tokens]` holds the key and value of
             position p, at index `p % block_tokens`. Covers at least positions 0 to stop - 1. It grows,
             and blocks of equal contents may be exchanged, so an engine that runs ahead copies what it
             needs at the launch
    start    position of the first id to compute. The blocks hold the keys and values of all positions
             before it, written in earlier steps by this sequence or by one with the same prefix
    stop     position after the last id to compute; the step computes `ids[start:stop]`
    ids      prompt and answer so far: the whole history, not only the chunk. Grows when tokens are known,
             also while the step is in flight
    prompt   number of ids that are prompt; the rest is answer
    sample   whether to sample the token at position `stop`: true for decodes and for the last chunk of a
             prompt, false for earlier chunks
    memo     the sequence's own, the same in all of its rows; a new one by default
    pending  whether the row's only id, at position start, is the token that the sequence's row in the step
             before samples, and not known yet: at the launch `ids` ends before it. Only for engines with
             `ahead`. If the row before fails, or its token ends the sequence, this row's result is ignored
    version  identifies the contents of `blocks`: while it is unchanged, blocks are only appended. Unique
             among all block tables
    scored   positions of the prompt's tokens whose log-probabilities the step computes, consecutive and in
             start + 1 to stop: the logits of a token's predecessor give its distribution. So the first id
             after a chunk is scored with the chunk. Not empty only if params.prompt_logprobs is set
    draft    guesses of the ids at position `stop` and after, for a decode: the step computes them too, and
             samples after each one that is right. The blocks cover their positions. Only for engines that
             verify drafts
    """

    blocks: Sequence[int]
    start: int
    stop: int
    ids: Sequence[int]
    prompt: int
    sample: bool
    params: SamplingParams
    memo: Memo = field(default_factory=Memo, compare=False)
    pending: bool = False
    version: int = 0
    scored: range = UNSCORED
    draft: Sequence[int] = ()


@dataclass(slots=True)
class Token:
    """A sampled token. Never modified.

    logprob   its log-probability, if the request asks for it
    top       the most likely tokens at its place, if the request asks for more than 0
    prompt    the log-probabilities of `Row.scored`, if there are any
    more      the tokens after it, if the row's draft is right: one more than the tokens of the draft that are
    """

    id: int
    logprob: float | None = None
    top: TopTokens | None = None
    prompt: PromptLogprobs | None = None
    more: Sequence[Token] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one row could not be computed; the other rows of the step are not affected.

    invalid   whether the request is to blame, and not the engine: its grammar
    """

    message: str
    invalid: bool = False


# The result of a row: a token if it samples, else the log-probabilities of `Row.scored`, or None if there are
# none either.
Result = Token | PromptLogprobs | Fault | None


class EngineBroken(Exception):
    """The device failed in a way that makes every later step fail too: the process must end."""


class LaunchedStep(Protocol):
    """A step that is being computed."""

    def wait(self) -> Sequence[Result]:
        """Wait for the results: one entry per row, in order.

        Called once, in the order of the launches. An engine that computes on the calling thread does so here.
        Raises what the step raises; `EngineBroken` if later steps would fail too. If it raises, the contents
        of the blocks that the rows write are undefined.
        """
        ...


class DeferredStep:
    """A launched step of an engine that computes on the calling thread: `wait` computes it.

    compute   computes all rows
    """

    __slots__ = ("_compute", "_rows")

    def __init__(self, compute: Callable[[Sequence[Row]], Sequence[Result]], rows: Sequence[Row]) -> None:
        self._compute = compute
        self._rows = rows

    def wait(self) -> Sequence[Result]:
        """See `LaunchedStep.wait`."""
        return self._compute(self._rows)


class Engine(Protocol):
    """Computes steps. One thread calls `launch` and `wait`, never twice at a time."""

    @property
    def model(self) -> ModelInfo:
        """The loaded model; constant."""
        ...

    @property
    def grammars(self) -> Grammars | None:
        """The grammars of the model's vocabulary; None if the engine does not support grammars; constant.

        Safe on any thread: matchers are made ahead of the steps that need them.
        """
        ...

    @property
    def ahead(self) -> int:
        """How many steps may be launched before the results of an earlier one are awaited: 0 or 1; constant.

        0 for an engine that computes on the calling thread.
        """
        ...

    def launch(self, rows: Sequence[Row]) -> LaunchedStep:
        """Begin to compute all rows in one pass, without waiting for a device.

        rows   one to max_running rows of different sequences. No row writes a block that another row of the
               step reads or writes

        Steps are computed in the order of their launches. Writes the keys and values of positions start to
        stop - 1 of each row, and reads those of positions 0 to stop - 1 and nothing else. Other contents of a
        block are stale, so the scheduler never clears a block.

        A token depends on its row alone (ids, params, position), never on the other rows.
        """
        ...

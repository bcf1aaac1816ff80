"""What an engine is: the seam between deciding a step and computing it.

The scheduler turns sequences into `Row`s, an `Engine` turns the rows of one step into `Token`s. The
engine keeps the KV memory, cut into blocks of equally many tokens; the scheduler says which block holds
which part of which sequence, and may let sequences share blocks that begin alike. The engine does not
know why a row is in the step, who asked, or when to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one sequence chooses its tokens; ranges and meaning as in `headrace.v1.Sampling`."""

    seed: int
    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    logprobs: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """A loaded model, as `headrace.v1.ModelDescription` tells it to batchers.

    context_length   tokens of prompt and answer together, at most kv_tokens: a model whose KV memory
                     holds less than its own context has a shorter one
    max_running      most rows of a step, and most sequences that run at the same time
    block_tokens     tokens in one block of KV memory
    kv_blocks        blocks 0 to kv_blocks - 1 are the scheduler's; what an engine needs for itself, such
                     as a block for padding to write to, comes on top

    Raises ValueError where one sequence could outgrow all KV memory.
    """

    name: str
    revision: str
    dtype: str
    device: str
    tokenizer_fingerprint: str
    weights_fingerprint: str
    context_length: int
    vocabulary_size: int
    eos_ids: frozenset[int]
    max_running: int
    block_tokens: int
    kv_blocks: int
    exact: bool
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.context_length > self.kv_tokens:
            raise ValueError(
                f"a context of {self.context_length} tokens does not fit a KV memory of {self.kv_tokens}: "
                "give it a shorter context or more blocks"
            )

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV memory holds in all."""
        return self.kv_blocks * self.block_tokens


class Memo:
    """What an engine keeps of one sequence between its rows, to save work.

    A function of the rows' ids and params: if it is lost, as on another worker, it is made anew and equal.
    """

    __slots__ = ("kept",)

    def __init__(self) -> None:
        self.kept: Any = None


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of one step: a chunk of its prompt, or the token it decoded last.

    blocks   the sequence's block table: the keys and values of position p live in block
             `blocks[p // block_tokens]` at `p % block_tokens`. Covers at least positions 0 to stop - 1.
             Valid for this step: it grows, and blocks of equal contents may be exchanged
    start    position of the first of the ids to compute; the keys and values of all before are in
             their blocks already, written in earlier steps by this sequence or by one that began alike
    stop     position after the last; `ids[start:stop]` are computed
    ids      prompt and answer so far: the whole history, not only the chunk. Grows between steps
    prompt   how many of the ids are prompt; the rest is answer
    sample   whether to draw the token at position `stop`: true for the last chunk and for decodes,
             false while more of the prompt is to come
    memo     the sequence's own, the same in all of its rows; a new one where none is given
    """

    blocks: Sequence[int]
    start: int
    stop: int
    ids: Sequence[int]
    prompt: int
    sample: bool
    params: SamplingParams
    memo: Memo = field(default_factory=Memo, compare=False)


@dataclass(frozen=True, slots=True)
class Token:
    """What a sampling row drew: its id, and its log-probability where the request asked for it."""

    id: int
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one row could not be computed; its neighbours are unharmed."""

    message: str


def nothing() -> None:
    """Nothing to do meanwhile."""


class Engine(Protocol):
    """Computes steps. One thread calls `step`, never twice at once."""

    @property
    def model(self) -> ModelInfo:
        """What is loaded; constant."""
        ...

    def step(
        self, rows: Sequence[Row], meanwhile: Callable[[], None] = nothing
    ) -> list[Token | Fault | None]:
        """Compute all rows in one pass.

        rows        one to max_running rows, each of another sequence. No row writes a block that another
                    row of the step reads or writes
        meanwhile   called exactly once: by an engine whose device computes by itself after the launch,
                    before it waits for the results, so that the caller's work overlaps with the
                    device's; by an engine that computes on the calling thread before it starts

        Writes the keys and values of positions start to stop - 1 of each row and reads those of positions
        0 to stop - 1, nothing else: whatever else a block holds is stale, so no block is ever cleared
        by the scheduler.

        Returns one entry per row, in order: None where the row does not sample. A token depends on
        the row alone (ids, params, position), never on its neighbours. Where it raises, the blocks that
        the rows were to write hold nothing of use.
        """
        ...

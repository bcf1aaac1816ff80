"""What an engine is: the seam between deciding a step and computing it.

The scheduler turns sequences into `Row`s, an `Engine` turns the rows of one step into `Token`s. The
engine keeps the KV memory, one slot per running sequence; it does not know why a row is in the step,
who asked, or when to stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """A loaded model, as `headrace.v1.ModelDescription` tells it to batchers."""

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
    exact: bool
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of one step: a chunk of its prompt, or the token it decoded last.

    slot     where its keys and values live, 0 to max_running - 1; its own from its first row until
             `Engine.release`
    start    position of the first of the ids to compute; all before are in the slot already
    stop     position after the last; `ids[start:stop]` are computed
    ids      prompt and answer so far: the whole history, not only the chunk. Grows between steps
    prompt   how many of the ids are prompt; the rest is answer
    sample   whether to draw the token at position `stop`: true for the last chunk and for decodes,
             false while more of the prompt is to come
    """

    slot: int
    start: int
    stop: int
    ids: Sequence[int]
    prompt: int
    sample: bool
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Token:
    """What a sampling row drew: its id, and its log-probability where the request asked for it."""

    id: int
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one row could not be computed; its neighbours are unharmed."""

    message: str


class Engine(Protocol):
    """Computes steps. One thread calls `step` and `release`, never two at once."""

    @property
    def model(self) -> ModelInfo:
        """What is loaded; constant."""
        ...

    def step(self, rows: Sequence[Row]) -> list[Token | Fault | None]:
        """Compute all rows in one pass.

        rows  one to max_running rows, each of another slot

        Returns one entry per row, in order: None where the row does not sample. A token depends on
        the row alone (ids, params, position), never on its neighbours.
        """
        ...

    def release(self, slot: int) -> None:
        """Forget what the slot holds; the next row for it starts at position 0."""
        ...

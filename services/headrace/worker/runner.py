"""The interface between the batchers' streams and whatever computes tokens.

`streams` submits sequences to a `Runner` and receives a report of each step. `engine.plan.loop.EngineLoop`
is the runner that drives our own engine, `vllm.runner.VllmRunner` the one over vLLM.
Everything that crosses the interface is a plain value defined here, without protobuf, gRPC and torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, Protocol, TypeVar

from headrace.deadline import NEVER, Deadline

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """A loaded model, as `headrace.v1.ModelDescription` describes it to batchers.

    context_length   most tokens of prompt and answer together. At most kv_tokens: if KV memory holds less
                     than the model's own context, the context is shortened
    max_running      most rows of a step, and most sequences that run at the same time
    block_tokens     tokens in one block of KV memory
    kv_blocks        the scheduler allocates blocks 0 to kv_blocks - 1. Blocks that an engine needs for
                     itself, such as one that padding is written to, are not counted

    Raises ValueError if one sequence could outgrow the whole KV memory.
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
                "use a shorter context or more blocks"
            )

    @property
    def kv_tokens(self) -> int:
        """Total number of tokens that KV memory holds."""
        return self.kv_blocks * self.block_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one sequence are sampled; ranges and meaning as in `headrace.v1.Sampling`.

    grammar   of the answer, as in `headrace.v1.Sequence`; empty: any tokens
    """

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
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()
    grammar: str = ""


@dataclass(frozen=True, slots=True)
class SequenceSpec(Generic[K]):
    """A sequence as it is submitted.

    key         identifies the sequence in its updates; unique among the sequences in flight
    ids         prompt, then the answer tokens that an earlier attempt has delivered
    prompt      number of ids that are prompt
    deadline    when the sequence ends with FinishReason.DEADLINE
    submitted   seconds of time.monotonic()
    priority    0, the least urgent, to 9
    scope       only sequences of equal scope share the prefix cache, and guess from answers; opaque
    """

    key: K
    ids: Sequence[int]
    prompt: int
    params: SamplingParams
    deadline: Deadline = NEVER
    submitted: float = 0.0
    priority: float = 5
    scope: bytes = b""

    @property
    def resumed(self) -> int:
        """Number of answer tokens that came with the sequence."""
        return len(self.ids) - self.prompt


class FinishReason(Enum):
    """Why a sequence ended: FAULT if the engine failed, INVALID if the sequence's grammar is to blame."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    FAULT = "fault"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class SequenceTimes:
    """When a sequence reached each stage, in seconds of time.monotonic(); None if it did not.

    started       its prefill began
    first_token   the first token of this attempt was sampled
    last_token    the latest token was sampled
    """

    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None


_NO_TIMES = SequenceTimes()


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The most likely tokens at one place, most likely first; as many as the request asks for.

    If the token at that place is one of them, its log-probability there has the same bits as its own.
    """

    ids: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of consecutive tokens of a prompt.

    offset     position in the prompt of the first of them, at least 1
    logprobs   one per token
    top        one per token if the request asks for more than 0, else empty
    """

    offset: int
    logprobs: Sequence[float]
    top: Sequence[TopTokens] = ()


# Not frozen, though nothing changes it: one is made per token, and a frozen one takes five times as long.
@dataclass(slots=True)
class SequenceUpdate(Generic[K]):
    """New tokens of one sequence, its end, or both. Never modified.

    offset     position of the first new token in the answer, resumed tokens included
    logprobs   one per token if the sequence asks for them, else empty
    top        one per token if the sequence asks for top_logprobs above 0, else empty
    prompt     the next part of the prompt, if the sequence asks for prompt_logprobs; all parts come before
               the first token, or with it
    cached     number of submitted ids that the prefix cache held, so far
    finish     set in the last update of the sequence, and only there
    fault      the error message, if finish is FAULT or INVALID
    times      set in the last update
    """

    key: K
    offset: int
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    cached: int = 0
    finish: FinishReason | None = None
    fault: str = ""
    times: SequenceTimes = _NO_TIMES
    top: Sequence[TopTokens] = ()
    prompt: PromptLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepReport(Generic[K]):
    """One step; or sequences that ended between two steps, with rows, tokens and times of 0.

    rows, tokens, seconds      rows and ids that the step computed, without drafts, and its wall time
    drafted, accepted          tokens of drafts that it computed too, and how many of them were right and are
                               in the updates
    decodes                    how many of the tokens continued an answer; the others were prompt, or the
                               resumed part of an answer
    dropped                    sampled tokens whose sequences had ended meanwhile; they are in no update
    started, ended             time.time_ns() before and after the step
    running, waiting           sequences, after the step
    kv_tokens_free             free capacity of KV memory in tokens, after the step
    cached_tokens              ids that the prefix cache held instead of being computed, since the start
    preemptions                since the start
    uncomputed_prompt_tokens   prompt tokens still to compute, of all sequences
    oldest_wait                seconds that the longest-waiting sequence has waited
    """

    updates: Sequence[SequenceUpdate[K]] = ()
    rows: int = 0
    tokens: int = 0
    decodes: int = 0
    drafted: int = 0
    accepted: int = 0
    dropped: int = 0
    seconds: float = 0.0
    started: int = 0
    ended: int = 0
    running: int = 0
    waiting: int = 0
    kv_tokens_free: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    uncomputed_prompt_tokens: int = 0
    oldest_wait: float = 0.0


class Runner(Protocol[K]):
    """Computes sequences with continuous batching, on threads or processes of its own.

    Every submitted sequence ends with exactly one update that has a finish reason.
    """

    @property
    def model(self) -> ModelInfo:
        """The loaded model; constant."""
        ...

    @property
    def step_tokens(self) -> int:
        """Most tokens that one step computes, prompts included; constant."""
        ...

    @property
    def shared_block_tokens(self) -> int:
        """Granularity of the prefix cache in tokens; 0 if there is none; constant."""
        ...

    def start(self, report: Callable[[StepReport[K]], None]) -> None:
        """Begin to run. *report* is called after each step, on any thread, never twice at a time."""
        ...

    def submit(self, *specs: SequenceSpec[K]) -> None:
        """Queue sequences, all of them before the next step; does not block.

        One that cannot be computed ends with FAULT.
        """
        ...

    def cancel(self, *keys: K) -> None:
        """End sequences before the next step; does not block. Ignores keys that are not in flight."""
        ...

    def stop(self) -> None:
        """Report all sequences as cancelled and stop; blocks until the running step has ended."""
        ...

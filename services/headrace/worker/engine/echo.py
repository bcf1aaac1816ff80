"""An engine without a model, for tests, demonstrations and measurements of the mesh itself.

It repeats the prompt, token by token, and then ends its turn; if the request ignores that end, it starts
over. Each answer can therefore be checked against its own prompt, and mixed-up requests are detected. It
needs neither torch nor weights.

An answer with a grammar is the prompt too, as far as the grammar allows it, see `_constrained`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from headrace.grammars.vocabulary import byte_vocabulary
from headrace.worker.engine.grammar.constraints import Constraints
from headrace.worker.engine.interface import (
    DeferredStep,
    Fault,
    Grammars,
    ModelInfo,
    PromptLogprobs,
    Result,
    Row,
    Token,
    TopTokens,
)

# One id per byte of UTF-8, then the special ids, as in `batcher.text.tokens.ByteTokenizer`.
VOCABULARY_SIZE = 258
EOS_ID = 256
FAULT_ID = 257  # a prompt that contains this id fails when its first token is sampled

# What an answer with a grammar consists of where the prompt's own byte is not allowed: first what closes
# strings, objects and arrays, then digits and other printable bytes, then the rest.
_CLOSING = b'"}]'
_PRINTABLE = np.array([*b"0123456789", *(byte for byte in range(0x21, 0x7F) if byte not in b"0123456789")])
_OTHERS = np.array([*range(0x21), *range(0x7F, 256), FAULT_ID])

# The engine is certain of each token, so all others are as good as impossible. Not minus infinity, which JSON
# cannot represent.
UNLIKELY = -9999.0

_TOKENS = [Token(id, 0.0) for id in range(VOCABULARY_SIZE)]
_NOTHING = 0  # the digest of no ids


class _Block:
    """The contents of one block of KV memory.

    before   digest of all ids before the block, because keys and values depend on them as well
    """

    __slots__ = ("before", "ids")

    def __init__(self) -> None:
        self.before = _NOTHING
        self.ids: list[int] = []


class _Known:
    """What the engine keeps of a sequence between its steps.

    digests   of its ids up to the end of each block that was full when it was last computed
    faulty    whether its prompt contains FAULT_ID
    """

    __slots__ = ("digests", "faulty")

    def __init__(self, row: Row) -> None:
        self.digests: list[int | None] = []
        self.faulty = FAULT_ID in row.ids[: row.prompt]


class EchoEngine:
    """Answers each prompt with the prompt.

    kv_blocks      size of KV memory; None for a whole context per running sequence
    step_seconds   how long a step takes, in place of a model's work

    It records what is written to its blocks and rejects, with RuntimeError, a row whose blocks do not hold
    exactly the ids that the row claims are computed. A test that runs on it thus checks that no sequence
    reads another one's keys.
    """

    def __init__(
        self,
        *,
        context_length: int = 4096,
        max_running: int = 64,
        block_tokens: int = 16,
        kv_blocks: int | None = None,
        step_seconds: float = 0.0,
    ) -> None:
        self._step_seconds = step_seconds
        if kv_blocks is None:
            kv_blocks = max_running * -(-context_length // block_tokens)
        self._memory: dict[int, _Block] = {}
        # Of each block that is full: the digest of its ids and of all ids before it.
        self._digests: dict[int, int | None] = {}
        self._model = ModelInfo(
            name="echo",
            revision="1",
            dtype="none",
            device="cpu",
            tokenizer_fingerprint="bytes-1",
            weights_fingerprint="echo-1",
            context_length=context_length,
            vocabulary_size=VOCABULARY_SIZE,
            eos_ids=frozenset({EOS_ID}),
            max_running=max_running,
            block_tokens=block_tokens,
            kv_blocks=kv_blocks,
            exact=True,
            features=("logprobs", "top_logprobs", "prompt_logprobs", "structured"),
        )
        self.grammars: Grammars | None = Grammars(byte_vocabulary())
        self._constraints = Constraints(self.grammars, [EOS_ID], threads=1)

    @property
    def model(self) -> ModelInfo:
        """The description of a model that does not exist."""
        return self._model

    @property
    def ahead(self) -> int:
        """0: it computes on the calling thread."""
        return 0

    def launch(self, rows: Sequence[Row]) -> DeferredStep:
        """See `Engine.launch`."""
        return DeferredStep(self.step, rows)

    def step(self, rows: Sequence[Row]) -> list[Result]:
        """Compute all rows now. Returns what `LaunchedStep.wait` does."""
        if self._step_seconds:
            time.sleep(self._step_seconds)
        # All reads precede all writes, so that a row that reads what another row writes is rejected too.
        for row in rows:
            self._verify(row)
        for row in rows:
            self._write(row)
        results = [_answer(row) for row in rows]
        constrained = [index for index, row in enumerate(rows) if row.params.grammar and row.sample]
        if constrained:
            self._constrain(rows, constrained, results)
        return results

    def _constrain(self, rows: Sequence[Row], constrained: Sequence[int], results: list[Result]) -> None:
        """Replace the tokens of rows with grammars by those that their grammars allow."""
        masks = self._constraints.compute(rows, constrained)
        for index, place in masks.places.items():
            row, result = rows[index], results[index]
            if isinstance(result, Token):
                allowed = np.unpackbits(masks.bits[place].view(np.uint8), bitorder="little")
                may_end = bool(row.stop - row.prompt >= row.params.min_tokens or index in masks.lifted)
                id, most = _constrained(row, allowed, may_end=may_end), row.params.top_logprobs
                top = likeliest(id, most) if most else None
                results[index] = Token(id, 0.0, top, result.prompt)
        for index, fault in masks.faults.items():
            results[index] = fault

    def _verify(self, row: Row) -> None:
        """Raise RuntimeError unless positions 0 to start - 1 were computed from the ids of this row."""
        known: _Known | None = row.memo.kept
        if known is None:
            known = row.memo.kept = _Known(row)
        full, rest = divmod(row.start, self._model.block_tokens)
        # Every block is compared, not only the last one: a model reads all of them.
        held = [*map(self._digests.get, row.blocks[:full])]
        if held != known.digests:
            self._verify_full(row, held, known)
        if rest:
            block = self._memory.get(row.blocks[full])
            before = held[-1] if held else _NOTHING
            begin = row.start - rest
            if block is None or block.before != before or block.ids[:rest] != row.ids[begin : row.start]:
                raise _wrong(row.blocks[full], begin)

    def _verify_full(self, row: Row, held: list[int | None], known: _Known) -> None:
        """Raise RuntimeError unless full blocks with the digests *held* hold the ids of this row."""
        size, before = self._model.block_tokens, _NOTHING
        for index, digest in enumerate(held):
            begin = index * size
            if index < len(known.digests):
                own = known.digests[index]
            else:
                own = _digest(before, row.ids[begin : begin + size])
            if digest is None or digest != own:
                raise _wrong(row.blocks[index], begin)
            before = digest
        known.digests = held

    def _write(self, row: Row) -> None:
        size, position = self._model.block_tokens, row.start
        while position < row.stop:
            index, offset = divmod(position, size)
            number = row.blocks[index]
            if not 0 <= number < self._model.kv_blocks:
                raise RuntimeError(f"there is no block {number}")
            block = self._memory.get(number)
            if block is None:
                block = self._memory[number] = _Block()
            if offset == 0:
                before = self._digests.get(row.blocks[index - 1]) if index else _NOTHING
                assert before is not None, "the block before is full"
                block.before = before
            end = min(position - offset + size, row.stop)
            block.ids[offset:] = row.ids[position:end]
            full = len(block.ids) == size
            self._digests[number] = _digest(block.before, block.ids) if full else None
            position = end


def _digest(before: int, ids: Sequence[int]) -> int:
    """Return the digest of ids that follow those with the digest *before*."""
    return hash((before, *ids))


def _wrong(block: int, begin: int) -> RuntimeError:
    return RuntimeError(f"block {block} does not hold the ids of its row from position {begin}")


def _answer(row: Row) -> Result:
    known: _Known = row.memo.kept
    if known.faulty and row.sample:
        return Fault("the prompt contains the id that makes the echo engine fail")
    prompt = _prompt(row) if row.scored else None
    if not row.sample:
        return prompt
    token = _token(row)
    if prompt is None and not row.params.top_logprobs:
        return token
    most = row.params.top_logprobs
    return Token(token.id, 0.0, likeliest(token.id, most) if most else None, prompt)


def _token(row: Row) -> Token:
    answered = row.stop - row.prompt
    cycle = row.prompt + 1
    at_end = answered % cycle == row.prompt
    if at_end and not row.params.ignore_eos and answered >= row.params.min_tokens:
        return _TOKENS[EOS_ID]
    # After its end it starts over, without a gap that could not be decoded as text.
    id = row.ids[answered % row.prompt]
    return _TOKENS[id] if id < VOCABULARY_SIZE else Token(id, 0.0)  # a test's engine may have more ids


def _constrained(row: Row, allowed: npt.NDArray[np.uint8], *, may_end: bool) -> int:
    """Return the token of a row with a grammar: a function of its prompt, its grammar and its answer so far.

    allowed   [at least VOCABULARY_SIZE] 1 for each token that the grammar allows

    At each place of the answer, it is the byte at that place of the prompt if that is allowed; else a
    preferred one. After the last byte of the prompt the answer ends as soon as the grammar allows it. Until
    then closing bytes come first, and others take turns, so that no repetition goes on forever.
    """
    answered = row.stop - row.prompt
    beyond = answered - row.prompt
    if beyond < 0:
        own = row.ids[answered]
        if own < VOCABULARY_SIZE and allowed[own] and (own != EOS_ID or may_end):
            return own
    elif may_end and allowed[EOS_ID]:
        return EOS_ID
    for byte in _CLOSING:
        if allowed[byte]:
            return byte
    for preferred in (_PRINTABLE, _OTHERS):
        found = preferred[allowed[preferred] == 1]
        if len(found):
            return int(found[max(beyond, 0) % len(found)])
    return EOS_ID


def _prompt(row: Row) -> PromptLogprobs:
    """Return the log-probabilities of the tokens to score: each was certain."""
    most = row.params.prompt_logprobs
    tops = [likeliest(row.ids[place], most) for place in row.scored] if most else []
    return PromptLogprobs(row.scored.start, [0.0] * len(row.scored), tops)


def likeliest(id: int, most: int) -> TopTokens:
    """Return the most likely tokens where *id* is certain: it, and then the smallest ids."""
    others = [other for other in range(min(most, VOCABULARY_SIZE)) if other != id][: most - 1]
    return TopTokens((id, *others), (0.0, *(UNLIKELY for _ in others)))

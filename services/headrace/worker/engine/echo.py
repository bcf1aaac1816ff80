"""An engine without a model, for tests, demonstrations and measurements of the mesh itself.

It says the prompt back, token by token, and then ends its turn; told to ignore that end, it starts
over. So each answer can be checked against its own prompt, and no two requests can be mixed up
unnoticed. It needs neither torch nor weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from headrace.worker.engine.seam import Fault, ModelInfo, Row, Token

# One id per byte of UTF-8, then the special ids. `headrace.batcher.tokens.ByteTokenizer` is the other half.
VOCABULARY_SIZE = 258
EOS_ID = 256
FAULT_ID = 257  # a prompt that holds this id fails when its first token is drawn


class EchoEngine:
    """Answers each prompt with the prompt.

    step_seconds   how long a step takes, to stand in for a model's work
    """

    def __init__(
        self, *, context_length: int = 4096, max_running: int = 64, step_seconds: float = 0.0
    ) -> None:
        self._step_seconds = step_seconds
        self._lengths: dict[int, int] = {}  # tokens held, by slot: what a real engine keeps as KV memory
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
            exact=True,
            features=("logprobs",),
        )

    @property
    def model(self) -> ModelInfo:
        """What it pretends to be."""
        return self._model

    @property
    def occupied_slots(self) -> int:
        """How many slots hold something."""
        return len(self._lengths)

    def step(self, rows: Sequence[Row]) -> list[Token | Fault | None]:
        """Compute all rows; see `Engine.step`."""
        if self._step_seconds:
            time.sleep(self._step_seconds)
        return [self._compute(row) for row in rows]

    def release(self, slot: int) -> None:
        """Forget the slot."""
        self._lengths.pop(slot, None)

    def _compute(self, row: Row) -> Token | Fault | None:
        # A real engine would read another sequence's keys here; say so rather than answer nonsense.
        if self._lengths.get(row.slot, 0) != row.start:
            raise RuntimeError(
                f"slot {row.slot} holds {self._lengths.get(row.slot, 0)}, row starts at {row.start}"
            )
        self._lengths[row.slot] = row.stop
        if not row.sample:
            return None
        if FAULT_ID in row.ids[: row.prompt]:
            return Fault("the prompt holds the id that makes the echo engine fail")
        said = row.stop - row.prompt
        cycle = row.prompt + 1
        at_end = said % cycle == row.prompt
        if at_end and not row.params.ignore_eos and said >= row.params.min_tokens:
            return Token(EOS_ID, 0.0)
        # Past its end it starts over, without a gap that could not be read as text.
        return Token(row.ids[said % row.prompt], 0.0)

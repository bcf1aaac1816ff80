"""The check of an engine at start: what it computes, and which errors it finds."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.interface import ModelInfo, Row, Token
from headrace.worker.engine.load import self_check
from headrace.worker.engine.load.refusals import UnsupportedModel
from headrace.worker.engine.load.self_check import ANSWER, Case, Sizes, check_model, make_cases
from headrace.worker.engine.torch_engine import Computed

VOCABULARY = 64
SIZES = Sizes(rows=[1, 2, 4, 7, 8], tokens=[17, 33, 64, 500])


def logits_of(ids: Sequence[int]) -> torch.Tensor:
    """Return made-up logits, which depend on all ids."""
    digest = hashlib.sha256(str(list(ids)).encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
    return torch.randn(VOCABULARY, generator=random)


class Reference(self_check.Reference):
    """Stands in for transformers' own forward pass."""

    def __init__(self, case: Case) -> None:
        super().__init__(None, case, "float32")
        self.name = "Model"
        self.case = case

    def logits(self, implementation: str) -> torch.Tensor:
        if implementation != "eager":
            raise ValueError
        first = self.case.prompt
        return torch.stack([logits_of(self.case.ids[: first + index]) for index in range(ANSWER)])


class FakeEngine:
    """Computes `logits_of`, from what its blocks hold, and records its steps.

    change   changes the logits of a row of a step
    """

    def __init__(
        self, context: int, change: Callable[[list[Row], int, torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        blocks = self_check.blocks_needed(32, context)
        echo = EchoEngine(context_length=context, max_running=8, block_tokens=32, kv_blocks=blocks)
        self.model: ModelInfo = dataclasses.replace(echo.model, dtype="float32")
        self.steps: list[list[Row]] = []
        self._change = change
        self._memory = [[-1] * 32 for _ in range(blocks)]

    def compute(self, rows: Sequence[Row]) -> Computed:
        self.steps.append(list(rows))
        for row in rows:
            for position in range(row.start, row.stop):
                self._memory[row.blocks[position // 32]][position % 32] = row.ids[position]
        logits = []
        for index, row in enumerate(rows):
            if row.sample:
                ids = [self._memory[row.blocks[place // 32]][place % 32] for place in range(row.stop)]
                own = logits_of(ids)
                logits.append(own if self._change is None else self._change(list(rows), index, own))
        sampling = [index for index, row in enumerate(rows) if row.sample]
        tokens = [Token(int(own.argmax())) for own in logits]
        return Computed(sampling, torch.stack(logits) if logits else torch.empty(0), list(tokens))


def check(engine: FakeEngine, context: int, *, sizes: Sizes | None = SIZES) -> bool:
    """Check an engine with made-up references."""
    cases = make_cases(VOCABULARY, context)
    references: dict[int, Any] = {index: Reference(cases[index]) for index in (0, 2)}
    return check_model(engine, cases, references, context=context, sizes=sizes)


@pytest.mark.parametrize("context", [64, 79, 80, 100, 255, 256, 300, 639, 640])
def test_sequences_fit_the_context_and_the_answer_under_test_starts_a_new_block(context: int) -> None:
    cases = make_cases(VOCABULARY, context)

    assert len(cases) == self_check.SEQUENCES
    assert all(case.prompt + ANSWER <= len(case.ids) <= context for case in cases)
    assert cases[0].prompt % 32 == 29
    assert max(len(case.ids) for case in cases) > context // 2


def test_on_a_gpu_the_answer_under_test_starts_a_new_segment_of_keys() -> None:
    """The kernels merge the results of segments of 256 keys."""
    case = make_cases(VOCABULARY, self_check.GPU_CONTEXT)[0]

    assert case.prompt < 2 * 256 < case.prompt + ANSWER


@pytest.mark.parametrize("context", [64, 256, 640])
def test_an_engine_without_error_is_exact(context: int) -> None:
    engine = FakeEngine(context)

    assert check(engine, context)

    for rows in engine.steps:
        assert len(rows) <= engine.model.max_running
        assert sum(row.stop - row.start for row in rows) <= max(500, self_check.step_tokens(context))
        assert all(row.stop <= context for row in rows)


def test_the_sequence_under_test_is_first_and_last_in_steps_of_all_sizes() -> None:
    engine = FakeEngine(640)
    cases = make_cases(VOCABULARY, 640)

    check(engine, 640)

    places = {
        (len(rows), sum(row.stop - row.start for row in rows), index)
        for rows in engine.steps
        for index, row in enumerate(rows)
        if row.ids == cases[0].ids
    }
    for count in SIZES.rows:
        assert {(count, count, 0), (count, count, count - 1)} <= places
    for tokens in SIZES.tokens:
        assert len({place for place in places if place[1] == tokens}) in (1, 2)


@pytest.mark.parametrize("size", [2, 7, 8, 33, 64, 500])
@pytest.mark.parametrize("place", [0, -1])
def test_an_engine_that_rounds_differently_in_steps_of_one_size_is_not_exact(size: int, place: int) -> None:
    def change(rows: list[Row], index: int, logits: torch.Tensor) -> torch.Tensor:
        tokens = sum(row.stop - row.start for row in rows)
        # Not the batch of four, in which a difference is found anyway.
        changed = tokens == size and index == place % len(rows) and len(rows) not in (3, 4)
        return logits * (1 + 2**-20) if changed else logits

    assert check(FakeEngine(640, change), 640, sizes=None)
    assert not check(FakeEngine(640, change), 640)


def test_an_engine_that_rounds_differently_in_a_batch_is_not_exact() -> None:
    def change(rows: list[Row], index: int, logits: torch.Tensor) -> torch.Tensor:
        return logits if len(rows) == 1 else logits * (1 + 2**-20)

    assert not check(FakeEngine(256, change), 256, sizes=None)


@pytest.mark.parametrize(
    ("how", "wrong"),
    [
        ("alone", lambda rows, index: len(rows) == 1),
        ("in a batch", lambda rows, index: len(rows) > 1 and index == 2),
        ("in a batch", lambda rows, index: len(rows) > 1 and index == 0),
        ("resumed", lambda rows, index: rows[index].blocks[0] == 1 and len(rows) == 1),
    ],
)
def test_an_engine_that_computes_something_else_is_rejected(
    how: str, wrong: Callable[[list[Row], int], bool]
) -> None:
    def change(rows: list[Row], index: int, logits: torch.Tensor) -> torch.Tensor:
        return logits.flip(0) if wrong(rows, index) else logits

    with pytest.raises(UnsupportedModel, match=f"Model computed {how} differs from transformers"):
        check(FakeEngine(256, change), 256)

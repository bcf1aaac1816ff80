"""Everything that the measurements need of Headrace's engine and kernels, in one place.

An engine is loaded as a worker loads it, self-check included, except that the weights are made on the device.
In a rehearsal the same engine runs on the CPU, with Triton's interpreter and without graphs.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.interpreter import set_up_interpreter
from benchmarks.gpu.report import Options
from benchmarks.gpu.shapes import Shape, model_folder, random_network
from headrace.worker.engine.interface import Engine, LaunchedStep, Memo, Row, SamplingParams, Token
from headrace.worker.engine.load import devices, loading, self_check
from headrace.worker.engine.transformers_attention import IMPLEMENTATION


@dataclass(frozen=True)
class Sizes:
    """Limits of an engine, as for a worker.

    context   most tokens of prompt and answer
    """

    max_running: int
    step_tokens: int
    context: int


REAL = Sizes(max_running=256, step_tokens=2048, context=2304)  # the longest request has 2,048 tokens
TINY = Sizes(max_running=3, step_tokens=32, context=96)  # of a rehearsal
TINY_KV_GIB = 0.002


def sizes(options: Options) -> Sizes:
    """Return the limits of the engines that are measured."""
    return TINY if options.rehearse else REAL


def load(
    shape: Shape,
    folder: Path,
    *,
    device: str,
    dtype: str,
    sizes: Sizes,
    exact: bool = False,
    kv_memory: float | None = None,
    tokenizer_fingerprint: str = "",
    progress: Callable[[str], None],
) -> Engine:
    """Load the engine of a GPU for random weights, as a worker does.

    folder   the model's folder, without weights
    device   "cpu" for a rehearsal: the same engine in Triton's interpreter
    """

    def random(_folder: Path, dtype: torch.dtype, device: torch.device, _warn: loading.Report) -> Any:
        return random_network(shape, str(device), str(dtype).removeprefix("torch."), IMPLEMENTATION)

    with ExitStack() as replaced:
        if device == "cpu":
            set_up_interpreter()
            from headrace.worker.engine.gpu import likelihoods

            target = devices.Target(torch.device("cpu"), gpu=True)
            replaced.enter_context(mock.patch.object(loading, "choose_device", return_value=target))
            # The interpreter takes seconds for a hundred tokens, and as long to score as many.
            for module, name, value in (
                (self_check, "GPU_CONTEXT", self_check.SHORTEST),
                (self_check, "ANSWER", 2),
                (likelihoods, "SCORED_TOKENS", 8),
            ):
                replaced.enter_context(mock.patch.object(module, name, value))
        return loading.load_engine(
            folder,
            name=shape.name,
            cache=folder.parent / "cache",  # the same for all models: compiled kernels are there too
            tokenizer_fingerprint=tokenizer_fingerprint,
            device=device,
            dtype=dtype,
            kv_memory=kv_memory,
            progress=progress,
            max_running=sizes.max_running,
            step_tokens=sizes.step_tokens,
            context_length=sizes.context,
            exact=exact,
            read=random,
        )


@dataclass
class Held:
    """The engine of this process: jobs of a group share it.

    seconds      until it was ready
    stages       what loading reported, with seconds since its begin
    sequences    those that `prefill` has computed, if any
    """

    engine: Engine
    exact: bool
    seconds: float
    stages: list[tuple[float, str]]
    sequences: Sequences | None = None


_held: dict[tuple[str, bool], Held] = {}


def held(shape: Shape, options: Options, *, exact: bool = False) -> Held:
    """Return this process's engine for a model; it is loaded by the first call."""
    key = (shape.name, exact)
    if key not in _held:
        release()
        folder = model_folder(shape, options.out / "models" / shape.name)
        stages: list[tuple[float, str]] = []
        began = time.perf_counter()
        engine = load(
            shape,
            folder,
            device=options.device,
            dtype=options.dtype,
            sizes=sizes(options),
            exact=exact,
            kv_memory=TINY_KV_GIB if options.rehearse else None,
            progress=lambda text: stages.append((time.perf_counter() - began, text)),
        )
        _held[key] = Held(engine, exact, time.perf_counter() - began, stages)
    return _held[key]


def release() -> None:
    """Give the memory of this process's engine back."""
    _held.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class _Sequence:
    ids: list[int]
    blocks: range
    version: int
    memo: Memo = field(default_factory=Memo)


class Sequences:
    """Sequences with blocks of their own, which are computed step by step without a scheduler.

    prompts   their ids
    room      tokens that each may have after its prompt
    params    of all of them

    Only as many as KV memory holds are kept.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        *,
        room: int,
        params: SamplingParams | None = None,
    ) -> None:
        self._engine = engine
        self._params = params or SamplingParams(seed=1, max_tokens=1 << 30, temperature=0.0, ignore_eos=True)
        model = engine.model
        each = -(-(max(map(len, prompts)) + room) // model.block_tokens)
        count = min(len(prompts), model.kv_blocks // each, model.max_running)
        self.all = [
            _Sequence(list(prompts[index]), range(index * each, (index + 1) * each), index + 1)
            for index in range(count)
        ]

    def __len__(self) -> int:
        return len(self.all)

    def row(self, sequence: _Sequence, start: int, stop: int, *, pending: bool = False) -> Row:
        """Return the row that computes a part of a sequence, and samples at its end."""
        return Row(
            blocks=sequence.blocks,
            start=start,
            stop=stop,
            ids=sequence.ids,
            prompt=1,
            sample=True,
            params=self._params,
            memo=sequence.memo,
            pending=pending,
            version=sequence.version,
        )

    def prefill(self, step_tokens: int) -> float:
        """Compute all prompts in steps of *step_tokens* tokens, and append a token to each.

        Returns seconds.
        """
        began = time.perf_counter()
        steps = list(self._chunks(step_tokens))
        results = _launch_all(self._engine, iter([rows for _, rows in steps]))
        for (sequences, _), tokens in zip(steps, results, strict=True):
            for sequence, token in zip(sequences, tokens, strict=True):
                if sequence is not None:
                    sequence.ids.append(_id(token))
        return time.perf_counter() - began

    def _chunks(self, step_tokens: int) -> Iterator[tuple[list[_Sequence | None], list[Row]]]:
        """Fill steps with prompts, cut where a step is full. A sequence is named where its prompt ends."""
        named: list[_Sequence | None] = []
        rows: list[Row] = []
        left = step_tokens
        for sequence in self.all:
            start, length = 0, len(sequence.ids)
            while start < length:
                stop = min(start + left, length)
                rows.append(self.row(sequence, start, stop))
                named.append(sequence if stop == length else None)
                left -= stop - start
                start = stop
                if left == 0:
                    yield named, rows
                    named, rows, left = [], [], step_tokens
        if rows:
            yield named, rows

    def decode(self, count: int, steps: int) -> float:
        """Compute *steps* tokens of the first *count* sequences. Returns seconds."""
        chosen = self.all[:count]
        ahead = self._engine.ahead
        in_flight: deque[LaunchedStep] = deque()
        began = time.perf_counter()
        for _ in range(steps):
            pending = bool(in_flight)
            rows = []
            for sequence in chosen:
                length = len(sequence.ids) + pending
                rows.append(self.row(sequence, length - 1, length, pending=pending))
            in_flight.append(self._engine.launch(rows))
            while len(in_flight) > ahead:
                self._take(chosen, in_flight.popleft())
        while in_flight:
            self._take(chosen, in_flight.popleft())
        return time.perf_counter() - began

    def _take(self, chosen: Sequence[_Sequence], step: LaunchedStep) -> None:
        for sequence, token in zip(chosen, step.wait(), strict=True):
            sequence.ids.append(_id(token))

    def forced(self, ids: Sequence[Sequence[int]], begins: Sequence[int]) -> list[list[Token]]:
        """Compute given ids: each sequence to *begins* as a prompt, then one by one.

        ids   of each sequence, at least as long as its prompt. All prompts together fit into a step

        Returns what was sampled.
        """
        sampled: list[list[Token]] = [[] for _ in self.all]
        for sequence, own in zip(self.all, ids, strict=True):
            sequence.ids = list(own)
        place = [0] * len(self.all)
        while any(at < len(own) for at, own in zip(place, ids, strict=True)):
            rows, named = [], []
            for index, sequence in enumerate(self.all):
                start = place[index]
                if start < len(sequence.ids):
                    place[index] = stop = begins[index] if start == 0 else start + 1
                    rows.append(self.row(sequence, start, stop))
                    named.append(index)
            for index, token in zip(named, self._engine.launch(rows).wait(), strict=True):
                assert isinstance(token, Token), token
                sampled[index].append(token)
        return sampled


def _launch_all(engine: Engine, steps: Iterator[list[Row]]) -> list[Sequence[Any]]:
    """Compute steps that do not depend on each other's tokens, as far ahead as the engine allows."""
    in_flight: deque[LaunchedStep] = deque()
    results: list[Sequence[Any]] = []
    for rows in steps:
        in_flight.append(engine.launch(rows))
        while len(in_flight) > engine.ahead:
            results.append(in_flight.popleft().wait())
    results += [step.wait() for step in in_flight]
    return results


def _id(token: object) -> int:
    if not isinstance(token, Token):
        raise RuntimeError(f"a row was not computed: {token}")
    return token.id

"""The engine on a CUDA device: a step is one copy of its inputs, one launch, and one copy of its results.

`launch` runs while the device computes the step before. What the host does not know yet, the tokens of that
step, stays on the device: the next step reads it there. `forward` computes logits, `sampler` samples from
them, `slots` keeps what belongs to a sequence. On a CPU, where tests run the same code, the step is called
instead of replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine.edits import endings
from headrace.worker.engine.gpu import cuda
from headrace.worker.engine.gpu.filling import advance, fill, masked_rows
from headrace.worker.engine.gpu.graphs import Ladder
from headrace.worker.engine.gpu.kernels.embedding import resolve
from headrace.worker.engine.gpu.kernels.tables import append_blocks
from headrace.worker.engine.gpu.likelihoods import DeviceLikelihoods
from headrace.worker.engine.gpu.sampler import DeviceSampler, counts_ids, read_tokens
from headrace.worker.engine.gpu.slots import Slot, Slots
from headrace.worker.engine.gpu.step_inputs import StepInputs, StepShape, packed_numbers
from headrace.worker.engine.grammar.constraints import Constraints
from headrace.worker.engine.interface import Fault, Grammars, ModelInfo, Result, Row, Token
from headrace.worker.engine.torch_engine import Computed


class Graphs(Protocol):
    """Captures work, see `cuda.GraphPool`."""

    def waits(self, run: Callable[[], None]) -> str:
        """Return why *run* cannot be captured; empty if it can."""
        ...

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return a function that queues the work that *run* queues."""
        ...


# Steps that can be in flight, and one whose inputs are being written.
_BUFFERS = 3


class DeviceForward(Protocol):
    """Computes one model over its paged memory. Never waits for the device, so it can be captured."""

    def reserve(self, tokens: int, rows: int) -> None:
        """Allocate what is kept of a step for its reader, for steps of at most so many tokens and rows.

        Called before steps are captured: it stays at fixed addresses.
        """
        ...

    def __call__(self, ids: torch.Tensor, step: StepInputs) -> torch.Tensor:
        """Store the keys and values of a step's tokens, and compute logits.

        ids   [tokens] int32, instead of those in *step*, of which the host does not know all

        Returns [rows, vocabulary]: for each row the logits of its last token. Those of padding are undefined.
        Valid until the next step, also if this one was replayed.
        """
        ...

    def logits_of(self, places: torch.Tensor) -> torch.Tensor:
        """Compute the logits of any tokens of the latest step.

        places   [places] int32 indices of tokens

        Returns [places, vocabulary].
        """
        ...


@dataclass(frozen=True, slots=True)
class _Decodes:
    """The latest step, if each of its rows was one token: its shape, slots, and inputs on the host."""

    shape: StepShape
    placed: Sequence[Slot]
    array: npt.NDArray[np.int32]


@dataclass(slots=True)
class _Prepared:
    """A step of one shape: where its inputs, results and logits are, and what launches its two parts.

    forward   computes logits
    draw      samples from them
    logits    None before it was launched once
    """

    inputs: StepInputs
    results: torch.Tensor
    forward: Callable[[], None]
    draw: Callable[[], None]
    logits: torch.Tensor | None = None

    def launch(self) -> None:
        """Launch both parts."""
        self.forward()
        self.draw()


class GpuEngine:
    """Computes steps of one model on a device; see `Engine`.

    forward       the model and its KV memory, over the tables of *slots*
    model         its description
    slots         model.max_running of them
    step_tokens   most tokens of a step
    tile          tokens of a query tile in steps with prompts
    graphs        captures all shapes of steps; None to launch each kernel of each step
    grammars      of the model's vocabulary; None to support none

    uncaptured   why steps are not captured although *graphs* was given; empty if they are
    """

    ahead = 1
    verifies_drafts = False

    def __init__(
        self,
        forward: DeviceForward,
        model: ModelInfo,
        *,
        slots: Slots,
        step_tokens: int,
        tile: int,
        graphs: Graphs | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self._forward = forward
        self._model = model
        self.grammars = grammars
        self._slots = slots
        self._device = device = slots.tables.device
        self._sampler = DeviceSampler(slots.count, model.vocabulary_size, model.eos_ids, device)
        threads = torch.get_num_threads()
        self._constraints = Constraints(grammars, sorted(model.eos_ids), threads=threads)
        self._step_tokens = max(step_tokens, model.max_running)
        self._ladder = Ladder(max_running=model.max_running, step_tokens=step_tokens, tile=tile)
        numbers = max(packed_numbers(shape) for shape in self._ladder.shapes)
        self._inputs = torch.zeros(numbers, dtype=torch.int32, device=device)
        self._results = torch.zeros(3 * model.max_running, dtype=torch.int32, device=device)
        self._host = [cuda.HostBuffer(numbers, device) for _ in range(_BUFFERS)]
        self._steps = 0
        self._before: _Decodes | None = None
        self._latest: tuple[Sequence[Row], cuda.Fetch] | None = None  # rows and results of the latest step
        self._logits: torch.Tensor | None = None  # of the latest step
        self._prepared: dict[StepShape, _Prepared] = {}
        forward.reserve(max(shape.tokens for shape in self._ladder.shapes), model.max_running)
        self.uncaptured = ""
        if graphs is not None:
            with torch.inference_mode(), cuda.current_device(self._device):
                self._capture(graphs)

    @property
    def model(self) -> ModelInfo:
        """The loaded model; constant."""
        return self._model

    def launch(self, rows: Sequence[Row]) -> GpuStep:
        """Queue a step; see `Engine.launch`."""
        with torch.inference_mode(), cuda.current_device(self._device):
            placed = self._slots.begin_step(rows)
            try:
                self._assign(rows, placed)
                prepared = self._fill(rows, placed)
                prepared.forward()
                faults = {
                    index: slot.fault
                    for index, (row, slot) in enumerate(zip(rows, placed, strict=True))
                    if row.sample and slot.fault is not None
                }
                if masked := masked_rows(rows):
                    faults = self._restrict(rows, masked) | faults
                prepared.draw()
                self._logits = prepared.logits
                fetch = cuda.Fetch(prepared.results)
                self._latest = rows, fetch
                return GpuStep(rows, faults, fetch, self._ask(rows, prepared))
            except Exception as error:
                self._slots.forget(placed)
                self._before = self._latest = None
                raise cuda.as_broken(error) from error

    def step(self, rows: Sequence[Row]) -> list[Result]:
        """Compute a step and wait for it."""
        return self.launch(rows).wait()

    def compute(self, rows: Sequence[Row]) -> Computed:
        """Compute a step, wait for it, and return its logits too."""
        results = self.step(rows)
        assert self._logits is not None
        sampling = [index for index, row in enumerate(rows) if row.sample]
        tokens = [token for index in sampling if isinstance(token := results[index], Token | Fault)]
        return Computed(sampling, self._logits[sampling], tokens)

    def _restrict(self, rows: Sequence[Row], masked: Sequence[int]) -> dict[int, Fault]:
        """Upload the masks of rows with grammars, while the device computes the logits of the step.

        Waits for the step before, because a mask depends on the token that it samples. Returns the faults of
        rows that cannot follow their grammars.
        """
        latest = self._tokens_before(rows, [index for index in masked if rows[index].pending])
        return self._sampler.restrict(
            lambda bits: self._constraints.compute(rows, masked, latest, bits)
        ).faults

    def _tokens_before(self, rows: Sequence[Row], pending: Sequence[int]) -> dict[int, int]:
        """Return the tokens that pending rows continue with, by index; none for sequences that have ended."""
        if not pending or self._latest is None:
            return {}
        before, fetch = self._latest
        ids, finite = fetch.wait()[:2].tolist()
        places = {id(row.memo): place for place, row in enumerate(before)}
        found = {}
        for index in pending:
            place = places.get(id(rows[index].memo))
            if place is not None and finite[place]:
                ends = endings(rows[index].params, self._model.eos_ids)
                if ids[place] not in ends:
                    found[index] = ids[place]
        return found

    def _ask(self, rows: Sequence[Row], prepared: _Prepared) -> DeviceLikelihoods | None:
        """Queue what rows ask for besides their tokens; None if they ask for nothing."""
        if not [row for row in rows if row.scored or row.params.top_logprobs]:
            return None
        assert prepared.logits is not None
        return DeviceLikelihoods(rows, prepared.logits, prepared.results[0], self._forward.logits_of)

    def _assign(self, rows: Sequence[Row], placed: Sequence[Slot]) -> None:
        """Upload what the sampler needs of sequences that are new in their slots or lost their counts."""
        for index in [index for index, slot in enumerate(placed) if slot.watched]:
            row, slot = rows[index], placed[index]
            if slot.counted < 0:
                slot.watched = counts_ids(row.params)
            elif not row.sample:
                continue
            elif slot.counted == row.stop:
                slot.counted += 1
                continue
            slot.fault = self._sampler.assign(slot.index, row)
            slot.counted = len(row.ids) + row.sample

    def _fill(self, rows: Sequence[Row], placed: Sequence[Slot]) -> _Prepared:
        """Copy the inputs of a step to the device, and return what computes it."""
        tokens = sum([row.stop - row.start for row in rows])
        prepared = self._prepared.get(self._ladder.choose(len(rows), tokens))
        if prepared is None:
            if tokens > self._step_tokens or len(rows) > self._model.max_running:
                raise ValueError(f"a step has at most {self._step_tokens} tokens, not {tokens}")
            prepared = self._prepare(self._ladder.exact(len(rows), tokens))
        buffer = self._host[self._steps % _BUFFERS]
        self._steps += 1
        self._copy(prepared.inputs.shape, rows, placed, buffer)
        return prepared

    def _copy(
        self, shape: StepShape, rows: Sequence[Row], placed: Sequence[Slot], buffer: cuda.HostBuffer
    ) -> None:
        numbers, block_tokens = packed_numbers(shape), self._model.block_tokens
        array = buffer.array()[:numbers]
        host = StepInputs.over(array, shape)
        before, self._before = self._before, None  # until this one is complete
        if (
            before is not None
            and before.shape == shape
            and before.placed == placed
            and all(map(_continues, rows, placed))
        ):
            array[:] = before.array
            advance(host, rows, placed, self._slots, block_tokens)
        else:
            fill(host, rows, placed, self._slots, block_tokens)
        buffer.copy_to(self._inputs, numbers)
        if host.offsets[len(rows)] == len(rows):
            self._before = _Decodes(shape, placed, array)

    def _prepare(self, shape: StepShape) -> _Prepared:
        """Return a step that launches each of its kernels."""
        inputs = StepInputs.over(self._inputs, shape)
        results = self._results[: 3 * shape.rows].view(3, shape.rows)

        def forward() -> None:
            append_blocks(self._slots.tables, inputs.table_places, inputs.table_blocks)
            ids = resolve(inputs.ids, inputs.slot_of, self._sampler.latest)
            prepared.logits = self._forward(ids, inputs)

        def draw() -> None:
            assert prepared.logits is not None
            self._sampler.draw(prepared.logits, inputs, results)

        prepared = _Prepared(inputs, results, forward, draw)
        return prepared

    def _capture(self, graphs: Graphs) -> None:
        """Capture all shapes, or find out why this model cannot be captured."""
        for shape in self._ladder.shapes:
            prepared = self._prepare(shape)
            # Capturing also computes: a step of padding alone.
            self._copy(shape, [], [], self._host[0])
            if not self._prepared:
                self.uncaptured = graphs.waits(prepared.launch)
                if self.uncaptured:
                    return
            prepared.forward = graphs.capture(prepared.forward)
            prepared.draw = graphs.capture(prepared.draw)
            self._prepared[shape] = prepared


def _continues(row: Row, slot: Slot) -> bool:
    """Return whether a row is the token that its slot sampled last, in the same blocks."""
    return row.pending and row.version == slot.version


class GpuStep:
    """A step that a device computes; see `LaunchedStep`.

    faults   of rows whose parameters or grammars cannot be applied, by index
    """

    def __init__(
        self,
        rows: Sequence[Row],
        faults: Mapping[int, Fault],
        results: cuda.Fetch,
        likelihoods: DeviceLikelihoods | None,
    ) -> None:
        self._rows = rows
        self._faults = faults
        self._results = results
        self._likelihoods = likelihoods

    def wait(self) -> list[Result]:
        """See `LaunchedStep.wait`. A row whose logits are not finite gets a Fault."""
        try:
            tokens = read_tokens(self._results.wait(), self._rows)
            if self._likelihoods is not None:
                self._likelihoods.add_to(tokens)
        except Exception as error:
            raise cuda.as_broken(error) from error
        for index, fault in self._faults.items():
            tokens[index] = fault
        return tokens

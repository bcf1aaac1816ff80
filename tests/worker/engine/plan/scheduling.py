"""Run a scheduler with an engine that checks its blocks, with further checks after each step."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from headrace.deadline import NEVER, Deadline
from headrace.worker.engine.interface import Engine, Fault, LaunchedStep, Result, Row
from headrace.worker.engine.plan.scheduler import Scheduler
from headrace.worker.engine.plan.sequences import LiveSequence, PlannedStep
from headrace.worker.engine.plan.speculation import Speculation
from headrace.worker.runner import FinishReason, SamplingParams, SequenceSpec, SequenceUpdate

ON_PURPOSE = "on purpose"  # the message of errors that tests inject


@dataclass(frozen=True)
class Arrival:
    """A sequence of a random run, and the step at which it arrives, is cancelled or reaches its deadline.

    family    sequences of one family share a prefix
    shared    length of that prefix
    resumed   number of answer tokens that are submitted with it
    """

    shared: int
    own: int
    max_tokens: int
    family: int = 0
    resumed: int = 0
    priority: int = 5
    at: int = 0
    cancelled_at: int | None = None
    deadline_at: int | None = None
    ignore_eos: bool = True

    def prompt(self, key: int) -> list[int]:
        """Return ids that differ by family and position and, after the prefix, by sequence."""
        shared = [(50 * self.family + place) % 256 for place in range(self.shared)]
        return shared + [(7 * key + 13 * place) % 256 for place in range(self.own)]

    def echo(self, key: int, tokens: int) -> list[int]:
        """Return the first tokens of the echo engine's answer, whatever else it computes."""
        prompt = self.prompt(key)
        return [prompt[place % len(prompt)] for place in range(tokens)]


def sequence(key: int, arrival: Arrival) -> SequenceSpec[int]:
    prompt = arrival.prompt(key)
    resumed = min(arrival.resumed, arrival.max_tokens - 1)
    if not arrival.ignore_eos:
        resumed = min(resumed, len(prompt))
    return SequenceSpec(
        key=key,
        ids=prompt + arrival.echo(key, resumed),
        prompt=len(prompt),
        params=SamplingParams(seed=0, max_tokens=arrival.max_tokens, ignore_eos=arrival.ignore_eos),
        deadline=NEVER if arrival.deadline_at is None else Deadline(float(arrival.deadline_at)),
        submitted=float(arrival.at),
        priority=arrival.priority,
    )


@dataclass
class Run:
    """A scheduler with an engine; its accounting is checked after each step.

    The engine rejects a row whose blocks do not hold exactly the ids that the row claims are computed: no
    sequence may use another one's keys.

    failed    keys of the sequences whose rows were in a step that raised
    dropped   tokens of sequences that had ended
    """

    engine: Engine
    step_tokens: int = 512
    prefix_cache: bool = True
    speculation: Speculation | None = None
    steps: int = 0
    dropped: int = 0
    in_flight: deque[tuple[PlannedStep[int], LaunchedStep]] = field(default_factory=deque)
    answers: dict[int, list[int]] = field(default_factory=dict)
    endings: dict[int, FinishReason] = field(default_factory=dict)
    ended_at: dict[int, int] = field(default_factory=dict)
    sequences: dict[int, LiveSequence[int]] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.scheduler: Scheduler[int] = Scheduler(
            self.engine.model,
            step_tokens=self.step_tokens,
            prefix_cache=self.prefix_cache,
            speculation=self.speculation,
        )

    def add(self, spec: SequenceSpec[int]) -> None:
        self.sequences[spec.key] = self.scheduler.add(spec)
        self.answers[spec.key] = list(spec.ids[spec.prompt :])

    def arrive(self, arrivals: Sequence[Arrival]) -> None:
        """Run steps until all arrivals have been added, and cancelled where they are."""
        for step in range(31):
            for key, arrival in enumerate(arrivals):
                if arrival.at == step:
                    self.add(sequence(key, arrival))
                if arrival.cancelled_at == step:
                    self.scheduler.cancel([key])
            self.step()

    def step(self) -> list[Row]:
        """Run one step of the engine's loop, one second after the last."""
        now, model = float(self.steps), self.engine.model
        self.steps += 1
        self._record(self.scheduler.remove_ended(now))
        step = self.scheduler.plan(now)
        rows = step.rows
        assert not (rows and self.scheduler.idle), "a step for nothing"
        assert rows or self.in_flight or self.scheduler.idle, "there is work, but no step"
        assert len(rows) <= model.max_running
        tokens = sum(row.stop - row.start for row in rows)
        assert tokens == step.tokens <= max(self.step_tokens, model.max_running)
        size = model.block_tokens
        ends = [row.stop + len(row.draft) for row in rows]
        writers = [
            b
            for row, end in zip(rows, ends, strict=True)
            for b in row.blocks[row.start // size : (end - 1) // size + 1]
        ]
        tables = Counter(
            b for row, end in zip(rows, ends, strict=True) for b in row.blocks[: -(-end // size)]
        )
        assert all(tables[b] == 1 for b in writers), "a row writes to a block of another one"
        lengths = [one.length for one in step.sequences]
        assert all(end < length for end, length in zip(ends, lengths, strict=True)), "beyond its end"
        if rows:
            self.in_flight.append((step, self.engine.launch(rows)))
        while len(self.in_flight) > (self.engine.ahead if rows else 0):
            self._land(now)
        self.scheduler.check()
        self._check_uncomputed()
        return rows

    def _land(self, now: float) -> None:
        """Apply the oldest launched step."""
        step, launched = self.in_flight.popleft()
        results: Sequence[Result]
        try:
            results = launched.wait()
        except RuntimeError as error:
            if str(error) != ON_PURPOSE:
                raise
            results = [Fault(ON_PURPOSE)] * len(step.rows)
        self.failed |= {
            one.spec.key
            for one, result in zip(step.sequences, results, strict=True)
            if isinstance(result, Fault)
        }
        self._record(self.scheduler.apply(step, results, now))
        self.dropped += self.scheduler.dropped

    def _check_uncomputed(self) -> None:
        live = [one for key, one in self.sequences.items() if key not in self.endings]
        rests = [(len(one.ids) - one.computed, one.table is not None) for one in live]
        expected = sum(rest for rest, runs in rests if rest > 1 or not runs)
        assert self.scheduler.uncomputed_prompt_tokens == expected

    def finish(self, within: int) -> None:
        """Run until all sequences have ended."""
        for _ in range(within):
            if self.scheduler.idle and not self.in_flight:
                break
            self.step()
        scheduler = self.scheduler
        assert scheduler.idle, f"after {within} steps {scheduler.running} run, {scheduler.waiting} wait"
        assert not self.in_flight
        assert (scheduler.running, scheduler.waiting, scheduler.uncomputed_prompt_tokens) == (0, 0, 0)
        assert scheduler.kv_tokens_free == self.engine.model.kv_tokens, "a block leaked"

    def _record(self, updates: Iterable[SequenceUpdate[int]]) -> None:
        for update in updates:
            key = update.key
            assert key not in self.endings, "an update followed the last one"
            assert update.offset == len(self.answers[key]), "an offset was repeated or left out"
            self.answers[key] += update.token_ids
            if update.finish is not None:
                self.endings[key] = update.finish
                self.ended_at[key] = self.steps

"""Each token of a prompt is scored exactly once, whatever chunks, cached prefixes and preemptions are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.interface import PromptLogprobs, Result, Row, Token
from headrace.worker.runner import SequenceUpdate
from tests.worker.engine.plan.device import DeviceEngine, HashEngine
from tests.worker.engine.plan.scheduling import Arrival, Run, sequence

CONTEXT = 64


class PlacesEngine(HashEngine):
    """Scores each token by its place, so that a part at a wrong place is detected."""

    def step(self, rows: Sequence[Row]) -> list[Result]:
        for row in rows:
            assert not row.scored or row.start < row.scored.start <= row.scored[-1] <= row.stop
            assert not row.scored or row.scored[-1] < row.prompt
        return [
            self._scored(row, result) if row.scored else result
            for row, result in zip(rows, super().step(rows), strict=True)
        ]

    @staticmethod
    def _scored(row: Row, result: Result) -> Result:
        part = PromptLogprobs(row.scored.start, [-float(place) for place in row.scored])
        return replace(result, prompt=part) if isinstance(result, Token) else part


@dataclass
class ScoredRun(Run):
    """Records the scores of prompts, and checks that none follows a token."""

    scores: dict[int, list[float]] = field(default_factory=dict)

    def _record(self, updates: Iterable[SequenceUpdate[int]]) -> None:
        updates = list(updates)
        for update in updates:
            if update.prompt is not None:
                known = self.scores.setdefault(update.key, [])
                resumed = self.sequences[update.key].spec.resumed
                assert len(self.answers[update.key]) == resumed, "a part of the prompt follows a token"
                assert update.prompt.offset == 1 + len(known), "a part was repeated or left out"
                known += update.prompt.logprobs
        super()._record(updates)


def add(run: Run, key: int, arrival: Arrival, most: int | None) -> None:
    spec = sequence(key, arrival)
    run.add(replace(spec, params=replace(spec.params, prompt_logprobs=most)))


def engine_of(spare_blocks: int, block_tokens: int = 4, max_running: int = 4) -> PlacesEngine:
    return PlacesEngine(
        context_length=CONTEXT,
        max_running=max_running,
        block_tokens=block_tokens,
        kv_blocks=-(-CONTEXT // block_tokens) + spare_blocks,
    )


@given(
    arrivals=st.lists(
        st.tuples(
            st.builds(
                Arrival,
                shared=st.integers(1, 30),
                own=st.integers(0, 20),
                max_tokens=st.integers(1, 12),
                resumed=st.sampled_from([0, 0, 3]),
                at=st.integers(0, 6),
            ),
            st.sampled_from([None, 0, 5]),
        ),
        min_size=1,
        max_size=7,
    ),
    spare_blocks=st.integers(0, 12),
    step_tokens=st.integers(4, 40),
    ahead=st.sampled_from([0, 1]),
    prefix_cache=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_every_token_of_a_prompt_is_scored_once_and_in_order(
    arrivals: Sequence[tuple[Arrival, int | None]],
    spare_blocks: int,
    step_tokens: int,
    ahead: int,
    prefix_cache: bool,
) -> None:
    device = DeviceEngine(engine_of(spare_blocks), ahead=ahead)
    run = ScoredRun(device, step_tokens, prefix_cache)
    for step in range(7):
        for key, (arrival, most) in enumerate(arrivals):
            if arrival.at == step:
                add(run, key, arrival, most)
        run.step()
    run.finish(within=2000)

    for key, (arrival, most) in enumerate(arrivals):
        length = arrival.shared + arrival.own
        expected = [] if most is None else [-float(place) for place in range(1, length)]
        assert run.scores.get(key, []) == expected


def test_the_prefix_cache_is_filled_by_scored_prompts_and_not_read_by_them() -> None:
    run = ScoredRun(engine_of(40), 64)
    for key, most in enumerate((0, 0, None)):
        add(run, key, Arrival(20, 0, 2), most)
        run.finish(within=9)

    assert [run.sequences[key].cached for key in range(3)] == [0, 0, 16]
    assert run.scores == {key: [-float(place) for place in range(1, 20)] for key in (0, 1)}


def test_a_scored_prompt_does_not_wait_for_a_block_that_another_one_computes() -> None:
    run = ScoredRun(engine_of(40), 64)
    for key in range(2):
        add(run, key, Arrival(20, 0, 2), 0)

    rows = run.step()

    assert [row.stop for row in rows] == [20, 20]


def test_a_preempted_sequence_reads_from_the_cache_what_it_has_scored_itself() -> None:
    """Positions whose successors are not scored yet are computed again: their logits are needed."""
    run = ScoredRun(engine_of(0), 40)
    add(run, 0, Arrival(50, 0, 2), 0)
    rows = run.step()
    assert rows[0].stop == 40
    live = run.sequences[0]
    run.scheduler._preempt(live)

    rows = run.step()

    assert (rows[0].start, rows[0].scored) == (40, range(41, 50))
    run.finish(within=5)
    assert run.scores[0] == [-float(place) for place in range(1, 50)]
    assert live.cached == 0


def test_the_echo_engine_is_certain_of_each_token() -> None:
    engine = EchoEngine()
    spec = sequence(0, Arrival(1, 4, 3))
    params = replace(spec.params, top_logprobs=3, prompt_logprobs=2)

    (token,) = engine.step([Row([0], 0, 5, spec.ids, 5, True, params, scored=range(1, 5))])

    assert isinstance(token, Token)
    assert token.prompt is not None
    assert token.top is not None
    assert (token.top.ids[0], token.top.logprobs[0]) == (token.id, 0.0)
    assert len(set(token.top.ids)) == 3
    assert max(token.top.logprobs[1:]) < -1000
    assert token.prompt.logprobs == [0.0] * 4
    assert [one.ids[0] for one in token.prompt.top] == spec.ids[1:5]
    assert [len(one.ids) for one in token.prompt.top] == [2] * 4

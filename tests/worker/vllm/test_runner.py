"""Sequences on vLLM end exactly once, with one report per step, whatever vLLM sends and when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from headrace.deadline import NEVER, Deadline
from headrace.grammars.forms import regex
from headrace.worker.engine.echo import EOS_ID
from headrace.worker.runner import FinishReason, SamplingParams, SequenceSpec
from tests.harness import eventually
from tests.worker.vllm.engine import FakeEngine, Rig, output, plain, statistics


def spec(
    key: int,
    *ids: int,
    resumed: int = 0,
    deadline: Deadline = NEVER,
    priority: float = 5,
    scope: bytes = b"",
    grammar: str = "",
) -> SequenceSpec[int]:
    params = SamplingParams(seed=0, max_tokens=99, grammar=grammar)
    return SequenceSpec(
        key, list(ids), len(ids) - resumed, params, deadline, time.monotonic(), priority, scope
    )


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(FakeEngine(), lambda spec: None)
    yield made
    made.runner.stop()


def test_each_step_is_one_report_of_all_sequences(rig: Rig) -> None:
    rig.runner.submit(spec(1, 5, 6), spec(2, 7))
    rig.settle()
    assert rig.no_report()

    report = rig.step({0: output(10, cached=1), 1: output(20)}, statistics(prompt=3, running=2))
    assert plain(report.updates) == [(1, 0, [10], None), (2, 0, [20], None)]
    assert (report.rows, report.tokens, report.decodes, report.running) == (1, 3, 0, 2)
    assert report.updates[0].cached == 1

    report = rig.step({0: output(11, 12)})
    assert plain(report.updates) == [(1, 1, [11, 12], None)]


def test_the_token_that_ends_a_turn_is_not_delivered(rig: Rig) -> None:
    rig.runner.submit(spec(1, 5, 6), spec(2, 7))
    rig.settle()

    report = rig.step({0: output(10, 2, finish="stop"), 1: output(20, finish="length")})

    assert plain(report.updates) == [(1, 0, [10], FinishReason.STOP), (2, 0, [20], FinishReason.LENGTH)]
    assert report.updates[0].times.first_token == 2.0
    assert rig.engine.aborted == []


def test_a_resumed_answer_continues_at_its_offset(rig: Rig) -> None:
    rig.runner.submit(spec(1, 5, 6, 10, 11, resumed=2))
    rig.settle()

    assert rig.engine.collectors[0].prompt["prompt_token_ids"] == [5, 6, 10, 11]
    assert plain(rig.step({0: output(12)}).updates) == [(1, 2, [12], None)]


def test_a_cancelled_sequence_is_reported_at_once_and_once(rig: Rig) -> None:
    rig.runner.submit(spec(1, 5), spec(2, 6))
    rig.settle()
    rig.runner.cancel(1, 99)

    assert plain(rig.report().updates) == [(1, 0, [], FinishReason.CANCELLED)]
    rig.settle()
    assert rig.engine.aborted == ["internal 1"]
    assert plain(rig.step({0: output(10), 1: output(20)}).updates) == [(2, 0, [20], None)]
    rig.runner.cancel(1)
    assert rig.no_report()


def test_tokens_that_have_arrived_are_reported_before_the_cancellation(rig: Rig) -> None:
    rig.runner.submit(spec(1, 5), spec(2, 6))
    rig.settle()

    async def arrive() -> None:
        rig.engine.collectors[0].put(output(10, 11))
        rig.engine.collectors[1].put(output(20, 2, finish="stop"))
        rig.runner.cancel(1, 2)

    rig.thread.run(arrive())

    assert plain(rig.report().updates) == [
        (1, 0, [10, 11], None),
        (1, 2, [], FinishReason.CANCELLED),
        (2, 0, [20], FinishReason.STOP),
    ]


def test_a_sequence_that_is_cancelled_before_vllm_has_it_is_aborted_later(rig: Rig) -> None:
    rig.engine.enter = asyncio.Event()
    rig.runner.submit(spec(1, 5), spec(2, 6))
    rig.settle()
    rig.runner.cancel(1, 2)

    assert plain(rig.report().updates) == [
        (1, 0, [], FinishReason.CANCELLED),
        (2, 0, [], FinishReason.CANCELLED),
    ]
    rig.thread.call(rig.engine.enter.set)
    rig.settle()
    assert rig.engine.aborted == ["internal 1"], "the second one never reached vLLM"
    assert rig.no_report()


def test_an_output_that_arrives_before_the_request_is_in_is_not_lost(rig: Rig) -> None:
    original = rig.engine.add_request

    async def computed_meanwhile(*arguments: object, **keywords: object) -> object:
        collector = await original(*arguments, **keywords)  # type: ignore[arg-type]
        collector.put(output(10, finish="length"))
        return collector

    rig.engine.add_request = computed_meanwhile  # type: ignore[method-assign, assignment]
    rig.runner.submit(spec(1, 5))

    assert plain(rig.report().updates) == [(1, 0, [10], FinishReason.LENGTH)]


def test_a_deadline_ends_a_sequence_whether_or_not_vllm_has_begun(rig: Rig) -> None:
    soon = Deadline(time.monotonic() + 0.05)
    rig.runner.submit(spec(1, 5, deadline=soon), spec(2, 6))

    assert plain(rig.report().updates) == [(1, 0, [], FinishReason.DEADLINE)]
    rig.settle()
    assert rig.engine.aborted == ["internal 1"]


def test_a_refused_sequence_ends_with_a_fault(rig: Rig) -> None:
    rig.engine.refusal = ValueError("too long")
    rig.runner.submit(spec(1, 5))

    (update,) = rig.report().updates
    assert (update.finish, update.fault) == (FinishReason.FAULT, "too long")


def test_a_refused_grammar_is_the_requests_fault(rig: Rig) -> None:
    rig.runner.submit(spec(1, 5, grammar="start: x"))

    (update,) = rig.report().updates
    assert update.finish is FinishReason.INVALID
    assert update.fault.startswith("the grammar cannot be used: ")
    assert rig.engine.collectors == []


def test_an_answer_follows_its_grammar(rig: Rig) -> None:
    rig.runner.submit(spec(1, 5, *b"a", resumed=1, grammar=regex("ab|xy").text))
    rig.thread.run(eventually(lambda: rig.engine.collectors))

    assert plain(rig.step({0: output(*b"b")}).updates) == [(1, 1, [*b"b"], None)]
    assert plain(rig.step({0: output(EOS_ID, finish="stop")}).updates) == [(1, 2, [], FinishReason.STOP)]


@pytest.mark.parametrize(
    ("ids", "finish"), [(b"x", None), (b"", "stop"), (b"x", "length")], ids=["other", "early", "last"]
)
def test_an_answer_that_leaves_its_grammar_is_the_requests_fault(
    rig: Rig, ids: bytes, finish: str | None
) -> None:
    """The processor in vLLM's process ends an answer that exceeds a limit; it cannot report why."""
    rig.runner.submit(spec(1, 5, *b"a", resumed=1, grammar=regex("ab|xy").text))
    rig.thread.run(eventually(lambda: rig.engine.collectors))

    (update,) = rig.step({0: output(*ids, *([EOS_ID] if finish == "stop" else []), finish=finish)}).updates

    assert (update.finish, list(update.token_ids)) == (FinishReason.INVALID, [])
    assert "cannot follow its grammar" in update.fault
    rig.settle()
    assert rig.engine.aborted == ([] if finish else ["internal 1"])


@pytest.mark.parametrize("reason", ["error", "abort", "repetition"])
def test_other_ends_at_vllm_are_faults(rig: Rig, reason: str) -> None:
    rig.runner.submit(spec(1, 5))
    rig.settle()

    (update,) = rig.step({0: output(10, finish=reason)}).updates
    assert (list(update.token_ids), update.finish) == ([10], FinishReason.FAULT)
    assert reason in update.fault


def test_a_key_in_use_is_refused_without_harm(rig: Rig) -> None:
    rig.runner.submit(spec(1, 5))
    rig.runner.submit(spec(1, 6))

    assert plain(rig.report().updates) == [(1, 0, [], FinishReason.FAULT)]
    rig.settle()
    assert plain(rig.step({0: output(10)}).updates) == [(1, 0, [10], None)]


def test_urgent_sequences_come_first_and_scopes_are_kept_apart(rig: Rig) -> None:
    rig.runner.submit(spec(1, 5, priority=9), spec(2, 6, priority=2.5), spec(3, 7, scope=b"\x01\xff"))
    rig.settle()
    first, second, third = rig.engine.collectors

    assert first.priority < third.priority < second.priority
    assert "cache_salt" not in first.prompt
    assert third.prompt["cache_salt"] == "01ff"


def test_the_load_counts_what_waits_and_what_is_uncomputed(rig: Rig) -> None:
    rig.runner.submit(spec(1, *range(10)), spec(2, *range(20)))
    rig.settle()

    report = rig.step({}, statistics(prompt=6, running=1, waiting=1))
    assert (report.waiting, report.uncomputed_prompt_tokens) == (1, 24)
    assert report.oldest_wait > 0
    assert report.kv_tokens_free == rig.runner.model.kv_tokens // 2
    report = rig.step({0: output(10)}, statistics(prompt=4, running=1, waiting=1))
    assert report.uncomputed_prompt_tokens == 20
    rig.runner.cancel(1, 2)
    report = rig.report()
    assert (report.running, report.waiting, report.uncomputed_prompt_tokens) == (0, 0, 0)
    assert report.kv_tokens_free == rig.runner.model.kv_tokens


def test_stopping_reports_every_sequence_as_cancelled_and_ends_vllm(rig: Rig) -> None:
    rig.runner.submit(spec(1, 5), spec(2, 6))
    rig.settle()
    rig.runner.stop()

    assert {update[3] for update in plain(rig.report().updates)} == {FinishReason.CANCELLED}
    assert rig.engine.shut_down
    rig.runner.submit(spec(3, 5))
    rig.runner.stop()  # again, without effect

"""A job is sent to a worker that can complete its answer with the weights that started it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from headrace import errors
from headrace.batcher.job import Job
from headrace.batcher.links.link import WorkerLink
from headrace.batcher.links.pool import WorkerPool
from headrace.batcher.waiting.admission import Admission
from headrace.batcher.waiting.dispatch import Dispatcher
from headrace.batcher.waiting.prefixes import PrefixIndex
from headrace.batcher.waiting.queue import RequestQueue
from headrace.batcher.waiting.window import Window
from headrace.v1 import worker_service_pb2 as wire
from tests.batcher.links.test_link import Recorder, job


class Pool(WorkerPool):
    """A pool of links that the test sets up."""

    def __init__(self, *links: WorkerLink) -> None:
        super().__init__([], fingerprint="f", batcher_id="b")
        self._links = {link.target: link for link in links}


class Bench:
    """A dispatcher over a pool, and its queue."""

    def __init__(self, *links: WorkerLink) -> None:
        pool, prefixes = Pool(*links), PrefixIndex()
        self.queue = RequestQueue(9, tier="t")
        self.admission = Admission(self.queue, pool, prefixes)
        self.dispatcher = Dispatcher(self.queue, pool, Window(), prefixes, self.admission, "t")

    def interrupted(self, *, kind: str, tokens: int = 0) -> Job:
        """Queue an answer that was interrupted after *tokens* tokens."""
        one = job()
        one.submitted, one.generated, one.history.kind = 0.0, [5] * tokens, kind
        self.queue.put_back(one)
        return one

    def fresh(self, *, max_tokens: int) -> Job:
        one = job()
        one.sampling.max_tokens = max_tokens
        self.queue.put(one)
        return one


def link(target: str, *, weights: str = "w", room: int = 8, context: int = 100) -> WorkerLink:
    made = WorkerLink(target, fingerprint="f", batcher_id="b", listener=Recorder())
    model = wire.ModelDescription(
        tokenizer_fingerprint="f", weights_fingerprint=weights, dtype="d", context_length=context
    )
    made.receiver.handle(
        wire.RunResponse(welcome=wire.Welcome(model=model, credit=wire.Credit(sequences=room)))
    )
    return made


def in_flight(link: WorkerLink) -> list[Job]:
    return link.in_flight.jobs()


async def test_an_interrupted_answer_waits_for_a_slot_at_a_worker_of_the_same_kind() -> None:
    same, other = link("same", room=0), link("other", weights="v")
    bench = Bench(same, other)
    one = bench.interrupted(kind=same.kind, tokens=3)
    bench.dispatcher.dispatch(0.0)
    assert (in_flight(same), in_flight(other)) == ([], []), "another kind would continue with other tokens"

    same.credit = wire.Credit(sequences=1)
    bench.dispatcher.dispatch(0.0)
    assert (in_flight(same), in_flight(other)) == ([one], [])


@pytest.mark.parametrize("trouble", ["gone", "suspect", "breaker open"])
async def test_an_interrupted_answer_does_not_wait_for_a_worker_that_is_not_working(trouble: str) -> None:
    same, other = link("same", room=0), link("other", weights="v")
    if trouble == "gone":
        same.connected = False
    elif trouble == "suspect":
        same.suspect = True
    else:
        for _ in range(same.breaker.threshold):
            same.breaker.record_fault(1e18)
    bench = Bench(same, other)
    one = bench.interrupted(kind=same.kind, tokens=3)
    bench.dispatcher.dispatch(0.0)

    assert in_flight(other) == [one]


async def test_workers_are_of_the_same_kind_if_they_compute_identical_results() -> None:
    model = wire.ModelDescription(
        weights_fingerprint="w", dtype="float32", device="cuda:0", determinism=wire.DETERMINISM_EXACT
    )
    one, two = link("one"), link("two")
    one.model, two.model = model, wire.ModelDescription()

    def with_(**other: Any) -> str:
        assert two.model is not None
        two.model.CopyFrom(model)
        for name, value in other.items():
            setattr(two.model, name, value)
        return two.kind

    assert with_() == with_(device="cuda:1", name="alias") == one.kind
    others = [
        with_(weights_fingerprint="v"),
        with_(dtype="int8"),
        with_(device="cpu"),
        with_(determinism=wire.DETERMINISM_BEST_EFFORT),
    ]
    assert one.kind not in others


async def test_an_answer_without_tokens_is_sent_to_any_kind() -> None:
    same, other = link("same", room=0), link("other", weights="v")
    bench = Bench(same, other)
    one = bench.interrupted(kind=same.kind)
    bench.dispatcher.dispatch(0.0)

    assert in_flight(other) == [one]


async def test_a_job_is_sent_where_the_context_holds_its_whole_answer() -> None:
    short, long = link("short", context=20), link("long", context=100, room=1)
    bench = Bench(short, long)
    one, two = bench.fresh(max_tokens=50), bench.fresh(max_tokens=50)
    bench.dispatcher.dispatch(0.0)
    assert (in_flight(short), in_flight(long)) == ([], [one])

    long.connected = False
    bench.dispatcher.dispatch(0.0)
    assert in_flight(short) == [two], "there is no other worker"


async def test_a_job_on_probation_is_sent_to_a_worker_that_has_responded_since_the_loss() -> None:
    """If all workers died at once, the death of the next one does not implicate the request."""
    dead, alive = link("dead"), link("alive")
    bench = Bench(dead, alive)
    one = bench.interrupted(kind="")
    one.history.killed, one.history.lost_at = [("other", 1)], time.monotonic()
    dead.receiver.handle(wire.RunResponse(load=wire.Load()))  # sent before it died, received after
    for _ in range(2):
        bench.dispatcher.dispatch(0.0)
    assert (in_flight(dead), in_flight(alive)) == ([], [])

    sent = alive._outgoing.get_nowait()
    assert sent is not None
    assert (sent.WhichOneof("message"), alive._outgoing.empty()) == ("ping", True), "pinged once"
    alive.receiver.handle(wire.RunResponse(pong=wire.Pong(nonce=1)))
    bench.dispatcher.dispatch(0.0)
    assert (in_flight(dead), in_flight(alive)) == ([], [one])


async def test_a_job_that_an_engine_failed_is_sent_to_another_worker_while_one_works() -> None:
    failed, other = link("failed"), link("other", room=0)
    bench = Bench(failed, other)
    one = bench.interrupted(kind="")
    one.history.address, one.history.reason = "failed", errors.SequenceFault.reason
    bench.dispatcher.dispatch(0.0)
    assert (in_flight(failed), in_flight(other)) == ([], []), "it waits for a slot at the other"

    other.connected = False
    bench.dispatcher.dispatch(0.0)
    assert in_flight(failed) == [one], "there is no other worker"


async def test_a_worker_with_a_half_open_breaker_gets_its_probe_while_others_work() -> None:
    recovering, working = link("recovering"), link("working", room=1)
    for _ in range(recovering.breaker.threshold):
        recovering.breaker.record_fault(-1e9)
    bench = Bench(recovering, working)
    jobs = [bench.fresh(max_tokens=9) for _ in range(3)]
    bench.dispatcher.dispatch(0.0)

    assert [len(in_flight(recovering)), len(in_flight(working))] == [1, 1]
    assert len(bench.queue) == len(jobs) - 2


async def test_a_batch_waits_until_its_oldest_job_has_lingered_while_no_worker_is_idle() -> None:
    busy = link("busy")
    busy.others_backlog = 10
    bench = Bench(busy)
    for moment in (0.999, 1.0):  # a thousand requests per second
        bench.admission.arrivals.add(time.monotonic() + 100 + moment)
    jobs = [bench.fresh(max_tokens=9) for _ in range(3)]
    for one, arrived in zip(jobs, (5.0, 5.001, 5.002), strict=True):
        one.arrived = arrived

    assert bench.dispatcher.dispatch(5.003) == pytest.approx(0.002)
    assert in_flight(busy) == []
    bench.dispatcher.dispatch(5.006)
    assert in_flight(busy) == jobs


async def test_jobs_on_probation_are_not_sent_to_a_worker_that_runs_another_one() -> None:
    only = link("only")
    only.liveness.alive_at = only.liveness.pinged_at = 1e18  # it has responded since every loss
    bench = Bench(only)
    first, second = bench.interrupted(kind=""), bench.interrupted(kind="")
    for one in (first, second):
        one.history.killed, one.history.lost_at = [("other", 1)], time.monotonic()
    for _ in range(2):
        bench.dispatcher.dispatch(0.0)
    assert in_flight(only) == [first]

    only.receiver.handle(
        wire.RunResponse(step=wire.Step(deltas=[wire.SequenceDelta(handle=0, token_ids=[5])]))
    )
    bench.dispatcher.dispatch(0.0)
    assert in_flight(only) == [first, second], "its first token ends the probation"


def able(target: str, *features: str) -> WorkerLink:
    made = link(target)
    assert made.model is not None
    made.model.features.extend(features)
    return made


def test_a_job_is_sent_only_to_workers_that_support_what_it_requests() -> None:
    unable, other = able("old", "logprobs"), able("new", "top_logprobs", "prompt_logprobs")
    bench = Bench(unable, other)
    for _ in range(3):
        bench.fresh(max_tokens=9).sampling.top_logprobs = 0
        bench.dispatcher.dispatch(time.monotonic())

    assert (unable.outstanding, other.outstanding) == (0, 3)


async def test_a_job_that_no_ready_worker_supports_any_more_fails_and_others_are_served() -> None:
    bench = Bench(able("old", "logprobs"))
    new = bench.fresh(max_tokens=9)
    begun = bench.interrupted(kind="", tokens=1)
    for unserved in (new, begun):
        unserved.sampling.top_logprobs = 1
    bench.fresh(max_tokens=9)
    bench.dispatcher.dispatch(time.monotonic())

    with pytest.raises(errors.NoWorkers, match="top_logprobs"):
        await new.inbox.take()
    with pytest.raises(errors.WorkerLost, match="top_logprobs"):
        await begun.inbox.take()
    assert not bench.queue

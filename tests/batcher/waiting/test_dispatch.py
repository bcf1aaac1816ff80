"""An answer goes where it can be given as it was begun, and to its end."""

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
from headrace.batcher.waiting.line import Line
from headrace.batcher.waiting.prefixes import Prefixes
from headrace.batcher.waiting.queue import JobQueue
from headrace.batcher.waiting.window import Window
from headrace.v1 import worker_service_pb2 as wire
from tests.batcher.links.test_link import Recorder, job


class Pool(WorkerPool):
    """A pool of links that are what the test says they are."""

    def __init__(self, *links: WorkerLink) -> None:
        super().__init__([], fingerprint="f", batcher_id="b")
        self._links = {link.target: link for link in links}


class Bench:
    """A dispatcher over a pool, and its queue."""

    def __init__(self, *links: WorkerLink) -> None:
        pool, prefixes = Pool(*links), Prefixes()
        self.line = Line(JobQueue(9), {})
        self.dispatcher = Dispatcher(
            self.line, pool, Window(), prefixes, Admission(self.line, pool, prefixes), {}
        )

    def begun(self, *, kind: str, tokens: int = 0) -> Job:
        """An answer that lost its worker after so many tokens, and waits."""
        one = job()
        one.submitted, one.generated, one.history.kind = 0.0, [5] * tokens, kind
        self.line.put_back(one)
        return one

    def fresh(self, *, max_tokens: int) -> Job:
        one = job()
        one.sampling.max_tokens = max_tokens
        self.line.put(one)
        return one


def link(target: str, *, weights: str = "w", room: int = 8, context: int = 100) -> WorkerLink:
    made = WorkerLink(target, fingerprint="f", batcher_id="b", sink=Recorder())
    model = wire.ModelDescription(
        tokenizer_fingerprint="f", weights_fingerprint=weights, dtype="d", context_length=context
    )
    made._take(wire.RunResponse(welcome=wire.Welcome(model=model, credit=wire.Credit(sequences=room))))
    return made


def taken(link: WorkerLink) -> list[Job]:
    return link.flights.jobs()


async def test_an_answer_waits_for_room_at_a_worker_of_the_kind_that_began_it() -> None:
    same, other = link("same", room=0), link("other", weights="v")
    bench = Bench(same, other)
    one = bench.begun(kind=same.kind, tokens=3)
    bench.dispatcher.dispatch(0.0)
    assert (taken(same), taken(other)) == ([], []), "another kind would go on with other words"

    same.credit = wire.Credit(sequences=1)
    bench.dispatcher.dispatch(0.0)
    assert (taken(same), taken(other)) == ([one], [])


@pytest.mark.parametrize("trouble", ["gone", "suspect", "rested"])
async def test_an_answer_does_not_wait_for_a_worker_that_does_not_work(trouble: str) -> None:
    same, other = link("same", room=0), link("other", weights="v")
    if trouble == "gone":
        same._welcomed = False
    elif trouble == "suspect":
        same.suspect = True
    else:
        for _ in range(same.breaker.threshold):
            same.breaker.fail(1e18)
    bench = Bench(same, other)
    one = bench.begun(kind=same.kind, tokens=3)
    bench.dispatcher.dispatch(0.0)

    assert taken(other) == [one]


async def test_workers_are_of_one_kind_if_they_compute_the_same_bits() -> None:
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


async def test_what_has_not_said_a_token_goes_to_any_kind() -> None:
    same, other = link("same", room=0), link("other", weights="v")
    bench = Bench(same, other)
    one = bench.begun(kind=same.kind)
    bench.dispatcher.dispatch(0.0)

    assert taken(other) == [one]


async def test_an_answer_goes_where_the_context_holds_it_to_its_end() -> None:
    short, long = link("short", context=20), link("long", context=100, room=1)
    bench = Bench(short, long)
    one, two = bench.fresh(max_tokens=50), bench.fresh(max_tokens=50)
    bench.dispatcher.dispatch(0.0)
    assert (taken(short), taken(long)) == ([], [one])

    long._welcomed = False
    bench.dispatcher.dispatch(0.0)
    assert taken(short) == [two], "there is no other"


async def test_what_may_have_killed_a_worker_goes_to_one_that_was_seen_to_live_since() -> None:
    """Where all died at once, the next one's death says nothing of the request."""
    dead, alive = link("dead"), link("alive")
    bench = Bench(dead, alive)
    one = bench.begun(kind="")
    one.history.killed, one.history.lost_at = [("other", 1)], time.monotonic()
    dead._take(wire.RunResponse(load=wire.Load()))  # said before it died, and heard after
    for _ in range(2):
        bench.dispatcher.dispatch(0.0)
    assert (taken(dead), taken(alive)) == ([], [])

    asked = alive._outgoing.get_nowait()
    assert asked is not None
    assert (asked.WhichOneof("message"), alive._outgoing.empty()) == ("ping", True), "asked once"
    alive._take(wire.RunResponse(pong=wire.Pong(nonce=1)))
    bench.dispatcher.dispatch(0.0)
    assert (taken(dead), taken(alive)) == ([], [one])


async def test_what_an_engine_failed_goes_elsewhere_while_another_one_works() -> None:
    failed, other = link("failed"), link("other", room=0)
    bench = Bench(failed, other)
    one = bench.begun(kind="")
    one.history.address, one.history.reason = "failed", errors.SequenceFault.reason
    bench.dispatcher.dispatch(0.0)
    assert (taken(failed), taken(other)) == ([], []), "there will be room"

    other._welcomed = False
    bench.dispatcher.dispatch(0.0)
    assert taken(failed) == [one], "there is no other"


async def test_a_worker_that_was_rested_gets_its_probe_though_others_work() -> None:
    rested, working = link("rested"), link("working", room=1)
    for _ in range(rested.breaker.threshold):
        rested.breaker.fail(-1e9)
    bench = Bench(rested, working)
    jobs = [bench.fresh(max_tokens=9) for _ in range(3)]
    bench.dispatcher.dispatch(0.0)

    assert [len(taken(rested)), len(taken(working))] == [1, 1]
    assert len(bench.line.queue) == len(jobs) - 2

"""A burst within one turn of the event loop is limited by capacity alone."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest
from opentelemetry import trace

from headrace import errors
from headrace.batcher.inbox import Inbox
from headrace.batcher.job import Job
from headrace.deadline import NEVER
from headrace.flushing import Flusher
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from tests.harness import eventually, running_mesh


def job(number: int) -> Job:
    return Job(
        request_id=str(number),
        prompt_ids=[1],
        resume_ids=[],
        sampling=pb.Sampling(seed=1, max_tokens=1000, ignore_eos=True),
        arrived=time.monotonic(),
        deadline=NEVER,
        priority=5,
        attempt=0,
        inbox=Inbox(Flusher(), limit=1000),
        span=trace.INVALID_SPAN,
    )


async def test_a_burst_longer_than_the_queue_is_accepted_up_to_the_free_slots_of_workers() -> None:
    async with running_mesh(
        "only",
        engine=lambda: EchoEngine(max_running=4, step_seconds=0.01),
        batcher_settings={"queue_limit": 2, "linger": 0.0},
    ) as mesh:
        coalescer = mesh.tiers["only"].batcher.coalescer
        (link,) = coalescer.pool
        fit = link.free_slots(time.monotonic()) + 2
        with ExitStack() as admitted:
            for number in range(fit):  # the dispatcher does not run in between
                admitted.enter_context(coalescer.admitted(job(number)))

            with pytest.raises(errors.Overloaded), coalescer.admitted(job(fit)):
                pass
        await eventually(lambda: not mesh.left_behind)

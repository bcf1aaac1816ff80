"""Random requests in random order: each stream keeps the contract, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, Mesh, collect, eventually, prompt, running_mesh

TEXTS = st.text(st.sampled_from("abc é–火🚀"), min_size=1, max_size=40)


@dataclass(frozen=True)
class Visit:
    """One request: when it starts, what it asks for, and after how many events it is cancelled, if it is."""

    text: str
    after: float
    max_tokens: int
    ignore_eos: bool
    stop: tuple[str, ...]
    flush: int
    leaves_after: int | None
    timeout: float


VISITS = st.builds(
    Visit,
    text=TEXTS,
    after=st.sampled_from([0.0, 0.0, 0.001, 0.005, 0.01]),
    max_tokens=st.integers(1, 60),
    ignore_eos=st.booleans(),
    stop=st.lists(st.text(st.sampled_from("abc é–火🚀"), min_size=1, max_size=3), max_size=2).map(tuple),
    flush=st.integers(1, 9),
    leaves_after=st.one_of(st.none(), st.none(), st.integers(0, 4)),
    timeout=st.sampled_from([PATIENCE, PATIENCE, PATIENCE, 0.03]),
)


@pytest.fixture(scope="module")
async def tight() -> AsyncGenerator[Mesh, None]:
    """Run a mesh with tight limits: 3 sequences, 320 tokens of KV memory, 12 tokens a step, batches of 2."""
    async with running_mesh(
        "only",
        engine=lambda: EchoEngine(max_running=3, context_length=256, kv_blocks=20, step_seconds=0.0005),
        worker_settings={"step_tokens": 12},
        batcher_settings={"batch_size": 2, "linger": 0.002},
    ) as running:
        yield running


def expected(visit: Visit) -> tuple[str, int]:
    """Return the text and the finish reason that the echo engine's answer must have."""
    said = visit.text.encode()
    ids = (said * (visit.max_tokens // len(said) + 1))[: visit.max_tokens]
    reason = pb.FINISH_REASON_LENGTH
    if not visit.ignore_eos and visit.max_tokens > len(said):
        ids, reason = said, pb.FINISH_REASON_STOP
    text = ids.decode(errors="replace")
    whole = ids.decode(errors="ignore")
    places = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in visit.stop if stop in whole]
    if places:
        # The stop text that is complete first wins; of two at once, the one that starts first.
        _, begins = min(places)
        return whole[:begins], pb.FINISH_REASON_STOP_SEQUENCE
    return text, reason


async def pay(mesh: Mesh, visit: Visit) -> None:
    """Send one request and check its answer."""
    await asyncio.sleep(visit.after)
    request = prompt(
        visit.text, max_tokens=visit.max_tokens, ignore_eos=visit.ignore_eos, stop=list(visit.stop)
    )
    request.stream.flush_tokens = visit.flush
    if visit.leaves_after is not None:
        async with aclosing(mesh.client.generate(request, timeout=PATIENCE)) as stream:
            for _ in range(visit.leaves_after):
                if await anext(stream, None) is None:
                    break
        return
    if visit.timeout < 1:
        with suppress(errors.DeadlineExceeded):
            await collect(mesh.client, request, timeout=visit.timeout)
        return
    answer = await collect(mesh.client, request)
    text, reason = expected(visit)
    assert answer.text == text
    assert answer.finish.reason == reason
    assert answer.finish.usage.completion_tokens == answer.tokens <= visit.max_tokens


@given(visits=st.lists(VISITS, min_size=1, max_size=14))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_every_stream_keeps_the_contract_and_nothing_is_left(tight: Mesh, visits: list[Visit]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for visit in visits:
            tasks.create_task(pay(tight, visit))

    await eventually(lambda: not tight.left_behind)


async def test_hundreds_of_requests_leave_no_task_behind(tight: Mesh) -> None:
    gc.collect()
    before = len(asyncio.all_tasks())
    for round_ in range(4):
        async with asyncio.TaskGroup() as tasks:
            for number in range(100):
                leaves = number % 3 if number % 4 == 0 else None
                tasks.create_task(
                    pay(tight, Visit(f"v{round_}-{number}", 0, 20, False, (), 1, leaves, PATIENCE))
                )

    await eventually(lambda: not tight.left_behind)
    await eventually(lambda: len(asyncio.all_tasks()) <= before)

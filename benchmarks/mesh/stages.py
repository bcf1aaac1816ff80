"""Measure where the time to the first token of one request goes, stage by stage.

The mesh is idle otherwise. Each process, this one as client included, records when the functions of STAGES
run; `probe/sitecustomize.py` wraps them, so the services contain no code for it. A stage lasts from the end
of the stage before it until its own mark. All processes of a machine share one monotonic clock.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.mesh.answers import TIMEOUT, request
from benchmarks.mesh.probe import sitecustomize
from benchmarks.mesh.systems import EngineSpec, System, progress, serving
from benchmarks.mesh.tables import show_table
from headrace.client import Client

PROBE = Path(__file__).parent / "probe"
TOKENS, STEP_SECONDS = 8, 0.01
PAUSE_SECONDS = 0.05  # between requests, so that each finds the mesh idle

Records = Mapping[str, Sequence[tuple[int, str, str]]]  # by process; see `probe/sitecustomize.py`


class NoSuchProbe(Exception):
    """A function of STAGES does not exist, or was not called. The message names it."""


@dataclass(frozen=True)
class Stage:
    """A stage, which ends at a mark.

    name      what the time is used for
    process   where the mark is: router, batcher, worker or client
    probe     the function of the mark, as MODULE:NAME, with its package's `headrace.` left out
    edge      whether the mark is the start of the call, or its end; of a generator, an item
    """

    name: str
    process: str
    probe: str
    edge: Literal["in", "out"]

    @property
    def target(self) -> str:
        """The full name of the function."""
        return f"headrace.{self.probe}"


# In the order in which a request passes them, and its first token on its way back. A function that is renamed
# or moved must be changed here as well; tests/benchmarks/test_mesh.py finds those that do not exist.
STAGES = (
    Stage("client: prepare", "client", "client:Client.attempt", "in"),
    Stage(
        "client: encode, send; router: receive, parse",
        "router",
        "multiplex.serving:_Stream._start",
        "in",
    ),
    Stage(
        "router: start the request, admit, start a span",
        "router",
        "router.service:RouterServicer.answer",
        "in",
    ),
    Stage("router: validate", "router", "validation:check_request", "out"),
    Stage("router: score", "router", "router.service:RouterServicer._score", "out"),
    Stage(
        "router: make the journey, copy the request",
        "router",
        "router.answering.journey:Journey.__init__",
        "out",
    ),
    Stage("router: choose", "router", "router.answering.journey:Journey.choose", "out"),
    Stage(
        "router: pick a batcher, copy the request",
        "router",
        "router.state.batcher_peer:BatcherPeer.generate",
        "in",
    ),
    Stage(
        "router: start a span, join the stream", "router", "multiplex.shared_stream:SharedStream.open", "out"
    ),
    Stage(
        "router: encode, send; batcher: receive, parse",
        "batcher",
        "multiplex.serving:_Stream._start",
        "in",
    ),
    Stage(
        "batcher: start the request, admit, start a span",
        "batcher",
        "batcher.answering:Answering.answer",
        "in",
    ),
    Stage("batcher: validate", "batcher", "validation:check_request", "out"),
    Stage("batcher: enter the intake", "batcher", "batcher.intake.encoding:Encoder.prompt_ids", "in"),
    Stage("batcher: tokenise", "batcher", "batcher.intake.encoding:Encoder.prompt_ids", "out"),
    Stage("batcher: make the job", "batcher", "batcher.intake.intake:Intake.job", "out"),
    Stage("batcher: enter the queue", "batcher", "batcher.waiting.admission:Admission.admit", "out"),
    Stage("batcher: wait in the queue, dispatch", "batcher", "batcher.links.link:WorkerLink.submit", "in"),
    Stage("batcher: make the batch", "batcher", "batcher.links.link:WorkerLink.submit", "out"),
    Stage("batcher: encode, send; worker: receive", "worker", "worker.streams:BatcherStreams.submit", "in"),
    Stage("worker: submit", "worker", "worker.streams:BatcherStreams.submit", "out"),
    Stage(
        "worker: resume the engine's thread, plan",
        "worker",
        "worker.engine.plan.loop:EngineLoop._launch",
        "in",
    ),
    Stage("worker: engine step", "worker", "worker.engine.plan.loop:EngineLoop._results", "out"),
    Stage("worker: apply, start the next step", "worker", "worker.flow.delivery:Delivery.add", "in"),
    Stage("worker: resume the event loop", "worker", "worker.streams:BatcherStreams._deliver", "in"),
    Stage("worker: make the deltas", "worker", "worker.streams:BatcherStreams._deliver", "out"),
    Stage(
        "worker: resume the writer, make the frame",
        "worker",
        "worker.stream:BatcherStream.take_messages",
        "out",
    ),
    Stage(
        "worker: encode, send; batcher: receive",
        "batcher",
        "batcher.links.receiver:Receiver._handle_step",
        "in",
    ),
    Stage("batcher: put into the inbox", "batcher", "batcher.links.receiver:Receiver._handle_step", "out"),
    Stage("batcher: resume the answer", "batcher", "batcher.text.answer:AnswerEvents.events_for", "in"),
    Stage(
        "batcher: detokenise, make the event", "batcher", "batcher.text.answer:AnswerEvents.events_for", "out"
    ),
    Stage(
        "batcher: encode, send; router: receive, parse",
        "router",
        "multiplex.shared_call:SharedCall.receive",
        "in",
    ),
    Stage("router: resume the answer", "router", "progress:Progress.add", "in"),
    Stage("router: record", "router", "progress:Progress.add", "out"),
    Stage(
        "router: pass on, encode, send; client: receive, parse",
        "client",
        "multiplex.shared_call:SharedCall.receive",
        "in",
    ),
    Stage("client: resume the caller", "client", "progress:Progress.add", "in"),
)
LAST = "client: pass to the caller"


@dataclass(frozen=True)
class StageTime:
    """The median time of a stage, in seconds."""

    stage: str
    seconds: float


def check_probes() -> None:
    """Raise NoSuchProbe unless every function of STAGES exists."""
    for stage in STAGES:
        module, _, path = stage.target.partition(":")
        try:
            found = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError) as error:
            raise NoSuchProbe(
                f"{stage.target}, the mark of {stage.name!r}, does not exist ({error}): correct STAGES in "
                "benchmarks/mesh/stages.py"
            ) from error


def stage_times(records: Records, began: int, ended: int) -> list[float]:
    """Return the seconds of each stage of one request, and of the way from the last mark to the client.

    records      of all processes, in the order of their times
    began, ended when the client made the request, and when it received the first token

    The mark of a stage is the first that follows the mark of the stage before. Raises NoSuchProbe if there
    is none before *ended*.
    """
    times, now = [], began
    for stage in STAGES:
        marks = (
            at
            for at, name, edge in records[stage.process]
            if at >= now and name == stage.target and edge == stage.edge
        )
        mark = next(marks, None)
        if mark is None or mark > ended:
            raise NoSuchProbe(
                f"{stage.target} was not called in the {stage.process} at the end of {stage.name!r}: correct "
                "STAGES in benchmarks/mesh/stages.py"
            )
        times.append((mark - now) / 1e9)
        now = mark
    return [*times, (ended - now) / 1e9]


def read_records(folder: Path) -> Records:
    """Return the records of each process."""
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


async def measure(arguments: argparse.Namespace) -> list[StageTime]:
    """Return the median time of each stage, over idle requests."""
    check_probes()
    with tempfile.TemporaryDirectory() as folder:
        system = System(
            "mesh",
            environment={
                "PYTHONPATH": str(PROBE),
                "HEADRACE_PROBE_OUT": f"{folder}/KIND.json",
                "HEADRACE_PROBES": " ".join(dict.fromkeys(stage.target for stage in STAGES)),
            },
            multiplex=True,
        )
        progress(f"stages: {arguments.requests} requests, one at a time")
        for target in dict.fromkeys(stage.target for stage in STAGES if stage.process == "client"):
            sitecustomize.wrap(importlib.import_module(target.partition(":")[0]), target)
        async with serving([system], EngineSpec(STEP_SECONDS)) as served:
            spans = []
            for number in range(arguments.requests):
                spans.append(await _first_token(served[system.name].client, number))
                await asyncio.sleep(PAUSE_SECONDS)
        # Each process has written its records at its end.
        records = {**read_records(Path(folder)), "client": sitecustomize.records}
    if missing := {stage.process for stage in STAGES} - records.keys():
        raise NoSuchProbe(f"no records of {', '.join(sorted(missing))}: {PROBE} was not imported there")
    each = [stage_times(records, began, ended) for began, ended in spans]
    names = [*(stage.name for stage in STAGES), LAST]
    return [
        StageTime(name, statistics.median(times))
        for name, times in zip(names, zip(*each, strict=True), strict=True)
    ]


async def _first_token(client: Client, number: int) -> tuple[int, int]:
    """Run one request. Returns the times of its start and of its first token, by time.monotonic_ns."""
    began, ended = time.monotonic_ns(), 0
    async with aclosing(client.generate(request(number, TOKENS), timeout=TIMEOUT)) as stream:
        async for response in stream:
            if not ended and response.HasField("delta"):
                ended = time.monotonic_ns()
    return began, ended


def show(kept: Sequence[StageTime]) -> None:
    """Print the stages and their sum."""
    total = sum(one.seconds for one in kept)
    show_table(
        f"the first token of one request on an idle mesh, steps of {STEP_SECONDS * 1e3:g} ms; medians",
        ("stage", "ms"),
        [
            *([one.stage, f"{one.seconds * 1e3:.3f}"] for one in kept),
            ["all", f"{total * 1e3:.3f}"],
        ],
    )

"""`headrace bench`: connect, test the target, send the loads one after the other, and show the results."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from headrace import errors
from headrace.cli.bench import figures, report
from headrace.cli.bench.backends.mesh import MeshBackend, MeshFailed
from headrace.cli.bench.backends.openai import OpenAiOptions, connect_openai
from headrace.cli.bench.load import Run, send, warm_up
from headrace.cli.bench.options import BadOption, Load
from headrace.cli.bench.prompts import ListedPrompts, Prompt
from headrace.cli.bench.records import Failed, Record
from headrace.cli.bench.synthetic import LONG, SHORT, SyntheticPrompts, count, text_of
from headrace.cli.complaints import advice
from headrace.cli.launch.up import run_until_signal
from headrace.runtime.serving.limits import raise_file_limit
from headrace.runtime.serving.memory_reclaim import collect_less_often

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from rich.console import Console

    from headrace.cli.bench.backends.backend import Backend
    from headrace.cli.bench.objectives import Objective
    from headrace.cli.bench.prompts import Prompts
    from headrace.cli.calls.connection import Connection

MET, NOT_MET, USAGE, FAILED, INTERRUPTED = 0, 1, 2, 3, 130  # exit statuses

# So far apart are the numbers of the prompts of two runs: synthetic ones do not repeat.
_APART = 10_000_000
_HINTS = {
    "HTTP 401": "give a key with --api-key",
    "HTTP 403": "give a key with --api-key",
    "HTTP 404": "check --url, which usually ends in /v1, and --model",
    "HTTP 400": "some servers do not know all fields; --extra-body '{\"FIELD\": null}' removes one",
    "HTTP 422": "some servers do not know all fields; --extra-body '{\"FIELD\": null}' removes one",
    "connection failed": "start a server, or give another with --url",
}


class TargetFailed(Exception):
    """The target did not answer the test request. *status* is that of the command."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure, and how to show it.

    connection   to a mesh, and the files of TLS and of a token for *openai* as well
    openai       a server with OpenAI's API instead; None: the mesh
    tier, model  restrict the requests to a mesh
    prompts      what is sent
    loads        one after the other
    warmup       requests before each load, not measured
    percents     percentiles of each latency
    goodput      limits of a good request, in seconds by latency
    json, plot   files to write
    detailed     whether *json* has the lists of all requests
    """

    connection: Connection
    openai: OpenAiOptions | None = None
    tier: str = ""
    model: str = ""
    temperature: float | None = None
    chat_api: bool = True
    prompts: ListedPrompts | SyntheticPrompts
    loads: Sequence[Load]
    warmup: int = 0
    percents: Sequence[float] = (50, 90, 95, 99)
    goodput: Mapping[str, float] = field(default_factory=dict)
    objectives: Sequence[Objective] = ()
    json: Path | None = None
    plot: Path | None = None
    detailed: bool = False
    label: str = ""


@dataclass
class Measured:
    """The runs so far, and what is known of the backend."""

    backend: Backend | None = None
    runs: list[tuple[Load, Run]] = field(default_factory=list)


def bench(options: BenchOptions, console: Console, progress: Console) -> int:
    """Measure, print the result on *console*, and return the exit status.

    progress   shows how far it is, if it is a terminal

    Raises TargetFailed, BadOption, BadTls, BadToken, and OSError for files that cannot be written.
    """
    check(options)
    raise_file_limit()
    collect_less_often()
    measured = Measured()
    interrupted, failure = False, None
    try:
        interrupted = run_until_signal(
            measure(options, measured, progress),
            lambda: progress.print("stopping...", style="dim"),
            loop_factory=loop_factory(),
        )
    except TargetFailed as failed:
        failure = failed  # loads before the one that failed have results
    started = [(load, run) for load, run in measured.runs if run.records]
    if not started or measured.backend is None:
        if failure is not None:
            raise failure
        return INTERRUPTED
    results = [result_of(options, measured.backend, load, run) for load, run in started]
    for result in results:
        if len(results) > 1:
            console.rule(_title(result))
        report.show(result, options.percents, console)
        report.show_objectives(result, options.objectives, console)
    if len(results) > 1:
        report.show_sweep(results, options.objectives, console)
    if options.json is not None:
        report.write_json(results, options.json)
    if options.plot is not None:
        from headrace.cli.bench.plot import draw

        draw([run for _, run in started], results, options.plot)
    if interrupted:
        return INTERRUPTED
    if failure is not None:
        raise failure
    if any(not result["completed"] for result in results):
        raise TargetFailed(_first_failure(started), FAILED)
    return MET if all(one.met(result) for result in results for one in options.objectives) else NOT_MET


def check(options: BenchOptions) -> None:
    """Raise BadOption for what would be noticed only at the end, or at each request."""
    for name, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise BadOption(f"{name} {path}: there is no folder {path.absolute().parent}")
        if path is not None and path.is_dir():
            raise BadOption(f"{name} {path} is a folder: give the name of a file")
    if options.plot is not None:
        from headrace.cli.bench.plot import check_plot

        check_plot(options.plot)
    if not options.chat_api and isinstance(options.prompts, ListedPrompts):
        place = next((place for place, one in enumerate(options.prompts.listed, 1) if one.text is None), None)
        if place is not None:
            raise BadOption(f"prompt {place} has several messages, which need --endpoint chat")


async def measure(options: BenchOptions, measured: Measured, progress: Console) -> None:
    """Send all loads, and write what happened into *measured*, which is valid when this is cancelled."""
    try:
        async with opened(options) as backend:
            measured.backend = backend
            prompts = await prepared(options, backend)
            gc.collect()
            gc.freeze()  # vLLM's benchmark does so as well: what is loaded by now is not looked at again
            for place, load in enumerate(options.loads):
                first = place * _APART
                if options.warmup:
                    await warm_up(backend, prompts, load, options.warmup, before=first - 1)
                run = Run()
                measured.runs.append((load, run))
                async with report.progress(run, load, progress):
                    await send(backend, prompts, load, run, first=first, keep_text=options.detailed)
    except MeshFailed as failed:
        usage = isinstance(failed.error, errors.InvalidRequest)
        raise TargetFailed(
            advice(failed.error, options.connection.target), USAGE if usage else FAILED
        ) from None
    except Failed as failed:
        raise TargetFailed(*described(failed, options)) from None


def described(failed: Failed, options: BenchOptions) -> tuple[str, int]:
    """Return message and exit status of a test request that failed over HTTP."""
    where = options.openai.url if options.openai else options.connection.target
    hint = next((hint for kind, hint in _HINTS.items() if failed.kind.startswith(kind)), "")
    usage = failed.kind.startswith(("HTTP 400", "HTTP 404", "HTTP 422"))
    message = f"{where}: {failed.kind}: {failed}" + (f"; {hint}" if hint else "")
    return message, USAGE if usage else FAILED


@asynccontextmanager
async def opened(options: BenchOptions) -> AsyncGenerator[Backend, None]:
    """Connect to the target. Raises BadOption, BadTls, BadToken and Failed."""
    if options.openai is not None:
        async with connect_openai(options.openai, options.connection) as backend:
            yield backend
        return
    async with options.connection.open() as client:
        yield MeshBackend(
            client,
            where=options.connection.target,
            tier=options.tier,
            model=options.model,
            temperature=options.temperature,
            chat_api=options.chat_api,
        )


async def prepared(options: BenchOptions, backend: Backend) -> Prompts:
    """Send test requests, and return the prompts; synthetic ones by the tokens that the server counts.

    Raises Failed.
    """
    timeout = options.loads[0].timeout
    prompts = options.prompts
    if isinstance(prompts, ListedPrompts):
        await backend.ask(replace(prompts(-1), max_tokens=1), Record(), timeout=timeout)
        return prompts
    import random

    counted = []
    for words in (SHORT, LONG):
        record = Record()
        text = text_of(words, random.Random(words))
        await backend.ask(Prompt((("user", text),), 1, prompts(0).exact), record, timeout=timeout)
        counted.append(record.input_tokens)
    short, long = counted
    return prompts if short is None or long is None else replace(prompts, counted=count(short, long))


def result_of(options: BenchOptions, backend: Backend, load: Load, run: Run) -> dict[str, Any]:
    """Return the result of one load, as it is written as JSON."""
    models = sorted({record.model for record in run.records if record.model})
    planned = load.requests if load.requests is not None and load.seconds is None else len(run.records)
    result = figures.described(
        load,
        backend=backend.name,
        model=", ".join(models) or backend.model,
        prompts=planned,
        label=options.label,
        date=datetime.now(),
    )
    result |= figures.summarize(run, percents=options.percents, goodput=options.goodput)
    result["objectives"] = {str(one): one.met(result) for one in options.objectives}
    if options.detailed:
        result |= figures.detailed(run, [backend.text_of(record) for record in run.records])
    return result


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the event loop: uvloop takes half of the time of asyncio's own."""
    try:
        import uvloop
    except ImportError:  # not available on Windows
        return None
    return uvloop.new_event_loop


def _title(result: Mapping[str, Any]) -> str:
    if result["request_rate"] != "inf":
        return f"{result['request_rate']:g} requests per second"
    return f"{result['max_concurrency']} requests at a time"


def _first_failure(started: Sequence[tuple[Load, Run]]) -> str:
    for _, run in started:
        for record in run.records:
            if record.error:
                return f"no request was completed: {record.error}: {record.message}"
    return "no request was completed"

"""`headrace demo`: a mesh, some prompts of all kinds, and one request's trace.

The first prompts come one by one, so that one can watch the answers stream; the rest at once, so that
the batchers have something to coalesce.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import json
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from opentelemetry import trace
from rich.console import Console
from rich.rule import Rule

from headrace import attributes
from headrace.cli.answers import Answer, printable
from headrace.cli.boards import StartBoard
from headrace.cli.chat import Wishes, follow, request_for
from headrace.cli.complaints import advice
from headrace.cli.mesh import mesh
from headrace.cli.otlp_sink import otlp_sink, whole
from headrace.cli.summary import Outcome, summarise, summary_table
from headrace.cli.trace_tree import busiest, trace_tree
from headrace.client import connect
from headrace.errors import HeadraceError
from headrace.runtime.telemetry.setup import telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from headrace.cli.mesh import MeshSpec
    from headrace.cli.otlp_sink import Sink, Span
    from headrace.client import Client

_ALONE = 4  # prompts that are asked one by one
_AT_ONCE = 6  # of the others
_TRACE_SECONDS = 30.0  # for the last spans to arrive; a fraction of one where nothing else runs
_tracer = trace.get_tracer(__name__)


@dataclass(frozen=True)
class Prompt:
    """One line of demo_prompts.jsonl."""

    kind: str
    prompt: str
    max_tokens: int


def prompts() -> list[Prompt]:
    """Read the prompts that come with the package."""
    text = (importlib.resources.files("headrace.cli") / "demo_prompts.jsonl").read_text("utf-8")
    return [Prompt(**json.loads(line)) for line in text.splitlines()]


async def demo(spec: MeshSpec, console: Console) -> bool:
    """Run it all; tell whether every prompt got a finished answer. Raises BadSpec and ChildDied."""
    began = time.perf_counter()
    async with otlp_sink() as sink:
        # The SDK reads its settings from the environment, ours as well as the children's.
        os.environ.update(sink.environment)
        with StartBoard(console) as board:
            started = replace(spec, environment={**spec.environment, **sink.environment})
            async with mesh(started, on_states=board) as running:
                board.finish()
                since = time.perf_counter() - began
                console.print(f"mesh of {len(running.processes)} processes up after {since:.1f} s\n")
                wishes = Wishes(target=running.address, temperature=0.0)
                async with telemetry("client"), connect(running.address) as client:
                    return await _tour(_Guide(client, wishes, console), prompts(), sink, console)


async def _tour(guide: _Guide, everything: Sequence[Prompt], sink: Sink, console: Console) -> bool:
    began = time.perf_counter()
    console.print(Rule("one by one, as the answers come", align="left"))
    outcomes = [await guide.aloud(prompt) for prompt in everything[:_ALONE]]
    console.print(Rule(f"{_AT_ONCE} at a time, each when it is complete", align="left"))
    room = asyncio.Semaphore(_AT_ONCE)

    async def quietly(prompt: Prompt) -> Outcome:
        async with room:
            return await guide.quietly(prompt)

    async with asyncio.TaskGroup() as tasks:
        rest = [tasks.create_task(quietly(prompt)) for prompt in everything[_ALONE:]]
    outcomes += [task.result() for task in rest]
    summary = summarise(outcomes, time.perf_counter() - began)
    console.print(summary_table(summary))
    await _show_trace(guide.traces[_ALONE:], guide.answered, sink, console)
    return not summary.failures


def arrived(spans: Sequence[Span], trace_ids: Sequence[str], answered: Collection[str]) -> bool:
    """Tell whether all spans of these traces are there.

    Each process sends its own when it comes to that: a trace may be whole before its worker has told what it
    computed. *answered* are the traces of prompts that got tokens, which some worker did compute.
    """
    computed = {span.trace_id for span in spans if span.name == attributes.SPAN_DECODE}
    return all(whole(spans, each) and (each in computed or each not in answered) for each in trace_ids)


async def _show_trace(
    trace_ids: Sequence[str], answered: Collection[str], sink: Sink, console: Console
) -> None:
    """Show one of the traces: the request that shared its batch with the most others."""
    try:
        await sink.until(lambda spans: arrived(spans, trace_ids, answered), timeout=_TRACE_SECONDS)
    except TimeoutError:
        console.print("some spans have not arrived", style="yellow")
    console.print(Rule("one request, seen from all processes", align="left"))
    console.print(trace_tree(sink.spans, busiest(sink.spans, trace_ids)))


class _Guide:
    """Asks prompts and shows the answers; remembers the trace of each, in order of asking.

    answered   the traces of those that got tokens
    """

    def __init__(self, client: Client, wishes: Wishes, console: Console) -> None:
        self._client = client
        self._wishes = wishes
        self._console = console
        self.traces: list[str] = []
        self.answered: set[str] = set()

    async def aloud(self, prompt: Prompt) -> Outcome:
        """Ask, and show the answer as it comes."""
        self._question(prompt)
        outcome = await self._ask(prompt, self._write)
        self._write("\n")
        self._figures(outcome)
        return outcome

    async def quietly(self, prompt: Prompt) -> Outcome:
        """Ask, and show the answer when it is complete."""
        outcome = await self._ask(prompt, lambda text: None)
        self._question(prompt)
        self._write(f"{outcome.answer.text}\n")
        self._figures(outcome)
        return outcome

    async def _ask(self, prompt: Prompt, write: Callable[[str], None]) -> Outcome:
        answer = Answer()
        request = request_for([("user", prompt.prompt)], replace(self._wishes, max_tokens=prompt.max_tokens))
        with _tracer.start_as_current_span("demo.prompt", attributes={"demo.kind": prompt.kind}) as span:
            trace_id = f"{span.get_span_context().trace_id:032x}"
            self.traces.append(trace_id)
            try:
                await follow(self._client, request, answer, timeout=self._wishes.timeout, write=write)
            except HeadraceError as error:
                return Outcome(prompt.kind, answer, advice(error, self._wishes.target))
            finally:
                if answer.tokens:
                    self.answered.add(trace_id)
        return Outcome(prompt.kind, answer)

    def _question(self, prompt: Prompt) -> None:
        self._console.print(f"[bold cyan]{prompt.kind}[/]", end="  ")
        self._console.print(prompt.prompt, style="bold", markup=False, highlight=False, soft_wrap=True)

    def _write(self, text: str) -> None:
        self._console.print(printable(text), end="", markup=False, highlight=False, soft_wrap=True)

    def _figures(self, outcome: Outcome) -> None:
        if outcome.failure:
            self._console.print(f"failed: {outcome.failure}", style="red", markup=False, soft_wrap=True)
        figures = f"{outcome.answer.figures()}\n"
        self._console.print(figures, style="dim", markup=False, highlight=False, soft_wrap=True)

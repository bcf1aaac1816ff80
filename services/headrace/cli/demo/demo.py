"""`headrace demo`: start a mesh, send it prompts of all kinds, and show the trace of one request per tier.

The first prompts are sent one at a time, with their answers streamed to the terminal. The others are sent
concurrently, so that the batchers can form batches. A tier that the router chose for none of them is then
asked by name. The last prompt is sent to the gateway, by curl.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import json
import os
import shlex
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from opentelemetry import trace
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from headrace import attributes
from headrace.cli.answers import Answer, printable
from headrace.cli.calls.chat import ChatOptions, follow, request_for
from headrace.cli.calls.connection import Connection
from headrace.cli.complaints import advice
from headrace.cli.demo.otlp_receiver import is_complete, otlp_receiver
from headrace.cli.demo.summary import Outcome, summarise, summary_table, unasked
from headrace.cli.demo.trace_tree import busiest, trace_tree
from headrace.cli.launch.boards import StartBoard
from headrace.cli.launch.mesh import mesh
from headrace.cli.launch.up import curl
from headrace.errors import HeadraceError
from headrace.runtime.telemetry.setup import telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from headrace.cli.demo.otlp_receiver import Receiver, Span
    from headrace.cli.launch.mesh import MeshSpec
    from headrace.cli.launch.tiers import TierSpec
    from headrace.client import Client

_SEQUENTIAL = 4  # prompts that are sent one at a time
_CONCURRENT = 6  # of the other prompts
_HTTP_PROMPT = "What is the capital of Italy?"
_HTTP_SECONDS = 60  # for the answer to it
_TRACE_SECONDS = 30.0  # until the last spans have arrived; on an idle machine it takes less than one
_tracer = trace.get_tracer(__name__)


@dataclass(frozen=True)
class Prompt:
    """One line of demo_prompts.jsonl."""

    kind: str
    prompt: str
    max_tokens: int


def prompts() -> list[Prompt]:
    """Read the prompts from the package."""
    text = (importlib.resources.files("headrace.cli.demo") / "demo_prompts.jsonl").read_text("utf-8")
    return [Prompt(**json.loads(line)) for line in text.splitlines()]


async def demo(spec: MeshSpec, console: Console) -> bool:
    """Run the demo, and return whether every answer was complete. Raises BadSpec and ChildDied."""
    began = time.perf_counter()
    async with otlp_receiver() as receiver:
        # The SDK reads its settings from the environment, in this process as in its children.
        os.environ.update(receiver.environment)
        with StartBoard(console) as board:
            started = replace(spec, environment={**spec.environment, **receiver.environment})
            async with mesh(started, on_states=board) as running:
                board.finish()
                since = time.perf_counter() - began
                console.print(f"mesh of {len(running.processes)} processes is ready after {since:.1f} s\n")
                connection = Connection(target=running.address)
                options = ChatOptions(connection=connection, temperature=0.0)
                async with telemetry("client"), connection.open() as client:
                    guide = _Guide(client, options, console, spec)
                    complete = await _tour(guide, prompts(), receiver, console)
                return await call_over_http(running.gateway, console) and complete


async def _tour(guide: _Guide, chosen: Sequence[Prompt], receiver: Receiver, console: Console) -> bool:
    began = time.perf_counter()
    console.print(Rule("one at a time, streamed", align="left"))
    outcomes = [await guide.stream(prompt) for prompt in chosen[:_SEQUENTIAL]]
    console.print(Rule(f"{_CONCURRENT} concurrently, each printed when complete", align="left"))
    slots = asyncio.Semaphore(_CONCURRENT)

    async def one(prompt: Prompt) -> Outcome:
        async with slots:
            return await guide.collect(prompt)

    async with asyncio.TaskGroup() as tasks:
        rest = [tasks.create_task(one(prompt)) for prompt in chosen[_SEQUENTIAL:]]
    outcomes += [task.result() for task in rest]
    if left := unasked(guide.tiers, outcomes):
        console.print(Rule("tiers that none of the prompts needed, asked by name", align="left"))
        outcomes += [await guide.collect(chosen[0], tier) for tier in left]
    summary = summarise(outcomes, time.perf_counter() - began)
    console.print(summary_table(summary))
    await _show_traces(guide, receiver, console)
    return not summary.failures


async def call_over_http(gateway: str, console: Console) -> bool:
    """Send one prompt to the gateway with curl, print command and answer, and return whether it answered."""
    console.print(Rule("the same mesh through OpenAI's API", align="left"))
    command = curl(gateway, _HTTP_PROMPT, "-sS", "--fail-with-body", max_tokens=24, temperature=0)
    console.print(f"$ {shlex.join(command)}", style="bold", markup=False, highlight=False, soft_wrap=True)
    if shutil.which("curl") is None:
        console.print("curl is not installed, so the command is not run", style="yellow")
        return True
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        # A proxy does not reach this machine by its loopback address.
        env={name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
    )
    try:
        async with asyncio.timeout(_HTTP_SECONDS):
            printed, _ = await process.communicate()
    except TimeoutError:
        console.print(f"no answer in {_HTTP_SECONDS} s", style="red")
        return False
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    text = printable(printed.decode(errors="replace")).rstrip()
    console.print(f"{text}\n", markup=False, highlight=False, soft_wrap=True)
    return process.returncode == 0


def arrived(spans: Sequence[Span], trace_ids: Sequence[str], computed: Collection[str]) -> bool:
    """Return whether all spans of these traces have arrived.

    Each process exports its spans at its own time, so a trace can be complete without those of the worker.

    computed   the traces of prompts that received tokens from a worker, and therefore have its spans
    """
    decoded = {span.trace_id for span in spans if span.name == attributes.SPAN_DECODE}
    return all(is_complete(spans, each) and (each in decoded or each not in computed) for each in trace_ids)


async def _show_traces(guide: _Guide, receiver: Receiver, console: Console) -> None:
    """Show one trace per tier: that of the request which shared its batch with the most others."""
    shown = {tier: guide.traces_of(tier) for tier in guide.tiers}
    waited = [trace_id for ids in shown.values() for trace_id in ids]
    try:
        await receiver.wait_for(lambda spans: arrived(spans, waited, guide.computed), timeout=_TRACE_SECONDS)
    except TimeoutError:
        console.print("some spans did not arrive in time", style="yellow")
    for tier, ids in shown.items():
        if ids:
            title = f"one request across all processes: {tier.name}, {tier.described(fake=guide.fake)}"
            console.print(Rule(Text(title), align="left"))
            console.print(trace_tree(receiver.spans, busiest(receiver.spans, ids)))


class _Guide:
    """Sends prompts, prints the answers, and records the trace of each, by the tier that answered it.

    tiers      of the mesh
    fake       whether echo engines replace the models
    computed   the traces of the prompts that received tokens from workers of the mesh
    """

    def __init__(self, client: Client, options: ChatOptions, console: Console, spec: MeshSpec) -> None:
        self._client = client
        self._options = options
        self._console = console
        self.tiers = spec.tiers
        self.fake = spec.fake
        self.computed: set[str] = set()
        self._computing = {tier.name for tier in spec.tiers if tier.computes}
        self._traces: dict[str, list[str]] = defaultdict(list)
        self._alone: set[str] = set()

    def traces_of(self, tier: TierSpec) -> list[str]:
        """Return the traces of the prompts that *tier* answered: those sent concurrently, if any."""
        ids = self._traces[tier.name]
        return [each for each in ids if each not in self._alone] or ids

    async def stream(self, prompt: Prompt) -> Outcome:
        """Send a prompt alone, and print its answer while it is streamed."""
        self._question(prompt)
        outcome = await self._ask(prompt, self._write, alone=True)
        self._write("\n")
        self._figures(outcome)
        return outcome

    async def collect(self, prompt: Prompt, tier: str = "") -> Outcome:
        """Send a prompt, to the tier that is named, and print its answer when it is complete."""
        outcome = await self._ask(prompt, lambda text: None, tier=tier)
        self._question(prompt)
        self._write(f"{outcome.answer.text}\n")
        self._figures(outcome)
        return outcome

    async def _ask(
        self, prompt: Prompt, write: Callable[[str], None], *, tier: str = "", alone: bool = False
    ) -> Outcome:
        answer = Answer()
        options = replace(self._options, max_tokens=prompt.max_tokens, tier=tier)
        request = request_for([("user", prompt.prompt)], options)
        with _tracer.start_as_current_span("demo.prompt", attributes={"demo.kind": prompt.kind}) as span:
            trace_id = f"{span.get_span_context().trace_id:032x}"
            try:
                await follow(self._client, request, answer, timeout=self._options.timeout, write=write)
            except HeadraceError as error:
                return Outcome(prompt.kind, answer, advice(error, self._options.connection.target))
            finally:
                self._traces[answer.tier].append(trace_id)
                if alone:
                    self._alone.add(trace_id)
                if answer.tokens and answer.tier in self._computing:
                    self.computed.add(trace_id)
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

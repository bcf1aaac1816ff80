"""Send the tasks to a default model, with and without enforcement, and print how many answers are right.

    python -m benchmarks.structured.accuracy --model small
    python -m benchmarks.structured.accuracy --model large

A mesh with the one model answers greedily. With enforcement, extraction tasks have `sampling.json_schema`,
and tool tasks `chat.tools`. Without, the same prompt is sent as it is: for tool tasks as the token ids of the
rendered prompt, so that calls arrive as the text that the model wrote. Every answer is in the log, with its
log-probabilities.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.structured.accuracy import drafts
from benchmarks.structured.accuracy.rows import Row
from benchmarks.structured.accuracy.tasks import (
    TASKS,
    Choice,
    Extraction,
    choices,
    extractions,
    written_calls,
)
from headrace import models
from headrace.cli.launch.mesh import MeshSpec, mesh
from headrace.cli.launch.tiers import TierSpec
from headrace.client import Client, chat, connect, gather
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import tokenizer_service_pb2 as tokens

MODELS = {"small": models.SMALL, "large": models.LARGE}
MAX_TOKENS = 160
SIDE_BY_SIDE = 8
ONE_CALL = "required, one call"
EXTRACTING = ("prompt only", "schema")
CHOOSING = ("prompt only", "tools", "required", ONE_CALL)
SYSTEM = "You are a helpful assistant."


def greedy(request: pb.GenerateRequest) -> pb.GenerateRequest:
    """Set what all requests have in common."""
    request.sampling.temperature = 0
    request.sampling.max_tokens = MAX_TOKENS
    request.sampling.logprobs = True
    return request


async def extract(client: Client, task: Extraction, arm: str) -> Row:
    """Answer an extraction task."""
    request = greedy(chat(task.prompt))
    if arm == "schema":
        request.sampling.json_schema = json.dumps(task.schema)
    text, _, logprobs = await answered(client, request)
    return Row(task.id, arm, text, None, logprobs)


async def choose(client: Client, task: Choice, arm: str, *, marked: bool) -> Row:
    """Answer a tool task."""
    request = greedy(chat(task.prompt, system=SYSTEM, tools=task.tools))
    if arm.startswith("required"):
        request.chat.tool_choice.mode = pb.TOOL_MODE_REQUIRED
        request.chat.parallel_tool_calls = arm != ONE_CALL
    if arm == "prompt only":
        asked = tokens.TokenizeRequest(chat=request.chat, tokenizer=tokens.TokenizerChoice(tier="only"))
        ids = (await client.tokenize(asked, timeout=120)).token_ids
        request.token_ids.ids.extend(ids)
        request.routing.tier = "only"
    text, calls, logprobs = await answered(client, request)
    made: list[dict[str, Any]] | None = calls
    if arm == "prompt only":
        made = written_calls(text, marked=marked)
    return Row(task.id, arm, text, made, logprobs)


async def answered(
    client: Client, request: pb.GenerateRequest
) -> tuple[str, list[dict[str, Any]], list[float]]:
    """Return text, calls and log-probabilities of an answer. A call that was cut off has no arguments."""
    events: list[pb.GenerateResponse] = []

    async def read() -> Any:
        async for response in client.generate(request, timeout=1800):
            events.append(response)
            yield response

    reply = await gather(read())
    calls = []
    for call in reply.calls:
        try:
            arguments = json.loads(call.arguments or "{}")
        except ValueError:
            arguments = None
        calls.append({"name": call.name, "arguments": arguments})
    return reply.text, calls, [value for event in events for value in event.delta.logprobs]


async def measure(model: str, log: Path, arms: Sequence[str]) -> list[Row]:
    """Answer the tasks in these ways."""
    spec = MeshSpec(
        cache=models.cache_folder(),
        log_dir=Path(tempfile.mkdtemp(prefix="headrace-accuracy-")),
        tiers=[TierSpec("only", MODELS[model])],
    )
    places = asyncio.Semaphore(SIDE_BY_SIDE)

    async def one(row: Any) -> Row:
        async with places:
            made: Row = await row
        with log.open("a") as file:
            file.write(json.dumps(asdict(made)) + "\n")
        return made

    rows: list[Row] = []
    async with mesh(spec) as running, connect(running.address) as client:
        asked = tokens.GetTokenizerRequest(tokenizer=tokens.TokenizerChoice(tier="only"))
        marked = "<tool_call>" in (await client.get_tokenizer(asked, timeout=60)).chat_template
        for arm in (arm for arm in EXTRACTING if arm in arms):
            rows += await asyncio.gather(*(one(extract(client, task, arm)) for task in extractions()))
        for arm in (arm for arm in CHOOSING if arm in arms):
            tasks = [task for task in choices() if not arm.startswith("required") or task.name is not None]
            rows += await asyncio.gather(*(one(choose(client, task, arm, marked=marked)) for task in tasks))
    return rows


def table(model: str, rows: Sequence[Row]) -> str:
    """Return the figures as a table."""
    lines = ["| model | tasks | form | valid | right | tokens of an answer |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        task = TASKS[row.id]
        kind = "extraction"
        if isinstance(task, Choice):
            kind = "no tool fits" if task.name is None else "a tool fits"
        groups.setdefault((kind, row.arm), []).append(row)
    for (kind, arm), each in groups.items():
        valid = sum(TASKS[row.id].valid(row) for row in each) / len(each)
        right = sum(TASKS[row.id].right(row) for row in each) / len(each)
        mean = sum(len(row.logprobs) for row in each) / len(each)
        shares = f"{100 * valid:.0f} % | {100 * right:.0f} %"
        lines.append(f"| {model} | {kind}, {len(each)} | {arm} | {shares} | {mean:.0f} |")
    return "\n".join(lines)


def read(log: Path) -> list[Row]:
    """Return the answers in a log."""
    names = {field.name for field in fields(Row)}
    every = (json.loads(line) for line in log.read_text().splitlines())
    return [Row(**{name: value for name, value in row.items() if name in names}) for row in every]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--log", type=Path, default=None, help="where to add the answers, as JSON Lines")
    parser.add_argument("--arms", nargs="+", choices={*EXTRACTING, *CHOOSING}, help="only these ways")
    parser.add_argument("--read", type=Path, nargs="+", help="print the tables of earlier logs")
    options = parser.parse_args()
    began = time.monotonic()
    if options.read:
        rows = [row for log in options.read for row in read(log)]
    else:
        log = options.log or Path(tempfile.gettempdir()) / f"headrace-accuracy-{options.model}.jsonl"
        rows = asyncio.run(measure(options.model, log, options.arms or (*EXTRACTING, *CHOOSING)))
        print(f"{time.monotonic() - began:.0f} s; answers in {log}\n")
    print(table(options.model, rows))
    print()
    print(drafts.table(rows))


if __name__ == "__main__":
    main()

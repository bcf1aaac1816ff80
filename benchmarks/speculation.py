"""Measure what speculative decoding gains: `python -m benchmarks.speculation [--model NAME ...]`.

One client asks for answers of exact lengths, each with and without drafts, in turns on the same engine.
The answers must be equal; those with a schema may end earlier. The prompts of a kind are similar requests of
one tenant: an answer may repeat those before it. With `--apart` each is of a tenant of its own, so an answer
repeats only its prompt and itself. No prompt is asked twice of a tenant. Kinds of prompts:

summary     summarise a topic of Python's manual, with quotations
code        edit a function of Python's library
json        write records as JSON, after an example
schema      the same with a JSON schema, whose grammar forces many tokens
chat        the prompts of the serving workload
story       invent a story: at temperature 1 little repeats, so there is little to gain
"""

from __future__ import annotations

import argparse
import inspect
import json
import queue
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serving import workload
from benchmarks.serving.hosts.headrace_engine import load
from headrace import models
from headrace.grammars.forms import json_schema_grammar
from headrace.models.tokenizers.files import read_tokenizer
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.runner import SamplingParams, SequenceSpec, StepReport

TOKENS = 160
TOPICS = ("assert", "booleans", "continue", "exprlists", "slicings")
FUNCTIONS = ("dedent", "fill", "indent", "shorten", "wrap")
CITIES = ("Paris", "Oslo", "Lima", "Cairo", "Delhi", "Quito", "Rome", "Seoul")

STORIES = ("a lighthouse", "two clockmakers", "a lost letter", "the first winter on Mars", "a talking river")

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "kind": {"enum": ["city", "town", "village"]},
        "country": {"type": "string"},
        "coordinates": {
            "type": "object",
            "properties": {"latitude": {"type": "number"}, "longitude": {"type": "number"}},
            "required": ["latitude", "longitude"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "kind", "country", "coordinates"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": json_schema_grammar(
        json.dumps({"type": "array", "items": RECORD, "minItems": len(CITIES)})
    ).text
}


def prompts() -> dict[str, list[str]]:
    """Return the prompts of each kind, without chat template."""
    record = '{"name": "%s", "kind": "city", "country": null, "coordinates": {"latitude": 0, "longitude": 0}}'
    records = [
        f"Write a JSON array with a record for each of these cities: "
        f"{', '.join(CITIES[i:] + CITIES[:i])}.\nEach record looks like this one:\n{record % CITIES[i]}"
        for i in range(5)
    ]
    return {
        "summary": [
            f"Summarise the text, and quote its most important sentences.\n\n{topics[name][:1500]}"
            for name in TOPICS
        ],
        "code": [
            "Rename the variable `text` to `source` in this code, and return all of the code.\n\n```python\n"
            f"{inspect.getsource(getattr(textwrap, name))}```"
            for name in FUNCTIONS
        ],
        "json": records,
        "schema": records,
        "story": [f"Invent a story about {about}." for about in STORIES],
    }


@dataclass(frozen=True)
class Answer:
    """One answer: its tokens, seconds per token after the first one, and its steps' drafts."""

    ids: list[int]
    seconds: float
    drafted: int
    accepted: int


Figures = dict[str, Any]  # of one kind and temperature


class Client:
    """Asks one engine, with or without drafts."""

    def __init__(self, engine: Any, *, speculation: bool) -> None:
        self._reports: queue.Queue[StepReport[int]] = queue.Queue()
        self._loop: EngineLoop[int] = EngineLoop(
            engine, step_tokens=256, prefix_cache=False, speculation=speculation
        )
        self._loop.start(self._reports.put)
        self._asked = 0

    def ask(self, prompt: Sequence[int], params: SamplingParams, tenant: str) -> Answer:
        """Wait for the answer."""
        self._asked += 1
        self._loop.submit(
            SequenceSpec(
                self._asked, list(prompt), len(prompt), params, submitted=time.monotonic(),
                scope=tenant.encode(),
            )
        )  # fmt: skip
        ids: list[int] = []
        drafted = accepted = 0
        first = 0.0
        while True:
            report = self._reports.get()
            drafted, accepted = drafted + report.drafted, accepted + report.accepted
            for update in report.updates:
                if not ids and update.token_ids:
                    first = time.perf_counter()
                ids += update.token_ids
                if update.finish is not None:
                    seconds = (time.perf_counter() - first) / (len(ids) - 1)
                    return Answer(ids, seconds, drafted, accepted)

    def stop(self) -> None:
        """Stop the engine's thread."""
        self._loop.stop()


def measure(
    model: str,
    dtype: str,
    repetitions: int,
    kinds: Sequence[str] | None,
    progress: Callable[[str], None],
    *,
    apart: bool = False,
) -> list[dict[str, Any]]:
    """Measure one model; returns a row of figures per kind and temperature."""
    engine = load(model, dtype, 2, progress)
    cache = models.cache_folder()
    tokenizer = read_tokenizer(models.resolve(model, cache), cache).backend

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    asked: dict[str, list[list[int]]] = {
        kind: [encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n") for text in texts]
        for kind, texts in prompts().items()
    }
    asked["chat"] = [list(request.prompt_ids) for request in workload.load(encode)[:8]]
    plain, speculative = (Client(engine, speculation=on) for on in (False, True))
    rows: list[Figures] = []
    for kind, texts in asked.items():
        if kinds and kind not in kinds:
            continue
        for temperature in (0.0, 1.0):
            pairs: list[tuple[Answer, Answer]] = []
            for repetition in range(repetitions):
                for ids in texts:
                    grammar = GRAMMARS.get(kind, "")
                    params = SamplingParams(
                        seed=repetition, max_tokens=TOKENS, temperature=temperature, ignore_eos=not grammar,
                        grammar=grammar,
                    )  # fmt: skip
                    clients = (plain, speculative) if len(pairs) % 2 else (speculative, plain)
                    tenant = f"{kind} {temperature} {repetition} {len(pairs) if apart else ''}"
                    answers = {client: client.ask(ids, params, tenant) for client in clients}
                    pairs.append((answers[plain], answers[speculative]))
            before, after = ([pair[i].seconds for pair in pairs] for i in (0, 1))
            rows.append(
                {
                    "kind": kind,
                    "temperature": temperature,
                    "tokens_per_s": 1 / statistics.mean(before),
                    "speculative_tokens_per_s": 1 / statistics.mean(after),
                    "gain": statistics.mean(before) / statistics.mean(after),
                    "drafted_per_token": sum(p[1].drafted for p in pairs) / sum(len(p[1].ids) for p in pairs),
                    "accepted_per_token": sum(p[1].accepted for p in pairs)
                    / sum(len(p[1].ids) for p in pairs),
                    "equal": all(p[0].ids == p[1].ids for p in pairs),
                }
            )
            progress(f"{model} {json.dumps(rows[-1])}")
    plain.stop()
    speculative.stop()
    return rows


def main() -> None:
    """Measure all models and print a table of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=[models.SMALL, models.LARGE])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="default: all")
    parser.add_argument("--apart", action="store_true", help="each prompt is of a tenant of its own")
    arguments = parser.parse_args()
    console = Console()
    for model in arguments.model:
        rows = measure(
            model,
            arguments.dtype,
            arguments.reps,
            arguments.kinds,
            console.print,
            apart=arguments.apart,
        )
        table = Table(title=f"{model}: one client, tokens/s after the first token")
        for name in ("kind", "temperature", "plain", "speculative", "gain", "drafted", "accepted", "equal"):
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(
                row["kind"],
                f"{row['temperature']}",
                f"{row['tokens_per_s']:.0f}",
                f"{row['speculative_tokens_per_s']:.0f}",
                f"{row['gain']:.2f}",
                f"{row['drafted_per_token']:.2f}",
                f"{row['accepted_per_token']:.2f}",
                "yes" if row["equal"] else "NO",
            )
        console.print(table)


if __name__ == "__main__":
    main()

"""Let a model answer each schema of the benchmark, with Headrace's engine, and judge the answers.

The model is asked for a value in a chat. It answers at temperature 1, so that it would leave the form if it
could. Each complete answer is judged by `jsonschema`; an answer that reached the most tokens is cut off.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks.serving.hosts.headrace_engine import load, start
from benchmarks.structured.data import Entry, entries, fault
from benchmarks.structured.models import Words
from headrace import models
from headrace.batcher.text.tokens import Tokenizer, load_tokenizer
from headrace.batcher.turns import Turn
from headrace.grammars.checker import Checker
from headrace.grammars.forms import json_schema_grammar
from headrace.grammars.problems import FormProblem
from headrace.worker.runner import FinishReason, SamplingParams, SequenceSpec, StepReport

MAX_TOKENS = 256
_MAX_PROMPT = 1500  # tokens; of a larger schema only the start is in the prompt, as its grammar has all of it


class _Answer:
    """An answer in the making."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.ids: list[int] = []
        self.finish: FinishReason | None = None
        self.fault = ""


def measure(chosen: Sequence[str], limit: int | None) -> dict[str, Any]:
    """Return the figures of each model."""
    return {model: _measure(model, entries(limit)) for model in chosen}


def _measure(model: str, asked: Sequence[Entry]) -> dict[str, Any]:
    cache = models.cache_folder()
    tokenizer = load_tokenizer(models.resolve(model, cache, weights=False), cache)
    grammars, refused, seconds = _checked(tokenizer, asked)
    engine = load(model, "auto", 1, context_length=2048, max_running=16)
    answers = [_Answer(entry) for entry in asked if entry.name in grammars]
    ended, left = threading.Event(), len(answers)
    with Progress() as progress:
        bar = progress.add_task(model, total=len(answers))

        def on_report(report: StepReport[int]) -> None:
            nonlocal left
            for update in report.updates:
                answer = answers[update.key]
                answer.ids += update.token_ids
                if update.finish is not None:
                    answer.finish, answer.fault = update.finish, update.fault
                    progress.advance(bar)
                    left -= 1
                    if not left:
                        ended.set()

        loop = start(engine, on_report)
        began = time.monotonic()
        for key, answer in enumerate(answers):
            loop.submit(_sequence(key, tokenizer, answer.entry, grammars[answer.entry.name]))
        ended.wait()
        took = time.monotonic() - began
        loop.stop()
    return _figures(tokenizer, asked, answers, refused, seconds) | {"seconds": round(took, 1)}


def _checked(
    tokenizer: Tokenizer, asked: Sequence[Entry]
) -> tuple[dict[str, str], dict[str, str], list[float]]:
    """Return the grammars of the schemas, the reasons for refusals, and the seconds of each check."""
    words = Words.of(tokenizer)
    checker = Checker(lambda: (words.tokens[: tokenizer.vocabulary_size], words.specials))
    grammars, refused, seconds = dict[str, str](), dict[str, str](), list[float]()
    checker.start()
    try:
        checker.check(json_schema_grammar("{}").text)  # the process has its vocabulary
        for entry in asked:
            started = time.perf_counter()
            try:
                grammar = json_schema_grammar(entry.schema).text
                checker.check(grammar)
                grammars[entry.name] = grammar
                seconds.append(time.perf_counter() - started)
            except FormProblem as problem:
                refused[entry.name] = problem.about("schema")
    finally:
        checker.close()
    return grammars, refused, seconds


def _sequence(key: int, tokenizer: Tokenizer, entry: Entry, grammar: str) -> SequenceSpec[int]:
    text = f"Write one realistic JSON value that matches this JSON schema.\n\n{entry.schema}"
    ids = tokenizer.encode_chat([Turn("user", text)])
    if len(ids) > _MAX_PROMPT:
        shorter = text[: len(text) * _MAX_PROMPT // len(ids) // 2]
        ids = tokenizer.encode_chat([Turn("user", shorter)])
    params = SamplingParams(seed=key, max_tokens=MAX_TOKENS, temperature=1.0, grammar=grammar)
    return SequenceSpec(key, ids, len(ids), params, submitted=time.monotonic())


def _figures(
    tokenizer: Tokenizer,
    asked: Sequence[Entry],
    answers: Sequence[_Answer],
    refused: dict[str, str],
    seconds: Sequence[float],
) -> dict[str, Any]:
    wrong: dict[str, str] = {}
    complete = [answer for answer in answers if answer.finish is FinishReason.STOP]
    for answer in complete:
        ends = set(tokenizer.special_tokens.values())
        text = tokenizer.decode([id for id in answer.ids if id not in ends])
        if problem := fault(answer.entry.schema, text):
            wrong[answer.entry.name] = f"{text[:300]}: {problem}"
    others = {
        answer.entry.name: answer.fault or str(answer.finish)
        for answer in answers
        if answer.finish not in (FinishReason.STOP, FinishReason.LENGTH)
    }
    return {
        "schemas": len(asked),
        "refused": refused,
        "complete": len(complete),
        "cut": sorted(a.entry.name for a in answers if a.finish is FinishReason.LENGTH),
        "failed": others,
        "wrong": wrong,
        "tokens": sum(len(answer.ids) for answer in answers),
        "check_ms": {f"p{at}": round(float(np.percentile(seconds, at)) * 1e3, 2) for at in (50, 99, 100)},
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the figures as a table in Markdown."""
    yield "| what | " + " | ".join(found) + " |"
    yield "|---|" + "---:|" * len(found)
    rows: dict[str, Callable[[dict[str, Any]], object]] = {
        "schemas": lambda each: each["schemas"],
        "refused": lambda each: len(each["refused"]),
        "complete answers": lambda each: each["complete"],
        "complete answers that do not match": lambda each: len(each["wrong"]),
        f"answers cut at {MAX_TOKENS} tokens": lambda each: len(each["cut"]),
        "failed": lambda each: len(each["failed"]),
        "check of a grammar, p50 / p99 / max, ms": lambda each: " / ".join(
            map(str, each["check_ms"].values())
        ),
    }
    for what, value in rows.items():
        yield f"| {what} | " + " | ".join(str(value(each)) for each in found.values()) + " |"

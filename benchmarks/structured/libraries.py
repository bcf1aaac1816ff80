"""Compare llguidance, as Headrace uses it, with xgrammar on the schemas of the benchmark.

Per library: the schemas that it refuses, the time to compile one, the time of a mask while it follows a value
of the schema token by token, values that match a schema but are rejected, and answers that are accepted but
do not match. The answers are random walks: at each place one of the allowed bytes.

xgrammar compiles with a cache per tokenizer, which is off here, and with one thread, as llguidance.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import llguidance
import llguidance.numpy as masks
import numpy as np
import xgrammar
from rich.progress import track

from benchmarks.structured.data import Entry, entries, fault
from benchmarks.structured.models import MODELS, Words, words_of
from headrace.grammars.checking import first_problem
from headrace.grammars.forms import json_schema_grammar
from headrace.grammars.problems import FormProblem
from headrace.grammars.vocabulary import Vocabulary

WALKS = 10  # of each schema
_WALK_BYTES = 400  # then it is given up
# Of the allowed bytes, these are taken more often: they end strings, lists and objects.
_USUAL = frozenset(b'"}],0123456789abcxyzABC: -T')
_USUAL_SHARE = 0.9


class Refused(Exception):
    """A library does not compile a schema."""


class Matcher(Protocol):
    """Follows one answer."""

    def mask(self) -> None: ...
    def allowed(self) -> Sequence[int]: ...
    def accept(self, token: int) -> bool: ...
    def may_end(self) -> bool: ...


class Library(Protocol):
    """A library, for one vocabulary."""

    def compile(self, schema: str) -> Any: ...
    def matcher(self, compiled: Any) -> Matcher: ...


class Llguidance:
    """llguidance, with the grammars and limits of Headrace."""

    def __init__(self, words: Words) -> None:
        self.vocabulary = Vocabulary(
            words.tokens, specials=words.specials, eos_ids=[words.eos_id], encode=words.encode
        )

    def compile(self, schema: str) -> llguidance.LLMatcher:
        """Compile a schema. Raises Refused."""
        try:
            grammar = json_schema_grammar(schema).text
        except FormProblem as problem:
            raise Refused(f"{problem.message} ({problem.place.rpartition('/')[2]})") from None
        matcher = llguidance.LLMatcher(self.vocabulary.tokenizer, grammar, log_level=0)
        if matcher.is_error() or first_problem(matcher.deep_copy()):
            raise Refused(matcher.get_error().partition("\n")[0])
        return matcher

    def matcher(self, compiled: llguidance.LLMatcher) -> Matcher:
        """Return a matcher at the start."""
        return _LlguidanceMatcher(compiled.deep_copy(), self.vocabulary.size)


class _LlguidanceMatcher:
    def __init__(self, matcher: llguidance.LLMatcher, size: int) -> None:
        self._matcher = matcher
        self._mask = masks.allocate_token_bitmask(1, size)

    def mask(self) -> None:
        masks.fill_next_token_bitmask(self._matcher, self._mask)

    def allowed(self) -> Sequence[int]:
        return _set_bits(self._mask)

    def accept(self, token: int) -> bool:
        return self._matcher.consume_token(token)

    def may_end(self) -> bool:
        return self._matcher.is_accepting()


class Xgrammar:
    """xgrammar, with the separators that Headrace uses and no other white space."""

    def __init__(self, words: Words) -> None:
        info = xgrammar.TokenizerInfo(
            list(words.tokens), xgrammar.VocabType.RAW, stop_token_ids=[words.eos_id]
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._size = info.vocab_size

    def compile(self, schema: str) -> xgrammar.CompiledGrammar:
        """Compile a schema. Raises Refused."""
        try:
            return self._compiler.compile_json_schema(
                schema, any_whitespace=False, separators=(", ", ": "), strict_mode=False
            )
        except Exception as error:
            raise Refused(str(error).strip().rpartition("\n")[2][-120:]) from None

    def matcher(self, compiled: xgrammar.CompiledGrammar) -> Matcher:
        """Return a matcher at the start."""
        return _XgrammarMatcher(xgrammar.GrammarMatcher(compiled), self._size)


class _XgrammarMatcher:
    def __init__(self, matcher: xgrammar.GrammarMatcher, size: int) -> None:
        self._matcher = matcher
        self._mask = np.full((1, -(-size // 32)), -1, dtype=np.int32)

    def mask(self) -> None:
        self._matcher.fill_next_token_bitmask(self._mask)

    def allowed(self) -> Sequence[int]:
        return _set_bits(self._mask)

    def accept(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))

    def may_end(self) -> bool:
        return bool(self._matcher.is_completed())


LIBRARIES: dict[str, type[Llguidance | Xgrammar]] = {"llguidance": Llguidance, "xgrammar": Xgrammar}


@dataclass
class Figures:
    """What one library did with all schemas; times in seconds."""

    refused: dict[str, str] = field(default_factory=dict)
    compile_seconds: list[float] = field(default_factory=list)
    mask_seconds: list[float] = field(default_factory=list)
    values: int = 0
    rejected: dict[str, str] = field(default_factory=dict)
    walks: int = 0
    complete: int = 0
    wrong: dict[str, str] = field(default_factory=dict)

    def table(self) -> dict[str, Any]:
        """Return the figures as numbers and texts, for JSON."""
        return {
            "refused": self.refused,
            "compile_ms": _percentiles(self.compile_seconds, 1e3),
            "mask_us": _percentiles(self.mask_seconds, 1e6),
            "masks": len(self.mask_seconds),
            "values": self.values,
            "values_rejected": self.rejected,
            "walks": self.walks,
            "walks_complete": self.complete,
            "walks_wrong": self.wrong,
            "schemas_with_wrong_walks": len(self.wrong),
        }


def measure(models: Sequence[str] = MODELS, limit: int | None = None) -> dict[str, Any]:
    """Return the figures of each library: times by model, and coverage.

    limit   measure the times of this many schemas, spread over all, which take up to an hour
    """
    every = entries()
    found: dict[str, Any] = {}
    for model in models:
        words = words_of(model)
        for name, library in LIBRARIES.items():
            figures = Figures()
            ready = library(words)
            for entry in track(entries(limit), f"{name}, {model}"):
                _time(ready, entry, words, figures)
            found.setdefault(name, {})[model] = figures.table()
    for name, library in LIBRARIES.items():
        figures = Figures()
        words = words_of("")
        ready = library(words)
        for entry in track(every, f"{name}, coverage"):
            _cover(ready, entry, figures)
        found.setdefault(name, {})["coverage"] = figures.table()
    return found


def _time(library: Llguidance | Xgrammar, entry: Entry, words: Words, figures: Figures) -> None:
    started = time.perf_counter()
    try:
        compiled: Any = library.compile(entry.schema)
    except Refused as problem:
        figures.refused[entry.name] = str(problem)
        return
    figures.compile_seconds.append(time.perf_counter() - started)
    for value in entry.values[:2]:
        matcher = library.matcher(compiled)
        figures.values += 1
        for token in words.encode(value):
            started = time.perf_counter()
            matcher.mask()
            figures.mask_seconds.append(time.perf_counter() - started)
            if not matcher.accept(token):
                figures.rejected[entry.name] = value
                break


def _cover(library: Llguidance | Xgrammar, entry: Entry, figures: Figures) -> None:
    try:
        compiled: Any = library.compile(entry.schema)
    except Refused as problem:
        figures.refused[entry.name] = str(problem)
        return
    for value in entry.values:
        matcher = library.matcher(compiled)
        figures.values += 1
        if not (all(map(matcher.accept, value.encode())) and matcher.may_end()):
            figures.rejected.setdefault(entry.name, value)
    for number in range(WALKS):
        answer = walk(library.matcher(compiled), random.Random(f"{entry.name}-{number}"))
        figures.walks += 1
        if answer is None:
            continue
        figures.complete += 1
        if wrong := fault(entry.schema, answer.decode(errors="replace")):
            figures.wrong.setdefault(entry.name, f"{answer.decode(errors='replace')[:100]}: {wrong}")


def walk(matcher: Matcher, rng: random.Random) -> bytes | None:
    """Return an answer of random bytes among the allowed ones; None if it does not end in time."""
    answer = bytearray()
    while len(answer) < _WALK_BYTES:
        if matcher.may_end() and rng.random() < 0.5:
            return bytes(answer)
        matcher.mask()
        allowed = [id for id in matcher.allowed() if id < 256]
        if not allowed:
            return bytes(answer) if matcher.may_end() else None
        usual = [id for id in allowed if id in _USUAL]
        answer.append(rng.choice(usual if usual and rng.random() < _USUAL_SHARE else allowed))
        if not matcher.accept(answer[-1]):
            return None
    return None


def _set_bits(mask: Any) -> list[int]:
    return [int(id) for id in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))]


def _percentiles(seconds: Sequence[float], unit: float) -> dict[str, float]:
    if not seconds:
        return {}
    return {
        name: round(float(np.percentile(seconds, at)) * unit, 3)
        for name, at in (("p50", 50), ("p99", 99), ("max", 100))
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the figures as a table in Markdown."""
    yield "| what | " + " | ".join(found) + " |"
    yield "|---|" + "---:|" * len(found)
    models = [name for name in next(iter(found.values())) if name != "coverage"]
    count = len(entries())

    def row(what: str, value: Any) -> str:
        return f"| {what} | " + " | ".join(value(figures) for figures in found.values()) + " |"

    yield row(f"schemas refused, of {count}", lambda each: str(len(each["coverage"]["refused"])))
    yield row(
        "schemas with accepted answers that do not match",
        lambda each: str(each["coverage"]["schemas_with_wrong_walks"]),
    )
    yield row("complete random answers", lambda each: str(each["coverage"]["walks_complete"]))
    yield row(
        "schemas with rejected values that match", lambda each: str(len(each["coverage"]["values_rejected"]))
    )
    for model in models:
        yield row(
            f"compile, p50 / p99 / max, ms, {model}",
            lambda each, model=model: " / ".join(
                f"{value:.1f}" for value in each[model]["compile_ms"].values()
            ),
        )
        yield row(
            f"mask of a step, p50 / p99 / max, µs, {model}",
            lambda each, model=model: " / ".join(f"{value:.0f}" for value in each[model]["mask_us"].values()),
        )


def reasons(refused: dict[str, str]) -> Counter[str]:
    """Count the reasons for refusals."""
    return Counter(refused.values())

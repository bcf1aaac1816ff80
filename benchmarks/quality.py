"""Measure the quality of narrower number formats: perplexity and agreement with float32, from logits.

    python -m benchmarks.quality [--model smollm2-135m-instruct ...] [--dtype float32 bfloat16 int8]

There are two kinds of text, both teacher-forced one token at a time, as in decoding: prose, from the topics
of Python's manual (`pydoc_data.topics`, part of every Python); and the greedy answers of the float32 model to
the prompts of the serving workload. Agreement is the share of positions where the most likely next token is
the same as in float32. Whole answers cannot be compared: one near-tie changes all later tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.serving.hosts.headrace_engine import load
from benchmarks.serving.workload import load as load_workload
from benchmarks.stepping import row
from headrace import models
from headrace.batcher.text.tokens import load_tokenizer
from headrace.worker.settings import Settings

ROWS = 16  # texts in one batch


@dataclass(frozen=True)
class Reading:
    """The predictions of a model for texts, with one value per predicted token.

    logprobs   natural logarithm of the probability of the next token
    top        id of the most likely token
    """

    logprobs: torch.Tensor
    top: torch.Tensor


@dataclass(frozen=True)
class Figures:
    """The results of one model in one dtype on one kind of text."""

    model: str
    dtype: str
    text: str
    tokens: int
    perplexity: float
    agreement: float  # with float32, from 0 to 1
    logprob_error: float  # mean absolute difference from float32, in nats


@dataclass(frozen=True)
class Text:
    """Ids to predict, after the first *given* ones, which are only read."""

    ids: Sequence[int]
    given: int


def read(engine: Any, texts: Sequence[Text]) -> Reading:
    """Predict texts with equally many ids to predict, ROWS at a time."""
    room = max(len(text.ids) for text in texts)
    logprobs, top = [], []
    for begin in range(0, len(texts), ROWS):
        chosen = texts[begin : begin + ROWS]
        starts = [0] * len(chosen)
        for ahead in range(len(chosen[0].ids) - chosen[0].given):
            ends = [text.given + ahead for text in chosen]
            rows = [
                row(engine.model, number, start, text.ids[:end], room=room)
                for number, (text, start, end) in enumerate(zip(chosen, starts, ends, strict=True))
            ]
            computed = engine.compute(rows)
            following = torch.tensor([chosen[index].ids[ends[index]] for index in computed.sampling])
            scores = computed.logits.float().cpu().log_softmax(-1)
            logprobs.append(scores.gather(1, following[:, None])[:, 0])
            top.append(scores.argmax(-1))
            starts = ends
    return Reading(torch.cat(logprobs), torch.cat(top))


def compare(model: str, dtype: str, text: str, reading: Reading, reference: Reading) -> Figures:
    """Summarise a reading, compared with that of float32 on the same text."""
    return Figures(
        model=model,
        dtype=dtype,
        text=text,
        tokens=len(reading.top),
        perplexity=math.exp(-reading.logprobs.mean().item()),
        agreement=(reading.top == reference.top).float().mean().item(),
        logprob_error=(reading.logprobs - reference.logprobs).abs().mean().item(),
    )


def prose(encode: Any, count: int, length: int) -> list[Text]:
    """Make *count* texts of *length* tokens from the longest topics of Python's manual."""
    longest = sorted(topics.values(), key=len, reverse=True)[: 4 * count]
    found = [ids[:length] for text in longest if len(ids := encode(text[: 16 * length])) >= length]
    return [Text(ids, given=1) for ids in found[:count]]


def answers(engine: Any, prompts: Sequence[Sequence[int]], length: int) -> list[Text]:
    """Generate greedy answers of *length* tokens, and return them after their prompts."""
    found: list[Text] = []
    for begin in range(0, len(prompts), ROWS):
        given = prompts[begin : begin + ROWS]
        chosen = [list(prompt) for prompt in given]
        starts = [0] * len(chosen)
        room = max(map(len, chosen)) + length
        for _ in range(length):
            rows = [
                row(engine.model, number, start, ids, room=room)
                for number, (ids, start) in enumerate(zip(chosen, starts, strict=True))
            ]
            starts = [len(ids) for ids in chosen]
            for ids, token in zip(chosen, engine.step(rows), strict=True):
                ids.append(token.id)
        found += [Text(ids, len(prompt)) for ids, prompt in zip(chosen, given, strict=True)]
    return found


def measure(
    model: str, dtypes: Sequence[str], threads: int, count: int, length: int, rows: int
) -> list[Figures]:
    """Measure one model; float32 comes first, because the others are compared with it."""
    cache = models.cache_folder()
    tokenizer = load_tokenizer(models.resolve(model, cache), cache)
    texts = {"prose": prose(tokenizer.encode_text, count, length)}
    prompts = [request.prompt_ids for request in load_workload(tokenizer.encode_text)][:count]
    reference: dict[str, Reading] = {}
    kept = []
    for dtype in dict.fromkeys(["float32", *dtypes]):
        engine: Any = load(model, dtype, threads, context_length=1024, max_running=rows)
        if "answers" not in texts:
            texts["answers"] = answers(engine, prompts, length)
        for text, ids in texts.items():
            reading = read(engine, ids)
            kept.append(compare(model, dtype, text, reading, reference.setdefault(text, reading)))
            print(kept[-1], flush=True)
        del engine
        gc.collect()
    return kept


def show(kept: Sequence[Figures]) -> None:
    """Print the table."""
    table = Table(title="quality compared with float32, on the same tokens")
    for heading in ("model", "text", "dtype", "tokens", "perplexity", "same top token", "mean |Δ logprob|"):
        table.add_column(heading, justify="right")
    for each in sorted(kept, key=lambda each: (each.model, each.text)):
        table.add_row(
            *(each.model, each.text, each.dtype, str(each.tokens), f"{each.perplexity:.3f}"),
            *(f"{each.agreement:.2%}", f"{each.logprob_error:.4f}"),
        )
    Console().print(table)


def main() -> None:
    """Parse flags, measure, print, and write build/bench/quality.json."""
    known = [dtype for dtype in get_args(Settings.model_fields["dtype"].annotation) if dtype != "auto"]
    usual = [dtype for dtype in ("bfloat16", "int8") if dtype in known]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", nargs="+", default=[models.SMALL, models.LARGE])
    parser.add_argument("--dtype", nargs="+", choices=known, default=usual, help="float32 is always measured")
    parser.add_argument("--texts", type=int, default=32, help="texts of each kind; default 32")
    parser.add_argument("--length", type=int, default=128, help="tokens of each text; default 128")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    arguments = parser.parse_args()
    kept = []
    for model in arguments.model:
        kept += measure(model, arguments.dtype, arguments.threads, arguments.texts, arguments.length, ROWS)
    show(kept)
    arguments.out.mkdir(parents=True, exist_ok=True)
    out = arguments.out / "quality.json"
    out.write_text(json.dumps([asdict(each) for each in kept], indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    main()

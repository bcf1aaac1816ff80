"""Generate drafts of real models for the questions of `templates.py` through a mesh, and check them.

Each row has a greedy draft with the log-probabilities of its tokens, two sampled answers, and whether each is
right. Rows are written as they are generated, and rows that exist are not generated again.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.routing.questions import Question
from benchmarks.routing.templates import HELD_OUT
from headrace.cli.launch.mesh import MeshSpec, mesh
from headrace.cli.launch.tiers import DEFAULT_TIERS
from headrace.client import Client, chat, connect
from headrace.models import cache_folder
from headrace.v1 import generation_pb2 as pb

FILE = Path(__file__).with_name("drafts.jsonl.gz")
TEMPERATURE = 0.7  # of the samples, the same as the router's
SAMPLES = 2
SIDE_BY_SIDE = 12  # questions at each tier, each with its samples: about 32 sequences


@dataclass(frozen=True)
class Drafted:
    """A draft with its outcome.

    tier       "small" or "large"
    finished   whether the model ended its turn by itself
    logprobs   one per token
    samples    other answers of the same model
    """

    id: str
    family: str
    tier: str
    prompt: str
    draft: str
    finished: bool
    right: bool
    logprobs: tuple[float, ...]
    samples: tuple[str, ...]


def most_tokens(question: Question) -> int:
    """Return the most tokens of an answer."""
    return 400 if question.family in HELD_OUT else 160


async def _say(
    client: Client, question: Question, tier: str, seed: int | None
) -> tuple[str, bool, list[float]]:
    """Return text, whether it is finished, and log-probabilities of an answer; greedy without a *seed*."""
    request = chat(
        question.prompt,
        temperature=0.0 if seed is None else TEMPERATURE,
        max_tokens=most_tokens(question),
        seed=seed or 0,
        logprobs=seed is None,
    )
    request.routing.tier = tier
    logprobs: list[float] = []
    text, finished = "", False
    async with aclosing(client.generate(request, timeout=1800)) as stream:
        async for response in stream:
            text += response.delta.text
            logprobs.extend(round(value, 3) + 0.0 for value in response.delta.logprobs)
            if response.HasField("finish"):
                finished = response.finish.reason == pb.FINISH_REASON_STOP
    return text, finished, logprobs


async def draft(client: Client, question: Question, tier: str) -> Drafted:
    """Generate a draft of the tier's model and its samples."""
    (text, finished, logprobs), *others = await asyncio.gather(
        *(_say(client, question, tier, seed) for seed in (None, *range(1, SAMPLES + 1)))
    )
    right = await asyncio.to_thread(question.right, text)
    return Drafted(
        question.id,
        question.family,
        tier,
        question.prompt,
        text,
        finished,
        right,
        tuple(logprobs),
        tuple(other for other, _, _ in others),
    )


async def generate(questions: Sequence[Question], path: Path, done: Collection[tuple[str, str]] = ()) -> None:
    """Generate drafts of both tiers for all *questions*, and append the rows to *path*.

    done   (question's id, tier) of the rows that exist
    """
    todo = {
        tier: [question for question in questions if (question.id, tier.name) not in done]
        for tier in DEFAULT_TIERS
    }
    needed = [tier for tier, missing in todo.items() if missing]
    began, written = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="headrace-drafts-") as folder:
        spec = MeshSpec(cache=cache_folder(), log_dir=Path(folder), tiers=needed)
        async with mesh(spec) as running, connect(running.address) as client:
            while not all(tier.healthy for tier in (await client.list_tiers()).tiers):
                await asyncio.sleep(0.2)  # the router's last poll may be older than the tier's readiness

            places = {tier.name: asyncio.Semaphore(SIDE_BY_SIDE) for tier in needed}

            async def one(question: Question, tier: str) -> None:
                nonlocal written
                async with places[tier]:
                    row = await draft(client, question, tier)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
                written += 1
                if written % 20 == 0:
                    print(f"{written} drafts in {time.monotonic() - began:.0f} s", flush=True)

            async with asyncio.TaskGroup() as tasks:
                for tier in needed:
                    for question in todo[tier]:
                        tasks.create_task(one(question, tier.name))


def read(path: Path = FILE) -> Iterator[Drafted]:
    """Read the rows of *path*, gzipped or not."""
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8") as lines
    ):
        for line in lines:
            row: dict[str, Any] = json.loads(line)
            yield Drafted(**{**row, "logprobs": tuple(row["logprobs"]), "samples": tuple(row["samples"])})


def pack(rows: Sequence[Drafted], path: Path = FILE) -> None:
    """Write *rows*, in the order of their ids, compressed: always the same bytes for the same rows."""
    lines = [
        json.dumps(asdict(row), ensure_ascii=False) for row in sorted(rows, key=lambda r: (r.id, r.tier))
    ]
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(("\n".join(lines) + "\n").encode())

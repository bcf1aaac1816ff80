"""Route between three tiers that are not ordered, by their chances of success and by the score.

    python -m benchmarks.routing.live_tiers        # about ten minutes on two cores

The tiers are a small chat model, a code model, and a calculator, which is better than both at arithmetic and
useless at everything else. `headrace train` learns each tier's chance of success from questions of
`templates.py`: the outcomes of the models' drafts that this repository has (`generate.py`), and the
calculator's, computed here. The questions of `questions.jsonl`, which no template resembles, are then sent
through a router: to one tier always, by the score, and by the chance of success less the cost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.routing.calculator import calculated, calculator
from benchmarks.routing.generate import read as read_drafts
from benchmarks.routing.questions import Question, load
from benchmarks.routing.templates import HELD_OUT, questions
from headrace.cli.files.training import train
from headrace.cli.launch.mesh import MeshSpec, mesh
from headrace.client import Client, chat, connect
from headrace.models import cache_folder
from headrace.router.__main__ import router
from headrace.router.settings import Settings

RESULTS = Path(__file__).parent / "results" / "tiers.json"
TIERS = ("calculator", "small", "coder")
# Of a million tokens: proportional to the models' parameters; the calculator's are nearly free.
PRICES = {"calculator": 0.001, "small": 0.135, "coder": 0.494}
MAX_TOKENS = 64
SIDE_BY_SIDE = 16


@dataclass(frozen=True)
class Policy:
    """One way to route.

    pin          a tier, or empty
    preference   `quality_preference` of the requests
    flags        of the router, in addition to its tiers
    """

    name: str
    pin: str = ""
    preference: float = 0.5
    flags: tuple[str, ...] = ()


POLICIES = (
    *(Policy(f"always {tier}", pin=tier) for tier in TIERS),
    *(
        Policy(f"score, {share}", flags=("--choose-by", "score", "--share", share))
        for share in ("0.5,0.25", "0.4,0.5", "0.1,0.8")
    ),
    *(
        Policy(f"P(good), preference {preference:g}", preference=preference, flags=("--choose-by", "success"))
        for preference in (0.2, 0.5, 0.8, 1.0)
    ),
)


@dataclass(frozen=True)
class Result:
    """The results of all questions under one policy; *cost* is in the unit of the prices, for a million."""

    policy: str
    accuracy: float
    shares: dict[str, float]
    cost: float
    by_family: dict[str, float]


def training_rows() -> list[dict[str, Any]]:
    """Return the outcomes of all tiers on questions from templates."""
    names = {"small": "small", "large": "coder"}
    by_prompt: dict[str, dict[str, Any]] = {}
    for drafted in read_drafts():
        if drafted.family in HELD_OUT:
            continue
        row = by_prompt.setdefault(drafted.prompt, {"prompt": drafted.prompt})
        row[f"{names[drafted.tier]}_ok"] = drafted.right
        row[f"{names[drafted.tier]}_tokens"] = min(len(drafted.logprobs), MAX_TOKENS)
    for question in questions():
        if question.prompt in by_prompt:
            answer = calculated(question.prompt)
            by_prompt[question.prompt] |= {
                "calculator_ok": question.right(answer),
                "calculator_tokens": len(answer),
            }
    return list(by_prompt.values())


@asynccontextmanager
async def routed(targets: Mapping[str, str], scorer: Path, policy: Policy) -> AsyncGenerator[Client, None]:
    """Run a router in front of the tiers, and yield a client when all of them are healthy."""
    settings = Settings.load(
        program="router",
        arguments=[
            *("--host", "127.0.0.1", "--port", "0"),
            *("--tiers", ",".join(f"{tier}={targets[tier]}" for tier in TIERS)),
            *("--prices", ",".join(f"{tier}={price}/{price}" for tier, price in PRICES.items())),
            *("--scorer", str(scorer), *policy.flags),
        ],
    )
    async with router(settings) as server, connect(f"127.0.0.1:{server.port}") as client:
        async with asyncio.timeout(60):
            while not all(tier.healthy for tier in (await client.list_tiers()).tiers):
                await asyncio.sleep(0.1)
        yield client


async def ask(client: Client, question: Question, policy: Policy) -> tuple[str, bool, float]:
    """Return the tier that answered, whether it was right, and the cost."""
    request = chat(question.prompt, temperature=0, max_tokens=MAX_TOKENS)
    request.routing.tier = policy.pin
    request.routing.quality_preference = policy.preference
    text, tier, cost = "", "", 0.0
    async with aclosing(client.generate(request, timeout=600)) as stream:
        async for response in stream:
            if response.HasField("accepted"):
                tier = response.accepted.tier
            text += response.delta.text
            if response.HasField("finish"):
                cost = response.finish.bill.cost
    return tier, await asyncio.to_thread(question.right, text), cost


async def run(client: Client, policy: Policy, asked: Sequence[Question]) -> Result:
    """Send all questions under one policy."""
    places = asyncio.Semaphore(SIDE_BY_SIDE)

    async def one(question: Question) -> tuple[str, bool, float]:
        async with places:
            return await ask(client, question, policy)

    answers = await asyncio.gather(*map(one, asked))
    rights = [right for _, right, _ in answers]
    families = sorted({question.family for question in asked})
    return Result(
        policy=policy.name,
        accuracy=_mean(rights),
        shares={tier: _mean([other == tier for other, _, _ in answers]) for tier in TIERS},
        cost=1e6 * sum(cost for _, _, cost in answers),
        by_family={
            family: _mean(
                [right for question, right in zip(asked, rights, strict=True) if question.family == family]
            )
            for family in families
        },
    )


async def measure(asked: Sequence[Question]) -> list[Result]:
    """Train the scorer, start the tiers, and run all policies."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-tiers-")))
        rows, scorer = folder / "rows.jsonl", folder / "scorer.json"
        rows.write_text("".join(json.dumps(row) + "\n" for row in training_rows()), encoding="utf-8")
        train(str(rows), scorer, ",".join(TIERS), None, Console())
        spec = MeshSpec(cache=cache_folder(), log_dir=folder / "logs")
        running = await stack.enter_async_context(mesh(spec))
        ports = {
            process.name: f"127.0.0.1:{process.port}"
            for process in running.processes
            if "batcher" in process.name
        }
        targets = {
            "calculator": await stack.enter_async_context(calculator()),
            "small": "+".join(target for name, target in ports.items() if "small" in name),
            "coder": "+".join(target for name, target in ports.items() if "large" in name),
        }
        results = []
        for policy in POLICIES:
            began = time.monotonic()
            async with routed(targets, scorer, policy) as client:
                result = await run(client, policy, asked)
            results.append(result)
            print(f"{_line(result)}  {time.monotonic() - began:5.1f} s", flush=True)
        return results


def _line(result: Result) -> str:
    shares = "  ".join(f"{tier} {100 * share:3.0f} %" for tier, share in result.shares.items())
    return f"{result.policy:26} right {100 * result.accuracy:5.1f} %  {shares}  cost {result.cost:8.1f}"


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, default=0, help="only so many questions; writes nothing")
    arguments = parser.parse_args()
    asked = load()
    if arguments.limit:
        asked = asked[:: max(len(asked) // arguments.limit, 1)]
    results = [asdict(result) for result in asyncio.run(measure(asked))]
    if not arguments.limit:
        content = {"questions": len(asked), "max_tokens": MAX_TOKENS, "prices": PRICES, "results": results}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"results in {RESULTS}")


if __name__ == "__main__":
    main()

"""Send questions to real models through a real mesh, under several routing policies, and check the answers.

    python -m benchmarks.routing.live              # about twenty minutes on two cores
    python -m benchmarks.routing.live --dialogues  # conversations instead of single questions
    python -m benchmarks.routing.live --plot       # draw the figure again from the results

The same questions are sent through router, batchers and workers, greedily, under each policy: one tier for
all, a random choice, the score at several shares of large calls, and the score with drafts that are checked
before release, with and without a sample to compare them with. Thresholds are in a calibration file that
the router reads while it runs.

Conversations are played: each turn of the user is sent with all turns and answers before it, each turn is
routed by itself, and the last answer is checked. They are also routed by the score of the last turn's text
alone, which does not see what the turn refers to.

Cost is from the router's bills, with prices proportional to the models' parameters. Time is for all
questions, with several in parallel; other load on the machine is included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.routing.questions import DIALOGUES, Question, load
from headrace.cli.launch.mesh import MeshSpec, mesh
from headrace.client import Client, chat, connect
from headrace.models import cache_folder
from headrace.routing import calibration
from headrace.routing.calibration import ScoredPrompt
from headrace.routing.drafts.rules import CascadeRules
from headrace.routing.scoring.score import fingerprint
from headrace.routing.scoring.scorer import load as load_scorer

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TIERS = ("small", "large")
# Parameters in billions: the cost of a token is assumed to be proportional to the size of its model.
PRICES = {"small": 0.135, "large": 0.494}
MAX_TOKENS = 64
SIDE_BY_SIDE = 16
SAMPLE_SECONDS = 10.0  # that a draft waits for its sample: the machine is busy, and both have the same length


@dataclass(frozen=True)
class Policy:
    """One way to route.

    share     of questions that the score (or chance) sends directly to the large tier
    pin       "small", "large", "random", "last turn" for the score of that text alone, or "" for the score
    cascade   whether drafts of the small tier are checked
    samples   whether a sample is drawn for each of them
    release   the lowest P(good) at which a draft is released
    """

    name: str
    share: float = 0.0
    pin: str = ""
    cascade: bool = False
    samples: bool = False
    release: float = CascadeRules().min_quality


POLICIES = (
    Policy("always small", pin="small"),
    Policy("always large", share=1.0, pin="large"),
    Policy("random", share=0.5, pin="random"),
    *(Policy("score", share=share) for share in (0.25, 0.5)),
    *(Policy("score + check", share=0.25, cascade=True, release=release) for release in (0.2, 0.4)),
    *(
        Policy("score + check + agreement", share=0.25, cascade=True, samples=True, release=release)
        for release in (0.2, 0.4)
    ),
)

ON_DIALOGUES = (
    Policy("always small", pin="small"),
    Policy("always large", share=1.0, pin="large"),
    Policy("random", share=0.5, pin="random"),
    *(Policy("score of the last turn", share=share, pin="last turn") for share in (0.25, 0.5)),
    *(Policy("score", share=share) for share in (0.25, 0.5)),
)


@dataclass(frozen=True)
class Result:
    """The results of all questions under one policy.

    large_share   share of answers that the large tier gave
    tokens        generated, wasted tokens included
    cost          of all questions, in the unit of the prices
    """

    policy: str
    share: float
    release: float
    accuracy: float
    large_share: float
    tokens: int
    wasted_tokens: int
    seconds: float
    cost: float
    by_family: dict[str, float]


@dataclass
class Reply:
    """The answers to all turns of one question.

    text     of the last answer
    tiers    that answered, by turn
    scores   of the turns
    """

    text: str = ""
    tiers: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    tokens: int = 0
    wasted: int = 0
    cost: float = 0.0


async def ask(client: Client, question: Question, policy: Policy, pins: Sequence[str]) -> Reply:
    """Send every turn of *question*, each to the tier of *pins*; with an empty pin, the router chooses."""
    reply, said = Reply(), list[tuple[str, str]]()
    for turn, pin in zip(question.turns, pins, strict=True):
        said.append(("user", turn))
        request = chat(said, temperature=0, max_tokens=MAX_TOKENS)
        request.routing.tier = pin
        request.routing.cascade = policy.cascade
        reply.text = ""
        async with aclosing(client.generate(request, timeout=600)) as stream:
            async for response in stream:
                if response.HasField("accepted"):
                    reply.tiers.append(response.accepted.tier)
                    reply.scores.append(response.accepted.score)
                reply.text += response.delta.text
                if response.HasField("finish"):
                    reply.tokens += response.finish.usage.completion_tokens
                    reply.wasted += sum(charge.wasted_tokens for charge in response.finish.bill.charges)
                    reply.cost += response.finish.bill.cost
        said.append(("assistant", reply.text))
    return reply


def pins_of(policy: Policy, questions: Sequence[Question]) -> list[list[str]]:
    """Return the tier of each turn of each question; empty where the router chooses."""
    turns = sum(len(question.turns) for question in questions)
    flat = [policy.pin] * turns
    if policy.pin == "random":
        up = round(policy.share * turns)
        flat = ["large"] * up + ["small"] * (turns - up)
        random.Random(7).shuffle(flat)
    elif policy.pin == "last turn":
        scorer = load_scorer()
        scores = [scorer.score(turn).value for question in questions for turn in question.turns]
        point = calibration.for_shares([ScoredPrompt(score) for score in scores], [1, 2], [policy.share])
        flat = [TIERS[score >= point.thresholds[-1]] for score in scores]
    each = iter(flat)
    return [[next(each) for _ in question.turns] for question in questions]


async def run(
    client: Client, policy: Policy, questions: Sequence[Question]
) -> tuple[Result, list[dict[str, Any]]]:
    """Send all questions under one policy; return the figures, and a row per question."""
    began = time.monotonic()
    places = asyncio.Semaphore(SIDE_BY_SIDE)

    async def one(question: Question, pins: Sequence[str]) -> dict[str, Any]:
        async with places:
            reply = await ask(client, question, policy, pins)
        right = await asyncio.to_thread(question.right, reply.text)
        return {"id": question.id, "family": question.family, "right": right, **asdict(reply)}

    pins = pins_of(policy, questions)
    rows = await asyncio.gather(
        *(one(question, each) for question, each in zip(questions, pins, strict=True))
    )
    families = sorted({row["family"] for row in rows})
    result = Result(
        policy=policy.name,
        share=policy.share,
        release=policy.release,
        accuracy=_mean([row["right"] for row in rows]),
        large_share=_mean([tier == TIERS[-1] for row in rows for tier in row["tiers"]]),
        tokens=sum(row["tokens"] + row["wasted"] for row in rows),
        wasted_tokens=sum(row["wasted"] for row in rows),
        seconds=round(time.monotonic() - began, 1),
        cost=sum(row["cost"] for row in rows),
        by_family={
            family: _mean([row["right"] for row in rows if row["family"] == family]) for family in families
        },
    )
    return result, list(rows)


async def calibrate(client: Client, path: Path, rows: Sequence[ScoredPrompt], share: float) -> None:
    """Make the router send the top *share* of these scores to the large tier; wait until it does."""
    point = calibration.for_shares(rows, list(PRICES.values()), [share])
    made = calibration.calibration(TIERS, point, rows, scorer=fingerprint(load_scorer()))
    calibration.save(made, path)
    async with asyncio.timeout(30):
        while True:
            explained = await client.explain(chat("Hello!"))
            if abs(explained.candidates[-1].threshold - made.thresholds[-1]) < 1e-5:
                return
            await asyncio.sleep(0.1)


async def measure(
    questions: Sequence[Question], policies: Sequence[Policy], log: Path | None
) -> list[Result]:
    """Start the mesh and run *policies*; every answer is written to *log* immediately.

    The draft check is configured per router, so policies that differ in it get separate meshes. The scores
    of later turns depend on earlier answers: shares are of the scores that turns had under "always large".
    """
    scorer = load_scorer()
    rows = [ScoredPrompt(scorer.score(question.prompt).value) for question in questions]
    with tempfile.TemporaryDirectory(prefix="headrace-live-") as folder:
        path = Path(folder) / "calibration.json"
        calibration.save(
            calibration.calibration(
                TIERS, calibration.for_shares(rows, [1, 2], [0.5]), rows, scorer=fingerprint(scorer)
            ),
            path,
        )
        prices = ",".join(f"{tier}={price}/{price}" for tier, price in PRICES.items())
        results: list[Result] = []
        answers: dict[str, list[dict[str, Any]]] = {}
        for judged in dict.fromkeys((policy.samples, policy.release) for policy in policies):
            chosen = [policy for policy in policies if (policy.samples, policy.release) == judged]
            samples, release = judged
            spec = MeshSpec(
                cache=cache_folder(),
                log_dir=Path(folder) / "logs",
                flags={
                    "router": [
                        *("--calibration", str(path), "--prices", prices),
                        *("--cascade-min-quality", str(release)),
                        *("--cascade-sample-seconds", str(SAMPLE_SECONDS if samples else 0.0)),
                    ]
                },
            )
            async with mesh(spec) as running, connect(running.address) as client:
                while not all(tier.healthy for tier in (await client.list_tiers()).tiers):
                    await asyncio.sleep(0.2)
                for policy in chosen:
                    if not policy.pin:
                        await calibrate(client, path, rows, policy.share)
                    result, said = await run(client, policy, questions)
                    if policy.pin == TIERS[-1]:
                        rows = [ScoredPrompt(score) for row in said for score in row["scores"]]
                    results.append(result)
                    answers[f"{policy.name} {policy.share:g} {policy.release:g}"] = said
                    _write(log, answers)
                    print(_line(result), flush=True)
    return results


def _write(path: Path | None, content: object) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def plot(results: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Plot accuracy against cost, relative to calling the large tier always."""

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), dpi=120)
    whole = next(r["cost"] for r in results if r["policy"] == "always large")
    marks = {
        **{"always small": "s", "always large": "D", "random": "x"},
        **{"score": "o", "score of the last turn": "P"},
        **{"score + check": "^", "score + check + agreement": "v"},
    }
    for name, mark in marks.items():
        if not any(r["policy"] == name for r in results):
            continue
        points = sorted((r["cost"] / whole, 100 * r["accuracy"]) for r in results if r["policy"] == name)
        axes.plot(
            [cost for cost, _ in points],
            [accuracy for _, accuracy in points],
            mark + ("-" if len(points) > 1 else ""),
            label=name,
            markersize=8,
        )
    ends = [next(r for r in results if r["policy"] == name) for name in ("always small", "always large")]
    axes.plot(
        [end["cost"] / whole for end in ends],
        [100 * end["accuracy"] for end in ends],
        ":",
        color="grey",
        linewidth=1,
    )
    axes.set_xlabel("cost (1 = always large)")
    axes.set_ylabel("answers that were right, %")
    axes.set_title(f"{title}, SmolLM2-135M and Qwen2.5-Coder-0.5B", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)


def _line(result: Result) -> str:
    return (
        f"{result.policy:25} share {result.share:4.2f}  release {result.release:3.1f}  "
        f"right {100 * result.accuracy:5.1f} %  "
        f"by large {100 * result.large_share:5.1f} %  "
        f"tokens {result.tokens:6} (wasted {result.wasted_tokens})  "
        f"{result.seconds:6.1f} s"
    )


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Measure, write the results, draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", action="store_true", help="only draw the figure again")
    parser.add_argument("--dialogues", action="store_true", help="conversations instead of single questions")
    parser.add_argument("--limit", type=int, default=0, help="only so many questions; writes nothing")
    parser.add_argument(
        "--only", default="", help="run only policies of this name, and keep the other results as they are"
    )
    parser.add_argument("--answers", type=Path, help="write every answer to this file, as JSON")
    arguments = parser.parse_args()
    questions = load(DIALOGUES) if arguments.dialogues else load()
    name = "dialogues" if arguments.dialogues else "live"
    results_file, figure = RESULTS / f"{name}.json", RESULTS / f"{name}.png"
    title = f"{len(questions)} {'conversations' if arguments.dialogues else 'questions'}"
    if not arguments.plot:
        if arguments.limit:
            questions = questions[:: max(len(questions) // arguments.limit, 1)]
        known = ON_DIALOGUES if arguments.dialogues else POLICIES
        policies = [policy for policy in known if arguments.only in ("", policy.name)]
        results = [asdict(result) for result in asyncio.run(measure(questions, policies, arguments.answers))]
        if arguments.limit:
            return
        RESULTS.mkdir(exist_ok=True)
        if arguments.only:
            kept = json.loads(results_file.read_text())["results"]
            results = [row for row in kept if row["policy"] != arguments.only] + results
        content = {"questions": len(questions), "max_tokens": MAX_TOKENS, "results": results}
        _write(results_file, content)
    plot(json.loads(results_file.read_text())["results"], figure, title)
    print(f"results in {results_file}, figure in {figure}")


if __name__ == "__main__":
    main()

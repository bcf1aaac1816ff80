"""Measure how conversations are scored: `python -m benchmarks.routing.conversations DATA`.

Conversations are made from prompts of DATA, easy and hard kinds, with replies that were written by hand, and
there are dialogues that were written by hand. Two files hold replies and dialogues: the rules were tuned on
`conversations_tune.jsonl`, and `conversations_held_out.jsonl` is measured only. Prompts, too, are split.
DATA is read as in `data.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.data import Family, families
from headrace.routing.scoring.conversation import Earlier, Turn
from headrace.routing.scoring.score import Score, Scorer
from headrace.routing.scoring.scorer import load

Array = NDArray[np.float64]

_HERE = Path(__file__).parent
EASY = ("nine/trivia", "nine/natural_questions")
HARD = ("nine/math", "rb_mbpp", "arenahard")
_ANSWER = "Here is my answer. It has a first part, a second part and a conclusion."
_OTHER_ANSWER = "Here are three options: A, B and C. Which one do you want me to go on with?"
_DOCUMENT = (
    "The old bridge across the river was begun by the town in 1891 and opened three years later. It was "
    "closed for repair after the flood, and again when the railway came. Local traders had paid for most of "
    "the work, and the council took the tolls for thirty years.\n\n"
)


@dataclass(frozen=True)
class Dialogue:
    """A conversation whose last turn is scored.

    kind       what the last turn is: "follow", "closer", "topic"...
    hard       whether the last turn needs a larger tier
    continued  place of the turn that it continues; None: none
    """

    kind: str
    hard: bool
    turns: list[Turn]
    continued: int | None = None

    @property
    def until_continued(self) -> list[Turn]:
        """The turns up to the one that the last one continues."""
        assert self.continued is not None
        return self.turns[: self.continued + 1]


def written(name: str) -> tuple[dict[str, list[str]], list[Dialogue]]:
    """Return the replies by kind and the dialogues that were written by hand: "tune" or "held_out"."""
    replies: dict[str, list[str]] = {}
    dialogues = []
    for line in (_HERE / f"conversations_{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "phrase" in row:
            replies.setdefault(row["kind"], []).append(row["phrase"])
            continue
        texts = [text.replace("LONGDOC", _DOCUMENT * 8) for text in row["turns"]]
        turns = [Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)]
        follows = row["kind"] in ("follow", "correction")
        continued = row.get("root", len(turns) - 3) if follows else None
        dialogues.append(Dialogue(row["kind"], row["hard"], turns, continued))
    return replies, dialogues


def made(data: dict[str, Family], replies: dict[str, list[str]], *, part: int) -> list[Dialogue]:
    """Return conversations made from prompts of DATA and *replies*.

    part   0 or 1: every second prompt of each family
    """
    easy = [prompt for name in EASY for prompt in data[name].prompts[part:400:2]]
    hard = [prompt for name in HARD for prompt in data[name].prompts[part:300:2]]
    chance = np.random.default_rng(part)
    found = []

    def one(texts: Sequence[str]) -> str:
        return texts[int(chance.integers(len(texts)))]

    def after(prompt: str, *texts: str) -> list[Turn]:
        turns = [Turn("user", prompt)]
        for text in texts:
            turns += [Turn("assistant", one((_ANSWER, _OTHER_ANSWER))), Turn("user", text)]
        return turns

    follows = replies["follow"] + replies["follow_other"]
    for prompts, is_hard in ((easy, False), (hard, True)):
        for place, prompt in enumerate(prompts):
            follow = follows[place % len(follows)]
            found.append(Dialogue("follow", is_hard, after(prompt, follow), 0))
            found.append(
                Dialogue("chain of three", is_hard, after(prompt, one(follows), one(follows), follow), 0)
            )
            correction = one(replies["correction"])
            found.append(Dialogue("correction", is_hard, after(prompt, correction), 0))
            other = one(easy if is_hard else hard)
            found.append(Dialogue("topic", not is_hard, after(prompt, other)))
            if is_hard:
                found.append(
                    Dialogue(
                        "closer", False, after(prompt, replies["closer"][place % len(replies["closer"])])
                    )
                )
                found.append(Dialogue("topic, written", False, after(prompt, one(replies["topic_easy"]))))
    return found


def auc(scores: Array, hard: NDArray[np.bool_]) -> float:
    """Return the probability that a hard turn has a higher score than an easy one."""
    high, low = scores[hard], np.sort(scores[~hard])
    below, up_to = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    return float((below + up_to).mean() / 2 / len(low))


def by_session(scorer: Scorer, turns: Sequence[Turn]) -> Score:
    """Return the score of the last turn if each request has one turn, and the router remembers the rest."""
    earlier, score = None, None
    for turn in turns:
        if turn.role != "user":
            continue
        score = scorer.score_turns([turn], earlier)
        if score.carried is not None:
            carried = score.carried
            earlier = Earlier(carried.score, "", carried.words, carried.estimates)
    assert score is not None, "a conversation has a turn of the user"
    return score


def table(scorer: Scorer, dialogues: Sequence[Dialogue]) -> None:
    """Print the figures of *dialogues*, by kind, in Markdown."""
    scores = np.array([scorer.score_turns(each.turns).value for each in dialogues])
    alone = np.array([scorer.score_turns([each.turns[-1]]).value for each in dialogues])
    hard = np.array([each.hard for each in dialogues])
    kinds = np.array([each.kind for each in dialogues])
    print(
        "| last turn | conversations | hard, mean | easy, mean | distance to what it continues | within 0.1 "
        "| text and session |"
    )
    print("|---|---|---|---|---|---|---|")
    for kind in dict.fromkeys(kinds.tolist()):
        rows = kinds == kind
        means = [f"{scores[rows & side].mean():.2f}" if (rows & side).any() else "" for side in (hard, ~hard)]
        apart = _distances(scorer, [each for each, row in zip(dialogues, rows, strict=True) if row])
        agreed = [
            abs(by_session(scorer, each.turns).value - score)
            for each, score, row in zip(dialogues, scores, rows, strict=True)
            if row and len(each.turns) > 1
        ]
        distance = f"{np.mean(apart):.3f} | {100 * np.mean(np.array(apart) <= 0.1):.0f} %" if apart else " | "
        session = f"{100 * np.mean(np.array(agreed) <= 0.05):.0f} % within 0.05" if agreed else ""
        print(f"| {kind} | {rows.sum()} | {means[0]} | {means[1]} | {distance} | {session} |")
    print(
        f"\nAUC of hard against easy last turns: {auc(scores, hard):.3f}; "
        f"by the last turn alone: {auc(alone, hard):.3f}"
    )


def _distances(scorer: Scorer, dialogues: Sequence[Dialogue]) -> list[float]:
    return [
        abs(scorer.score_turns(each.turns).value - scorer.score_turns(each.until_continued).value)
        for each in dialogues
        if each.continued is not None
    ]


def latency(scorer: Scorer, conversations: Sequence[Sequence[Turn]]) -> tuple[float, float]:
    """Return p50 and p99 of the CPU time of scoring a conversation, in milliseconds."""
    times = []
    for turns in conversations:
        began = time.thread_time()
        scorer.score_turns(turns)
        times.append(1000 * (time.thread_time() - began))
    return float(np.percentile(times, 50)), float(np.percentile(times, 99))


def main() -> None:
    """Print the tables, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with dev/ and train/")
    parser.add_argument(
        "--artifact", type=Path, default=None, help="a scorer file (default: the one that is shipped)"
    )
    parser.add_argument("--tune", action="store_true", help="measure on what the rules were tuned on")
    parser.add_argument("--list", action="store_true", help="list the dialogues that were written by hand")
    arguments = parser.parse_args()
    data, scorer = families(arguments.data), load(arguments.artifact)
    name = "tune" if arguments.tune else "held_out"
    replies, dialogues = written(name)
    print(f"## Written by hand, {name}\n")
    table(scorer, dialogues)
    if arguments.list:
        for each in dialogues:
            apart = _distances(scorer, [each])
            print(
                f"{scorer.score_turns(each.turns).value:.2f} {'hard' if each.hard else 'easy'} "
                f"{each.kind:10} "
                f"{apart[0] if apart else 0:.2f} {each.turns[-1].text[-60:]!r}"
            )
    print(f"\n## Made from prompts and replies, {name}\n")
    conversations = made(data, replies, part=0 if arguments.tune else 1)
    table(scorer, conversations)
    prompts = [[Turn("user", prompt)] for family in (*EASY, *HARD) for prompt in data[family].prompts[:200]]
    long = [
        [
            turn
            for place in range(25)
            for turn in (*prompts[(start + place) % len(prompts)], Turn("assistant", _ANSWER))
        ]
        + [Turn("user", replies["follow"][start % len(replies["follow"])])]
        for start in range(0, len(prompts), 2)
    ]
    follows = replies["follow"]
    chains = [
        [
            *prompts[start],
            *(
                turn
                for place in range(25)
                for turn in (
                    Turn("assistant", _ANSWER * 20),
                    Turn("user", follows[(start + place) % len(follows)]),
                )
            ),
        ]
        for start in range(0, len(prompts), 2)
    ]
    print("\n| CPU time | p50 | p99 |\n|---|---|---|")
    for what, texts in (("prompt", prompts), ("50 turns", long), ("50 turns, all continued", chains)):
        middle, late = latency(scorer, texts)
        print(f"| {what} | {middle:.2f} ms | {late:.2f} ms |")


if __name__ == "__main__":
    main()

"""Send requests, compare every token with the fault-free answer, and count differences."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from headrace import errors
from headrace.client import Client
from headrace.v1 import generation_pb2 as pb
from tests import tables
from tests.faults.dice import Expected, expected

HANG_SECONDS = 20.0  # past the deadline, on a machine that may be busy

# The deadline of a request where deadlines are not tested: generous, for busy machines.
PATIENT_SECONDS = 180.0
TURNS = 10  # the most that `until_affected` makes

HEAD = ("scenario", "requests", "tokens", "moved", "lost", "twice", "wrong", "hung", "failed", "")
ZEROS = ("lost", "twice", "wrong", "hangs", "failed")


@dataclass
class Visit:
    """One request and its result.

    outcome    "stop", "length"... of a whole answer, the reason of an error, "left", or "hang"
    lost       tokens of the fault-free answer that are missing
    twice      tokens that arrived a second time
    wrong      whether the answer differs from the fault-free one; `problem` describes it
    moves      how often it was resumed elsewhere
    first, seconds   until the first token, until the end
    """

    outcome: str = ""
    tokens: int = 0
    lost: int = 0
    twice: int = 0
    wrong: bool = False
    moves: int = 0
    replayed: int = 0
    first: float | None = None
    seconds: float = 0.0
    problem: str = ""
    error: str = ""

    @property
    def whole(self) -> bool:
        """Whether the answer has its finish."""
        return self.outcome in ("stop", "stop_sequence", "length")


async def visit(
    client: Client,
    request: pb.GenerateRequest,
    *,
    timeout: float = PATIENT_SECONDS,
    leaves_after: int | None = None,
    on_token: Callable[[int], None] = lambda count: None,
    judge: Callable[[pb.GenerateRequest, int], Expected] = expected,
    resume: bool = True,
    reads_on: asyncio.Event | None = None,
) -> Visit:
    """Read one answer and compare it with the fault-free one.

    leaves_after   tokens after which the caller cancels
    on_token       called with the number of tokens so far
    reads_on       after its first token the caller stops reading until this is set
    """
    seen = Visit()
    ids: list[int] = []
    text = reasoning = ""
    calls: list[list[str]] = []
    seed = 0
    finish: pb.Finish | None = None
    began = time.monotonic()
    try:
        async with asyncio.timeout(timeout + HANG_SECONDS):
            async with aclosing(client.generate(request, timeout=timeout, resume=resume)) as stream:
                async for response in stream:
                    if finish is not None:
                        seen.wrong = True
                        seen.problem = f"after the finish came {response}"
                    kind = response.WhichOneof("event")
                    if kind == "accepted":
                        seed = response.accepted.seed
                        on_token(0)
                    elif kind == "route_change":
                        seen.moves += 1
                    elif kind == "finish":
                        finish = response.finish
                    elif kind == "delta":
                        delta = response.delta
                        seen.twice += max(len(ids) - delta.offset, 0)
                        seen.lost += max(delta.offset - len(ids), 0)
                        ids += delta.token_ids
                        text += delta.text
                        reasoning += delta.reasoning
                        add_calls(calls, delta)
                        if delta.token_count:
                            if seen.first is None:
                                seen.first = time.monotonic() - began
                            on_token(len(ids))
                            if reads_on is not None:
                                await reads_on.wait()
                        if leaves_after is not None and len(ids) >= leaves_after:
                            seen.outcome = "left"
                            break
    except TimeoutError:
        seen.outcome = "hang"
    except errors.HeadraceError as error:
        seen.outcome = error.reason
        seen.error = f"after {len(ids)} tokens: {error.reason}: {error.message}"
    seen.seconds = time.monotonic() - began
    seen.tokens = len(ids)
    whole = judge(request, seed)
    if finish is not None:
        seen.outcome = pb.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower()
        seen.replayed = finish.usage.replayed_tokens
        seen.lost += max(len(whole.ids) - len(ids), 0)
        came = Expected(ids, text, finish.reason, tuple(map(tuple, calls)), reasoning)  # type: ignore[arg-type]
        right = whole
        if finish.usage.completion_tokens != len(whole.ids):
            seen.wrong = True
    else:
        came = Expected(ids, text, pb.FINISH_REASON_UNSPECIFIED)
        right = Expected(whole.ids[: len(ids)], whole.text[: len(text)], pb.FINISH_REASON_UNSPECIFIED)
    if came != right:
        seen.wrong = True
        seen.problem = f"{request} came as {came}, is {right}"
    return seen


def add_calls(calls: list[list[str]], delta: pb.Delta) -> None:
    """Add the parts of a delta to *calls*, each with id, name and arguments.

    Raises AssertionError for a part that does not follow those before it.
    """
    for part in delta.tool_calls:
        if part.id:
            assert part.index == len(calls), f"call {part.index} follows {len(calls)} calls"
            calls.append([part.id, part.name, ""])
        assert part.index == len(calls) - 1, f"a part of call {part.index} comes after {len(calls)} calls"
        calls[-1][2] += part.arguments


class Streams:
    """Many concurrent answers, and their progress."""

    def __init__(
        self,
        client: Client,
        asked: Sequence[pb.GenerateRequest],
        *,
        timeout: float = PATIENT_SECONDS,
        resume: bool = True,
    ) -> None:
        self.count = len(asked)
        self.most = 0
        self._accepted: set[int] = set()
        self._begun: set[int] = set()
        self._streaming: set[int] = set()
        self._tasks = [
            asyncio.create_task(
                visit(client, one, on_token=self._counting(number), timeout=timeout, resume=resume)
            )
            for number, one in enumerate(asked)
        ]

    def _counting(self, number: int) -> Callable[[int], None]:
        def count(tokens: int) -> None:
            self._accepted.add(number)
            self.most = max(self.most, tokens)
            if tokens:
                self._begun.add(number)
            if tokens >= 5:
                self._streaming.add(number)

        return count

    # A wait ends early if it can no longer succeed: the results then show which answers failed, and why.

    async def accepted(self) -> None:
        """Wait until all are accepted."""
        await self._until(self._accepted, self.count)

    async def reached(self, tokens: int) -> None:
        """Wait until one of them has so many tokens."""
        while self.most < tokens and not all(task.done() for task in self._tasks):
            await asyncio.sleep(0.002)

    async def begun(self) -> None:
        """Wait until all have their first token."""
        await self._until(self._begun, self.count)

    async def streaming(self) -> None:
        """Wait until all are accepted and a third have five tokens."""
        await self.accepted()
        await self._until(self._streaming, self.count / 3)

    async def _until(self, there: set[int], count: float) -> None:
        while len(there) < count:
            pending = sum(not task.done() and number not in there for number, task in enumerate(self._tasks))
            if len(there) + pending < count:
                return
            await asyncio.sleep(0.002)

    async def done(self) -> list[Visit]:
        """Wait until all have ended. Returns their results."""
        return await asyncio.gather(*self._tasks)


@dataclass
class Row:
    """One scenario of the table of faults."""

    scenario: str
    requests: int = 0
    tokens: int = 0
    moved: int = 0
    replayed: int = 0
    lost: int = 0
    twice: int = 0
    wrong: int = 0
    hangs: int = 0
    failed: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, visits: Iterable[Visit], *, may: Iterable[str] = ()) -> None:
        """Count *visits*. Each must be whole, cancelled, or end with one of the reasons in *may*."""
        allowed = {"left", *may}
        for one in visits:
            self.requests += 1
            self.tokens += one.tokens
            self.moved += one.moves
            self.replayed += one.replayed
            self.lost += one.lost
            self.twice += one.twice
            self.wrong += one.wrong
            self.hangs += one.outcome == "hang"
            failed = not (one.whole or one.outcome in allowed or one.outcome == "hang")
            self.failed += failed
            self.outcomes[one.outcome] += 1
            if failed:
                self.problems.append(one.error)
            if one.problem:
                self.problems.append(one.problem)

    @property
    def faults(self) -> dict[str, int]:
        """The counts that must be zero and are not."""
        return {name: getattr(self, name) for name in ZEROS if getattr(self, name)}

    def published(self, title: str) -> tables.Row:
        """Return it as a row of the run's table."""
        cells = (
            *(self.scenario, f"{self.requests:,}", f"{self.tokens:,}", self.moved),
            *(self.lost, self.twice, self.wrong, self.hangs, self.failed, "; ".join(self.notes)),
        )
        values = {**vars(self), "outcomes": dict(self.outcomes)}
        return tables.Row("faults", title, HEAD, [str(cell) for cell in cells], values)

    def check(self) -> None:
        """Fail the test if anything was lost, duplicated, wrong, hung or failed."""
        assert not self.faults, (
            f"{self.scenario}: {self.faults}; outcomes {dict(self.outcomes)}; {self.problems[:3]}"
        )
        assert self.requests, f"{self.scenario}: no request was sent"


def until_affected(row: Row, moved: int = 1) -> Iterator[None]:
    """Iterate over the turns of a scenario, until so many of its answers *moved*; usually one turn.

    On a busy machine the answers may have ended before the fault, which then affects none of them. The
    scenario is then repeated. The differences of all turns count.
    """
    for _ in range(TURNS):
        yield
        if row.moved >= moved:
            return


def mixed(rng: random.Random, count: int, **limits: int) -> list[pb.GenerateRequest]:
    """Return mixed requests: greedy and sampled in turn, with and without seed, penalties and stop texts.

    limits   min_tokens and max_tokens of the answers
    """
    return [request(rng, number, **limits) for number in range(count)]


def request(
    rng: random.Random, number: int, *, min_tokens: int = 20, max_tokens: int = 60, prompt_tokens: int = 40
) -> pb.GenerateRequest:
    """Return one request; even numbers are greedy, odd ones sampled."""
    letters = "abcdefghij klmnop"
    text = f"{number} " + "".join(rng.choice(letters) for _ in range(rng.randint(5, prompt_tokens)))
    sampling = pb.Sampling(max_tokens=rng.randint(min_tokens, max_tokens))
    if number % 2 == 0:
        sampling.temperature = 0
    else:
        sampling.temperature = rng.choice([0.5, 1.0, 1.5])
        sampling.top_p = rng.choice([0.8, 1.0])
        if rng.random() < 0.7:
            sampling.seed = rng.getrandbits(64)
    if rng.random() < 0.3:
        sampling.presence_penalty = 0.5
        sampling.repetition_penalty = 1.1
    if rng.random() < 0.2:
        sampling.stop.append(rng.choice(["zz", "q,", "\n."]))
    sampling.ignore_eos = rng.random() < 0.7
    return pb.GenerateRequest(
        prompt=text,
        sampling=sampling,
        stream=pb.StreamOptions(include_token_ids=True, include_route_changes=True),
    )

"""Workers with vLLM start, drain, die and take over from each other.

The tests share two workers. Each starts those that it needs and that an earlier test has ended.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from headrace import models
from headrace.client import Client, chat
from headrace.v1 import generation_pb2 as pb
from tests.faults.dice import Expected
from tests.faults.fleet import Child, Fleet, fleet
from tests.faults.secured import connect
from tests.faults.tally import Row, visit
from tests.harness import Answer, collect, eventually
from tests.vllm.conftest import START_SECONDS, vllm_plan, worker_flags

TIMEOUT = 600.0
# Threads of two workers that wait for each other on the same cores make steps take seconds.
SHARED_CORES = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
TOKENS = 160
ASKED = 6


@dataclass(frozen=True)
class Pair:
    """Two workers behind one batcher, and what their answers are without faults."""

    fleet: Fleet
    client: Client
    whole: dict[int, Expected]


def asking(seed: int) -> pb.GenerateRequest:
    """Return a request with a greedy answer of TOKENS tokens; *seed* identifies it."""
    request = chat(f"Tell story number {seed} of a miller.", temperature=0, seed=seed, max_tokens=TOKENS)
    request.sampling.ignore_eos = True
    request.stream.include_token_ids = True
    request.stream.include_route_changes = True
    return request


@pytest.fixture(scope="module")
async def pair(
    python: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[Pair, None]:
    # A busy machine must not hand off what a drain could finish.
    flags = worker_flags(folder, "--drain-seconds", "600")
    plan = vllm_plan(python, folder, workers=2, worker_flags=flags, environment=SHARED_CORES)
    logs = tmp_path_factory.mktemp("pair")
    async with fleet(plan, logs) as running, connect(running.target, retries=0) as client:
        answers = await asyncio.gather(
            *(collect(client, asking(seed), timeout=TIMEOUT) for seed in range(1, ASKED + 1))
        )
        whole = {seed: _expected(answer) for seed, answer in enumerate(answers, start=1)}
        yield Pair(running, client, whole)


def _expected(answer: Answer) -> Expected:
    return Expected(answer.ids, answer.text, answer.finish.reason)


async def alive(child: Child) -> None:
    """Start a worker that has ended, and wait until it is ready."""
    if not child.alive:
        await child.start()
    await child.ready(seconds=START_SECONDS)


def family(child: Child) -> list[psutil.Process]:
    """Return the processes that a worker has started, and those that they have."""
    found: list[psutil.Process] = psutil.Process(child.pid).children(recursive=True)
    return found


def engine_core(child: Child) -> psutil.Process:
    """Return the process of a worker in which vLLM computes: the one with the most memory."""
    return max(family(child), key=lambda process: process.memory_info().rss)


async def ended(processes: list[psutil.Process]) -> None:
    """Wait until none of *processes* runs."""
    await eventually(
        lambda: not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    )


async def disturbed(pair: Pair, counted: Row, disturb: Callable[[], object]) -> None:
    """Ask for all answers at once, *disturb* when the first has a quarter of its tokens, and count."""
    longest = 0

    def on_token(count: int) -> None:
        nonlocal longest
        longest = max(longest, count)

    visits = [
        asyncio.create_task(
            visit(
                pair.client,
                asking(seed),
                timeout=TIMEOUT,
                on_token=on_token,
                judge=lambda asked, seed: pair.whole[seed],
            )
        )
        for seed in pair.whole
    ]
    while longest < TOKENS // 4 and not all(one.done() for one in visits):
        await asyncio.sleep(0.01)
    disturb()
    counted.add(await asyncio.gather(*visits))


async def test_the_answers_of_a_killed_worker_continue_at_another(pair: Pair) -> None:
    """Each token arrives once, and the text is that of an answer without faults."""
    counted = Row("SIGKILL of a worker with vLLM")
    victim, other = pair.fleet.workers
    started = family(victim)
    await disturbed(pair, counted, lambda: victim.send(signal.SIGKILL))
    await victim.gone()

    counted.check()
    assert counted.moved > 0, "the kill affected answers"
    assert other.alive
    await ended(started)  # otherwise a restarted worker would lack their memory


async def test_a_worker_whose_engine_process_dies_ends_and_its_answers_continue(pair: Pair) -> None:
    victim, other = pair.fleet.workers
    await asyncio.gather(alive(victim), alive(other))
    await pair.fleet.known()
    counted = Row("SIGKILL of vLLM's engine process")
    started = family(victim)
    await disturbed(pair, counted, engine_core(victim).kill)
    code = await victim.gone()

    counted.check()
    assert counted.moved > 0, "the kill affected answers"
    assert code == 1
    assert other.alive
    await ended(started)


async def test_a_worker_that_is_drained_finishes_its_answers_and_exits_cleanly(pair: Pair) -> None:
    worker = pair.fleet.workers[1]
    await alive(worker)
    started = family(worker)
    counted = Row("SIGTERM of a worker with vLLM")
    other = pair.fleet.workers[0]
    if other.alive:
        await other.kill()
    # The batcher still has the only worker that is left.
    async with asyncio.timeout(START_SECONDS):
        while [load.workers for load in await pair.fleet.loads()] != [1]:
            await asyncio.sleep(0.05)
    await disturbed(pair, counted, lambda: worker.send(signal.SIGTERM))
    code = await worker.gone()

    counted.check()
    assert counted.moved == 0, "all were finished where they were"
    assert code == 0
    assert "Traceback" not in worker.tail()
    await ended(started)


async def failed_start(python: str, tmp_path: Path, *flags: str) -> tuple[int, str]:
    """Start a worker that cannot start. Returns its exit code and its log."""
    child = Child("worker", "headrace.worker", flags, 1, tmp_path / "worker.log", python=python)
    await child.start()
    async with asyncio.timeout(START_SECONDS):
        code = await child.gone()
    return code, child.log.read_text()


async def test_unknown_arguments_of_the_engine_end_the_start_with_their_names(
    python: str, folder: Path, tmp_path: Path
) -> None:
    flags = worker_flags(folder, engine_args="--enforce-eager --no-such-thing 3")
    code, log = await failed_start(python, tmp_path, *flags)

    assert code in (1, 2)
    assert "--no-such-thing" in log
    assert "Traceback" not in log


async def test_arguments_that_the_engine_rejects_end_the_start_with_the_reason(
    python: str, folder: Path, tmp_path: Path
) -> None:
    flags = worker_flags(folder, engine_args="--enforce-eager --max-num-batched-tokens 1")
    code, log = await failed_start(python, tmp_path, *flags)

    assert code == 1
    assert "max_num_batched_tokens" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("model", ["/no/such/folder", ".gguf"])
async def test_a_model_that_vllm_cannot_read_ends_the_start_with_the_reason(
    python: str, tmp_path: Path, model: str
) -> None:
    name = str(models.resolve(models.SMALL)) if model == ".gguf" else model
    cache = str(tmp_path / "cache")  # the usual one may have a folder that was made from the file
    code, log = await failed_start(python, tmp_path, "--engine", "vllm", "--model", name, "--cache", cache)

    assert code == 1
    assert name in log
    assert "Traceback" not in log


async def test_an_environment_without_vllm_ends_the_start_with_what_to_install(tmp_path: Path) -> None:
    code, log = await failed_start(sys.executable, tmp_path, "--engine", "vllm", "--model", str(tmp_path))

    assert code == 1
    assert "vllm" in log
    assert "docs/vllm.md" in log or "pip install" in log
    assert "Traceback" not in log

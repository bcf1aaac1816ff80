"""The figures of the benchmark of the mesh, and the probes that it sets in the services."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.mesh.answers import Answer, at_once, closed_loop, expected, prompt
from benchmarks.mesh.cpu import per_request
from benchmarks.mesh.engine import engine_alone
from benchmarks.mesh.hops import latency
from benchmarks.mesh.memory import Memory
from benchmarks.mesh.paced import Pace, carried, pace
from benchmarks.mesh.probe import sitecustomize
from benchmarks.mesh.profiles import own_samples
from benchmarks.mesh.rates import rates, share, slowest_in_steps
from benchmarks.mesh.stages import STAGES, NoSuchProbe, check_probes, stage_times
from benchmarks.mesh.systems import EngineSpec, in_turn, median_run


def answer(*arrivals: tuple[float, int], began: float = 0.0) -> Answer:
    return Answer(began, list(arrivals), messages=len(arrivals), ended=arrivals[-1][0])


def test_an_answer_repeats_its_prompt_until_it_has_all_tokens() -> None:
    assert expected(7, 40) == "stream 0007 says hello, stream 0007 says"
    assert prompt(7) != prompt(1007)


def test_tokens_of_the_first_message_do_not_count_for_the_time_per_token() -> None:
    gathered = answer((1.0, 4), (3.0, 8), (5.0, 8))

    assert gathered.tokens == 20
    assert gathered.gaps == [2.0, 2.0]
    assert gathered.tpot == 4.0 / 16


def test_an_answer_in_one_message_has_no_gap() -> None:
    assert answer((1.0, 4)).gaps == []
    assert answer((1.0, 4)).tpot == 0.0


def test_rates_are_compared_with_the_engine_alone() -> None:
    alone = rates("engine", 1.0, [answer((1.0, 1), (2.0, 1), (3.0, 1))])
    mesh = rates("mesh", 1.0, [answer((2.0, 1), (4.0, 1), (6.0, 1)), answer((3.0, 3))])

    assert alone.tokens_per_second == 1.0
    assert mesh.ttft_p50 == 2.5
    assert mesh.ttft_max == 3.0
    assert mesh.tokens_per_second == 1.0
    assert share(mesh, alone) == 1.0
    assert slowest_in_steps(mesh, alone) == pytest.approx(1.98), "two streams: almost the slower one"


def test_the_median_run_is_kept() -> None:
    runs = [rates("mesh", 1.0, [answer((1.0, tokens))]) for tokens in (9, 2, 5)]

    assert median_run(runs, lambda run: run.tokens_per_second).tokens == 5


def test_runs_that_others_disturbed_are_kept_only_if_there_are_no_others() -> None:
    quiet = rates("mesh", 1.0, [answer((1.0, 9))])
    disturbed = [rates("mesh", 1.0, [answer((1.0, tokens))], others=1.0) for tokens in (1, 2, 3)]

    assert median_run([quiet, *disturbed], lambda run: run.tokens).tokens == 9
    assert median_run(disturbed, lambda run: run.tokens).tokens == 2


def test_each_system_is_measured_last_equally_often() -> None:
    orders = [in_turn(["engine", "mesh", "before"], repetition) for repetition in range(4)]

    assert [order[-1] for order in orders] == ["before", "engine", "before", "engine"]
    assert all(order[1] == "mesh" for order in orders)


def test_cpu_time_is_divided_by_the_requests() -> None:
    assert per_request({"router": 1.0, "client": 2.0}, {"router": 3.0, "client": 2.5}, 10) == {
        "router": 0.2,
        "client": 0.05,
    }


def test_a_latency_is_counted_from_the_start_of_its_call() -> None:
    found = latency("router", [answer((11.0, 1), (12.0, 15), began=10.0)])

    assert (found.first_p50, found.whole_p99) == (1.0, 2.0)


def test_memory_per_stream_is_what_open_streams_add() -> None:
    assert Memory("mesh", 100, {"router": 50_000}, {"router": 250_000}).per_stream("router") == 2000


def test_a_gap_of_more_than_two_steps_and_a_failure_touch_a_stream() -> None:
    even, late = answer((0.02, 1), (0.05, 1)), answer((0.02, 1), (0.07, 1))

    found = pace("mesh", 4, [even, even, late, None])

    assert (found.untouched, found.failed, found.completed) == (0.5, 1, 4)


def test_streams_are_carried_up_to_the_first_number_with_too_many_touched() -> None:
    paces = [
        Pace("mesh", streams, 100, 0, untouched, 0.0, 0.0)
        for streams, untouched in ((64, 1.0), (128, 0.99), (256, 0.5), (512, 1.0))
    ]

    assert carried(paces) == 128
    assert carried(paces[2:]) == 0


async def test_callers_of_a_closed_loop_make_one_call_after_the_other() -> None:
    calling: set[int] = set()

    async def call(number: int) -> Answer | None:
        assert number not in calling
        calling.add(number)
        await asyncio.sleep(0)
        calling.remove(number)
        return None

    assert len(await closed_loop(3, 0.01, call)) >= 3


async def test_the_engine_alone_answers_all_requests() -> None:
    with engine_alone(EngineSpec(step_seconds=0.0)) as alone:
        answers = await at_once(lambda number: alone.ask(number, 40), 5)

    assert [one.tokens for one in answers] == [40] * 5
    assert all(one.began <= one.first <= one.last <= one.ended for one in answers)


def test_a_function_has_the_samples_in_which_it_is_innermost() -> None:
    stacks = ["main;run;read 3", "main;run 1", "main;run;write;read 4"]

    assert own_samples(stacks) == [("read", 7), ("run", 1)]


def test_the_functions_of_all_stages_exist() -> None:
    check_probes()


def records(missing: str = "") -> dict[str, list[tuple[int, str, str]]]:
    """Return records in which stages end one millisecond apart, each after a stray call of the same name."""
    found: dict[str, list[tuple[int, str, str]]] = {stage.process: [] for stage in STAGES}
    for number, stage in enumerate(STAGES):
        if stage.name != missing:
            found[stage.process] += [
                (-1, stage.target, stage.edge),
                (number * 1_000_000, stage.target, stage.edge),
            ]
    return found


def test_a_stage_lasts_from_the_mark_before_it_to_its_own() -> None:
    times = stage_times(records(), 0, len(STAGES) * 1_000_000)

    assert times == [0.0, *[0.001] * len(STAGES)]


def test_a_mark_that_was_not_reached_is_named() -> None:
    missing = STAGES[7]

    with pytest.raises(NoSuchProbe, match=missing.target):
        stage_times(records(missing.name), 0, len(STAGES) * 1_000_000)


MODULE = """
class Service:
    def plain(self):
        return "plain"

    @staticmethod
    def static():
        return "static"

    async def coroutine(self):
        return "coroutine"

    async def items(self):
        yield 1
        yield 2
"""


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that is imported with probes at all of its functions."""
    (tmp_path / "probed.py").write_text(MODULE)
    names = ("plain", "static", "coroutine", "items")
    finder = sitecustomize.Finder([f"probed:Service.{name}" for name in names])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.setattr(sitecustomize, "records", [])
    monkeypatch.delitem(sys.modules, "probed", raising=False)
    return __import__("probed")


async def test_probed_functions_behave_as_before_and_record_their_calls(service: ModuleType) -> None:
    one = service.Service()

    assert (one.plain(), one.static(), await one.coroutine()) == ("plain", "static", "coroutine")
    assert [item async for item in one.items()] == [1, 2]

    assert [(name.rpartition(".")[2], edge) for _, name, edge in sitecustomize.records] == [
        *(("plain", "in"), ("plain", "out"), ("static", "in"), ("static", "out")),
        *(("coroutine", "in"), ("coroutine", "out")),
        *(("items", "in"), ("items", "out"), ("items", "out")),
    ]


async def test_leaving_a_probed_generator_closes_the_generator_within() -> None:
    closed = []

    async def items() -> AsyncGenerator[int, None]:
        try:
            yield 1
        finally:
            closed.append(True)

    stream = sitecustomize.wrapped(items, "module:items")()
    await anext(stream)
    await stream.aclose()

    assert closed


def test_a_probe_of_a_function_that_does_not_exist_fails() -> None:
    with pytest.raises(AttributeError, match="missing"):
        sitecustomize.wrap(sys.modules[__name__], f"{__name__}:missing")

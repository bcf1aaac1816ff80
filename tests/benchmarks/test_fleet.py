"""The arithmetic of larger meshes: formulas, simulation, costs, and what a card holds."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest

from benchmarks.fleet.processes import Fleet, plan
from benchmarks.fleet.queueing import Unstable, mean_wait, probability_of_waiting, servers_for
from benchmarks.fleet.simulation import Costs, Engine, Load, Mesh, Outcome, simulate


@pytest.mark.parametrize(
    ("servers", "load", "probability"),
    # One server: the load itself. Two: load squared / (2 + load). The others: tables of Erlang C.
    [(1, 0.3, 0.3), (2, 1.0, 1 / 3), (10, 8.0, 0.4092), (100, 90.0, 0.2169)],
)
def test_erlang_c_has_its_known_values(servers: int, load: float, probability: float) -> None:
    assert probability_of_waiting(servers, load) == pytest.approx(probability, abs=1e-4)


def test_a_constant_service_time_halves_the_wait_of_an_exponential_one() -> None:
    assert mean_wait(1, 0.5, 1.0) == pytest.approx(1.0), "M/M/1: load / (1 - load) services"
    assert mean_wait(1, 0.5, 1.0, variation=0.0) == pytest.approx(0.5)


def test_too_much_work_has_no_wait() -> None:
    with pytest.raises(Unstable):
        probability_of_waiting(4, 4.0)


def test_servers_are_added_until_few_enough_requests_wait() -> None:
    servers = servers_for(10.0, 1.0, waiting=0.1)

    assert probability_of_waiting(servers, 10.0) <= 0.1 < probability_of_waiting(servers - 1, 10.0)


def geometric(mean: float, rate: float) -> Load:
    """A load whose answers have lengths without memory, as the formulas assume."""
    return Load(rate, 0, lambda draw: next(n for n in range(1, 10**6) if draw.random() < 1 / mean))


@pytest.mark.parametrize("servers", [1, 4, 8])
def test_a_mesh_that_costs_nothing_waits_as_erlang_c_says(servers: int) -> None:
    """Workers of one slot each are servers. Those with more slots also wait for the end of a step."""
    step, tokens = 0.1, 10.0
    load = geometric(tokens, rate=0.8 * servers / (step * tokens))

    found = simulate(Mesh(workers=servers, engine=Engine(1, step)), load, seconds=9000 / load.rate)

    # The variance of a geometric length is a little less than that of an exponential one.
    expected = mean_wait(servers, load.rate, step * tokens, variation=1 - 1 / tokens)
    assert statistics.fmean(found.waits) == pytest.approx(expected, rel=0.15)
    assert found.running == pytest.approx(0.8, rel=0.05)


def test_a_busy_process_delays_as_a_single_server_does() -> None:
    """Requests of one token each: the batcher sees Poisson arrivals of constant work."""
    work, step, rate = 0.007, 0.0001, 100.0
    mesh = Mesh(workers=20, engine=Engine(4, step), batcher=Costs(request=work))

    found = simulate(mesh, Load(rate, 0, lambda draw: 1), seconds=200.0)

    # The token comes back to the same queue, behind the requests that arrived in the meantime: as many as are
    # there on average, because a departure leaves behind what an arrival finds.
    wait = mean_wait(1, rate, work, variation=0.0)
    behind = rate * (wait + work) * work
    assert statistics.fmean(found.ttfts) == pytest.approx(wait + work + step + behind, rel=0.1)
    assert found.batcher_busy == pytest.approx(rate * work, rel=0.03)


def crowded(*, batchers: int = 1, divided: bool = False) -> Outcome:
    """A mesh of 30 workers, whose messages alone would keep a batcher busy for more than a core."""
    mesh = Mesh(
        workers=30,
        engine=Engine(8, 0.02),
        batchers=batchers,
        divided=divided,
        batcher=Costs(request=0.0005, message=0.0006, token=0.00005),
        router=Costs(request=0.0005, message=0.0001),
    )
    return simulate(mesh, Load(100.0, 0, lambda draw: 50), seconds=10.0, warm_up=3.0)


def test_a_second_batcher_helps_a_saturated_one_if_it_has_its_own_workers() -> None:
    """Where both have all workers, each gets a message of each step of each worker."""
    one, shared, divided = crowded(), crowded(batchers=2), crowded(batchers=2, divided=True)

    assert one.batcher_busy == pytest.approx(1.0, abs=0.02)
    assert shared.batcher_busy > 0.9
    assert divided.batcher_busy < 0.75
    assert divided.ttft(50) < shared.ttft(50)
    assert divided.ttft(50) < one.ttft(50)


def test_a_saturated_process_gathers_tokens_instead_of_falling_behind() -> None:
    """Its own work on requests and tokens must fit in a core; the messages share the rest."""
    saturated = crowded()

    assert saturated.tokens_per_s == pytest.approx(5000, rel=0.1)
    assert saturated.left == 0


def test_the_same_seed_gives_the_same_simulation() -> None:
    assert crowded() == crowded()


def test_nothing_is_lost_in_a_mesh_with_room() -> None:
    mesh = Mesh(workers=3, engine=Engine(8, 0.01, row=0.0001), batchers=2, routers=3)
    lengths = random.Random(7)

    found = simulate(mesh, Load(20.0, 0, lambda draw: lengths.randint(1, 30)), seconds=60.0, warm_up=5.0)

    assert len(found.ttfts) == pytest.approx(20 * 60, rel=0.1)
    assert found.left == 0
    assert max(found.waits) == 0.0
    assert min(found.tpots) > 0.01


def test_each_batcher_knows_all_workers_and_each_router_all_batchers(tmp_path: Path) -> None:
    fleet = Fleet(
        logs=tmp_path,
        workers=2,
        batchers=2,
        routers=1,
        flags={"worker": ["--fake"]},
        own={"worker": {"PYTHONPATH": "/elsewhere"}},
        python=Path("/other/python"),
    )

    workers, batchers, (router,) = plan(fleet, [1, 2, 3, 4, 5], {"HEADRACE_PORT": "9", "PYTHONPATH": "here"})

    assert [process.command[0] for process in workers] == ["/other/python"] * 2
    assert workers[0].command[-1] == "--fake"
    assert workers[0].environment == {"PYTHONPATH": "/elsewhere"}
    assert all("127.0.0.1:1,127.0.0.1:2" in process.command for process in batchers)
    assert "only=127.0.0.1:3+127.0.0.1:4" in router.command
    assert router.environment == {"PYTHONPATH": "here"}

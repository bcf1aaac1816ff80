"""The arithmetic of larger meshes: formulas, simulation, costs, and what a card holds."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fleet import cards, costs, growth
from benchmarks.fleet.__main__ import replaced
from benchmarks.fleet.costs import Cell, Measured, fit, nonnegative_fit, summarize
from benchmarks.fleet.processes import Fleet, plan
from benchmarks.fleet.queueing import Unstable, mean_wait, probability_of_waiting, servers_for
from benchmarks.fleet.simulation import Costs, Engine, Load, Mesh, Outcome, simulate
from benchmarks.mesh.answers import Answer
from benchmarks.serving.peers import REPOSITORY


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

    found = simulate(Mesh(workers=servers, engine=Engine(1, step)), load, seconds=6000 / load.rate)

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
        flags={"worker": ["--engine", "echo"]},
        own={"worker": {"PYTHONPATH": "/elsewhere"}},
        python=Path("/other/python"),
    )

    workers, batchers, (router,) = plan(fleet, [1, 2, 3, 4, 5], {"HEADRACE_PORT": "9", "PYTHONPATH": "here"})

    assert [process.command[0] for process in workers] == ["/other/python"] * 2
    assert workers[0].command[-1] == "echo"
    assert workers[0].environment == {"PYTHONPATH": "/elsewhere"}
    assert all("127.0.0.1:1,127.0.0.1:2" in process.command for process in batchers)
    assert "only=127.0.0.1:3+127.0.0.1:4" in router.command
    assert router.environment == {"PYTHONPATH": "here"}


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    # Parameters by the models' own pages, which round them; keys and values by their configurations.
    [("Qwen3-1.7B", 1.7, 114_688), ("Qwen3-8B", 8.2, 147_456), ("Qwen3-32B", 32.8, 262_144)],
)
def test_weights_and_kv_memory_are_those_of_known_models(name: str, billions: float, kv_bytes: int) -> None:
    (shape,) = (shape for shape in cards.MODELS if shape.name == name)

    assert round(cards.parameters(shape) / 1e9, 1) == billions
    assert cards.weight_bytes(shape) == 2 * cards.parameters(shape)
    assert cards.kv_bytes(shape) == kv_bytes


SMALL, MIDDLE, LARGE = cards.MODELS
L4, H100, H200 = cards.CARDS


def test_a_model_that_does_not_fit_on_a_card_needs_several() -> None:
    assert cards.kv_tokens(MIDDLE, L4) > 0
    assert cards.kv_tokens(LARGE, L4) == 0
    assert cards.fewest_cards(LARGE, L4, 4096) == 4
    assert cards.fewest_cards(LARGE, H100, 4096) == 1


def test_an_engine_over_several_cards_saves_the_copies_of_the_weights() -> None:
    saved = cards.kv_tokens(MIDDLE, H100, 8) - 8 * cards.kv_tokens(MIDDLE, H100)

    assert saved * cards.kv_bytes(MIDDLE) == pytest.approx(7 * cards.weight_bytes(MIDDLE), rel=1e-3)


def test_a_decode_step_reads_the_weights_once_and_the_keys_of_all_sequences() -> None:
    engine = cards.engine(MIDDLE, H100, context=1000)

    read = cards.EFFICIENCY * H100.bandwidth
    assert engine.step - cards.STEP_SECONDS == pytest.approx(2 * MIDDLE.weights / read)
    assert engine.row - cards.ROW_SECONDS == pytest.approx(1000 * cards.kv_bytes(MIDDLE) / read)


def test_tensor_parallelism_shortens_a_step_and_replicas_serve_without_it() -> None:
    each = {layout.engines: layout for layout in cards.layouts(MIDDLE, H100, 8, sequences=8, context=2048)}

    assert list(each) == [1, 2, 4, 8]
    assert each[1].pace > each[2].pace > each[8].pace
    assert each[8].total == pytest.approx(8 * each[8].pace)


def test_sequences_without_room_wait() -> None:
    *_, replicas = cards.layouts(LARGE, H100, 8, sequences=512, context=2048)

    assert replicas.cards_each == 1
    assert replicas.running == 8 * (cards.kv_tokens(LARGE, H100) // 2048) < 512


def test_the_tables_have_all_models_and_cards() -> None:
    table = cards.markdown()

    assert all(table.count(f"| {shape.name} |") == len(cards.CARDS) for shape in cards.MODELS)
    assert "4 x L4, 24 GB" in table
    assert cards.layouts_markdown().count("| 8 x 1 |") == len(cards.LAYOUTS)


def test_a_table_of_a_page_is_replaced() -> None:
    page = "before\n<!-- one -->\n\nold\n\n<!-- end -->\nbetween\n<!-- two -->\n<!-- end -->\n"

    found = replaced(page, "one", "| new |\n")

    assert found == page.replace("old", "| new |")
    assert replaced(found, "two", "x\n").endswith("<!-- two -->\n\nx\n\n<!-- end -->\n")
    with pytest.raises(ValueError, match="three"):
        replaced(page, "three", "")


def test_the_page_has_all_computed_tables_and_they_are_current() -> None:
    page = (REPOSITORY / "docs" / "scaling.md").read_text()

    assert replaced(page, "cards", cards.markdown()) == page
    assert replaced(page, "layouts", cards.layouts_markdown()) == page


def measured(requests: float, messages: float, tokens: float, workers: int = 1, *, idle: float) -> Measured:
    """A cell with CPU times of known costs."""
    busy = 0.001 * requests + 0.0002 * messages + 0.00001 * tokens + idle * workers
    used = {"router": busy, "batcher": busy}
    return Measured(
        Cell(workers, 1 if requests else 0, 0.1), 1.0, requests, tokens, messages, 0.1, 0.1, 0.1, used, 0.0
    )


def test_costs_are_found_again() -> None:
    cells = [
        measured(requests, messages, tokens, workers, idle=0.0001)
        for requests, messages, tokens, workers in (
            *((0, 0, 0, 1), (10, 50, 640, 1), (10, 10, 640, 10), (40, 50, 640, 1), (10, 50, 5000, 50)),
            (0, 0, 0, 50),
        )
    ]

    found, idle = fit(cells, "batcher")

    assert (found.request, found.message, found.token) == pytest.approx((0.001, 0.0002, 0.00001))
    assert idle == pytest.approx(0.0001)
    written = json.loads(json.dumps(costs.as_json(cells)))
    assert costs.costs_of(written, "batcher") == found
    assert costs.cells_of(written) == cells


def test_a_busy_machine_is_reported_below_the_table() -> None:
    quiet = measured(10, 50, 640, idle=0.0)

    assert "Not a quiet machine" not in costs.markdown([quiet], "a machine")
    assert "up to 1.5 cores" in costs.markdown([quiet, replace(quiet, others=1.5)], "a machine")


def test_no_cost_is_negative() -> None:
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])

    assert nonnegative_fit(rows, np.array([3.0, 2.0, 1.0]))[1] == 0.0


def test_what_reaches_beyond_the_window_is_not_counted() -> None:
    answers = [
        Answer(0.0, [(at, 2) for at in (0.5, 1.5, 2.5, 3.5)], 4, ended=3.5),
        Answer(1.0, [(1.5, 1), (1.9, 1)], 2, ended=1.9),
    ]

    found = summarize(Cell(3, 1, 0.4), [*answers, None], 1.0, 3.0, {"router": 0.1, "batcher": 0.2}, 0.0)

    assert found.failed == 1
    assert found.requests == 0.5, "one of the two ended within the two seconds"
    assert found.tokens == (2 + 2 + 1 + 1) / 2
    assert found.messages == pytest.approx(3 / 0.4), "each of three workers sends one in a step"
    kind, tokens = found.saturates()
    assert kind == "batcher"
    assert tokens == pytest.approx(15.0)


def test_a_worker_takes_as_many_requests_as_its_pace_allows() -> None:
    engine = Engine(slots=256, step=0.005, row=0.0001, prompt_token=0.00001)
    workload = growth.Workload(prompt=500, answer=100, pace=0.02)

    rate = growth.capacity(engine, workload)
    rows = rate * workload.answer * workload.pace

    # A step decodes its rows, and prefills the prompts that arrive during a step.
    prompts = rate * workload.pace * workload.prompt
    assert engine.step + rows * engine.row + prompts * engine.prompt_token == pytest.approx(workload.pace)
    assert growth.capacity(Engine(8, 0.005, 0.0001, 0.00001), workload) == pytest.approx(8 / 2.0)


def test_more_load_needs_more_of_each() -> None:
    engine, each = cards.engine(MIDDLE, H100, context=640), Costs(0.0005, 0.0002, 0.000005)
    needs = [growth.need(rate, engine, growth.Workload(), each, each) for rate in (1, 10, 100, 1000)]

    assert needs[0].workers == needs[0].batchers == needs[0].routers == 1
    for less, more in itertools.pairwise(needs):
        assert (less.workers, less.batchers, less.routers) <= (more.workers, more.batchers, more.routers)
    assert needs[-1].batcher_cores / needs[-1].batchers <= growth.BUSY


def test_the_table_of_growth_has_a_row_for_each_rate() -> None:
    each = Costs(0.0005, 0.0002, 0.000005)

    table = growth.markdown(growth.grow(MIDDLE, H100, growth.Workload(answer=16), [5, 50], each, each))

    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| 5", "| 50"]

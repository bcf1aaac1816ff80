"""`headrace bench` as a whole: in this process, and as a command."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from headrace.cli.__main__ import app
from headrace.cli.bench import report
from headrace.cli.bench.backends.openai import OpenAiOptions
from headrace.cli.bench.bench import (
    FAILED,
    INTERRUPTED,
    NOT_MET,
    USAGE,
    BenchOptions,
    Measured,
    TargetFailed,
    check,
    measure,
    result_of,
)
from headrace.cli.bench.figures import NAMED
from headrace.cli.bench.objectives import parse_objective
from headrace.cli.bench.options import BadOption, Load
from headrace.cli.bench.plot import draw
from headrace.cli.bench.prompts import ListedPrompts, Prompt
from headrace.cli.bench.synthetic import SyntheticPrompts
from headrace.cli.calls.connection import Connection
from tests.cli.bench.servers import Write, chunk, serving, words
from tests.cli.bench.test_figures import VLLM, VLLM_DETAILED
from tests.cli.test_end_to_end import ENVIRONMENT, HEADRACE
from tests.harness import PATIENCE, Mesh, eventually, running_mesh

PROMPTS = ListedPrompts([Prompt((("user", f"prompt number {number}"),)) for number in range(8)], max_tokens=6)
CLOSED = Load(concurrency=4, requests=12)


@pytest.fixture(scope="module")
async def mesh() -> AsyncGenerator[Mesh, None]:
    async with running_mesh() as running:
        yield running


def options(mesh: Mesh | None = None, url: str = "", **others: Any) -> BenchOptions:
    target = f"127.0.0.1:{mesh.port}" if mesh else ""
    given = {"prompts": PROMPTS, "loads": [CLOSED], **others}
    openai = OpenAiOptions(url=url) if url else None
    return BenchOptions(connection=Connection(target=target), openai=openai, **given)


def silent() -> Console:
    return Console(file=io.StringIO(), width=80)


async def results(given: BenchOptions) -> list[dict[str, Any]]:
    measured = Measured()
    await measure(given, measured, silent())
    assert measured.backend is not None
    return [result_of(given, measured.backend, load, run) for load, run in measured.runs]


async def test_a_mesh_is_measured(mesh: Mesh) -> None:
    objective = parse_objective("failed<=0", NAMED)

    (result,) = await results(options(mesh, warmup=3, detailed=True, objectives=[objective], label="mine"))

    assert set(result) >= VLLM | VLLM_DETAILED
    assert (result["completed"], result["num_prompts"], result["failed"]) == (12, 12, 0), (
        "no warm-up is counted"
    )
    assert (result["backend"], result["label"], result["model_id"]) == ("headrace", "mine", "echo")
    assert result["objectives"] == {"failed<=0": True}
    assert result["generated_texts"] == ["prompt"] * 12
    assert result["latencies_from"] == "sent"


async def test_a_url_is_measured_with_several_rates() -> None:
    loads = [Load(rate=500.0, requests=5), Load(rate=1000.0, requests=7)]
    async with serving() as server:
        made = await results(options(url=server.url, loads=loads))

    assert [(one["completed"], one["request_rate"], one["num_prompts"]) for one in made] == [
        (5, 500.0, 5),
        (7, 1000.0, 7),
    ]
    assert made[0]["backend"] == "openai-chat"
    assert made[0]["latencies_from"] == "planned"
    assert made[0]["total_output_tokens"] == 30
    assert len(server.bodies) == 13, "one test request comes first"
    assert server.bodies[0]["max_tokens"] == 1


async def test_synthetic_prompts_have_the_length_that_the_server_counts(mesh: Mesh) -> None:
    """The echo engine counts characters, another server words: both are measured first."""
    prompts = SyntheticPrompts(input_len=400, max_tokens=1, output_len=7, prefix_len=100)

    (result,) = await results(options(mesh, prompts=prompts))
    async with serving() as server:
        (other,) = await results(options(url=server.url, prompts=prompts))

    assert result["total_input_tokens"] / 12 == pytest.approx(500, rel=0.1)
    assert other["total_input_tokens"] / 12 == pytest.approx(500, rel=0.01)
    assert result["total_output_tokens"] == other["total_output_tokens"] == 12 * 7


async def test_each_load_has_its_own_synthetic_prompts() -> None:
    loads = [Load(concurrency=1, requests=3), Load(concurrency=3, requests=3)]
    async with serving() as server:
        await results(options(url=server.url, prompts=SyntheticPrompts(20, 2), loads=loads, warmup=2))

    sent = [body["messages"][0]["content"] for body in server.bodies]
    assert len(sent) == len(set(sent)) == 2 + 2 * (2 + 3)


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        ({"status": 401, "error": {"message": "who?"}}, FAILED, "who.; give a key with --api-key"),
        ({"status": 400, "error": {"message": "bad field"}}, USAGE, "bad field.*--extra-body"),
        ({"status": 404, "error": {"message": "no model"}}, USAGE, "no model; check --url"),
        ({"status": 503, "error": {"message": "full"}}, FAILED, "HTTP 503: full"),
    ],
)
async def test_a_target_that_rejects_the_test_request_is_explained(
    answer: dict[str, Any], status: int, message: str
) -> None:
    async with serving(**answer) as server:
        with pytest.raises(TargetFailed, match=message) as raised:
            await results(options(url=server.url))

    assert raised.value.status == status


async def test_an_unknown_tier_is_a_wrong_option(mesh: Mesh) -> None:
    with pytest.raises(TargetFailed, match="see `headrace tiers`") as raised:
        await results(options(mesh, tier="huge"))

    assert raised.value.status == USAGE


async def test_what_was_measured_before_an_interruption_is_a_result() -> None:
    async def first_ones_only(body: dict[str, Any], write: Write) -> None:
        if len(server.bodies) > 6:
            await write(chunk("a"))
            await asyncio.Event().wait()
        await words(body, write)

    measured = Measured()
    async with serving(first_ones_only) as server:
        given = options(url=server.url)
        running = asyncio.create_task(measure(given, measured, silent()))
        await eventually(lambda: len(server.bodies) == 10 and server.in_flight == 4)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    (load, run) = measured.runs[0]
    assert measured.backend is not None
    result = result_of(given, measured.backend, load, run)
    assert (result["completed"], result["failed"], result["unfinished"]) == (5, 0, 4)
    printed = io.StringIO()
    report.show(result, [99], Console(file=printed, width=80))
    assert "Unfinished requests:" in printed.getvalue()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"json": Path("/nowhere/a.json")}, "--json /nowhere/a.json: there is no folder"),
        ({"json": Path("/tmp")}, "--json /tmp is a folder"),
        ({"plot": Path("/tmp")}, "--plot /tmp is a folder"),
        ({"plot": Path("a.xyz")}, "must end in .png, .svg"),
        ({"plot": Path("/nowhere/a.png")}, "--plot /nowhere/a.png: there is no folder"),
        (
            {"chat_api": False, "prompts": ListedPrompts([Prompt((("user", "a"), ("user", "b")))], 1)},
            "prompt 1 has several messages, which need --endpoint chat",
        ),
    ],
)
def test_what_would_fail_at_the_end_is_noticed_first(given: dict[str, Any], message: str) -> None:
    check(options())
    with pytest.raises(BadOption, match=message):
        check(options(**given))


async def test_a_table_has_the_words_of_vllm_and_fits_eighty_columns(mesh: Mesh) -> None:
    loads = [
        Load(rate=1000.0, requests=5, max_concurrency=3),
        Load(rate=2000.0, requests=5, max_concurrency=3),
    ]
    objectives = [parse_objective("failed<=2", NAMED), parse_objective("p99_ttft_ms<=0", NAMED)]
    both = await results(options(mesh, loads=loads, goodput={"ttft": 9.0}, objectives=objectives))
    both[0] |= {"failed": 2, "errors_by_kind": {"HTTP 503 busy": 2}}
    printed = io.StringIO()
    console = Console(file=printed, width=80)

    report.show(both[0], [50, 90, 95, 99], console)
    report.show_objectives(both[0], objectives, console)
    report.show_sweep(both, objectives, console)

    text = printed.getvalue()
    assert "…" not in text
    for name in (
        *("Successful requests:", "Failed requests:", "HTTP 503 busy:", "Maximum request concurrency:"),
        *("Request rate configured (RPS):", "Benchmark duration (s):", "Total input tokens:"),
        *("Total generated tokens:", "Request throughput (req/s):", "Request goodput (req/s):"),
        *("Output token throughput (tok/s):", "Peak output token throughput (tok/s):"),
        *(
            "Peak concurrent requests:",
            "Total token throughput (tok/s):",
            "TTFT",
            "TPOT",
            "ITL",
            "E2EL",
            "P99",
        ),
        *("Client queue", "pass: failed<=2 (2)", "fail: p99_ttft_ms<=0 (", "2000", "cached input tokens"),
    ):
        assert name in text, name


def test_notes_say_what_distorts_the_figures() -> None:
    calm = {"bottleneck": False, "cpu_share": 0.1, "lag_p99_ms": 0.1, "late_p99_ms": None}
    busy = {"bottleneck": True, "cpu_share": 0.95, "lag_p99_ms": 30.0, "late_p99_ms": 50.0}
    late = {**busy, "cpu_share": 0.2}

    def notes(completed: int, generator: dict[str, Any], counted: str = "server") -> str:
        return "\n".join(
            report.notes({"completed": completed, "generator": generator, "output_tokens_from": counted})
        )

    assert notes(100, calm) == ""
    assert "only 99 requests" in notes(99, calm)
    assert "50.0 ms late (P99) and used 95% of a core; reduce the load" in notes(100, busy)
    assert "other processes use" in notes(100, late)
    assert "each message with text counts as one token" in notes(100, calm, "messages")


async def test_the_bar_shows_tokens_only_in_a_terminal(mesh: Mesh) -> None:
    shown, hidden = io.StringIO(), io.StringIO()
    for file, terminal in ((shown, True), (hidden, False)):
        console = Console(file=file, force_terminal=terminal, width=100)
        await measure(options(mesh, loads=[Load(concurrency=1, seconds=0.3)]), Measured(), console)

    assert "tok/s" in shown.getvalue()
    assert hidden.getvalue() == ""


async def test_pictures_are_drawn(mesh: Mesh, tmp_path: Path) -> None:
    loads = [CLOSED, Load(concurrency=2, requests=4)]
    given, measured = options(mesh, loads=loads), Measured()
    await measure(given, measured, silent())
    assert measured.backend is not None
    made = [result_of(given, measured.backend, load, run) for load, run in measured.runs]
    runs = [run for _, run in measured.runs]

    draw(runs, made, tmp_path / "several.svg")
    draw(runs[:1], made[:1], tmp_path / "one.png")

    assert b"<svg" in (tmp_path / "several.svg").read_bytes()[:1000]
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words_given", "message"),
    [
        (["--url", "http://h/v1", "--target", "h:1"], "either --url or --target"),
        (["--url", "http://h/v1", "--tier", "small"], "--tier is for a mesh"),
        (["--header", "a: b"], "--header and --extra-body need --url"),
        (["--save-detailed"], "--save-detailed needs --json"),
        (["--slo", "p99_tft_ms<=3"], "did you mean p99_ttft_ms"),
        (["--slo", "goodput_share>=0.9"], "needs the limits of --goodput"),
        (["--goodput", "ttft"], "must be limits in ms"),
        (["--percentiles", "x"], "numbers from 0 to 100"),
        (["--concurrency", "x"], "must be a number from 1"),
        (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
        (["--url", "h/v1"], "must start with http"),
    ],
)
def test_a_wrong_option_is_explained(words_given: list[str], message: str) -> None:
    outcome = CliRunner().invoke(app, ["bench", *words_given], env={"COLUMNS": "300", "OPENAI_API_KEY": ""})

    assert outcome.exit_code == USAGE, outcome.output
    assert message in outcome.stderr


async def command(*words_given: str, interrupt_when: Any = None) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *HEADRACE,
        "bench",
        *words_given,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRONMENT,
    )
    if interrupt_when is not None:
        await eventually(interrupt_when)
        process.send_signal(signal.SIGINT)
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_command_measures_a_mesh_and_judges_it(mesh: Mesh, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    target = (
        "--target",
        f"127.0.0.1:{mesh.port}",
        "--requests",
        "20",
        "--max-tokens",
        "4",
        "--json",
        str(path),
    )

    status, out, err = await command(*target, "--slo", "failed<=0", "--slo", "p99.5_e2el_ms<=0")

    assert (status, err) == (NOT_MET, "")
    assert "pass: failed<=0 (0)" in out
    assert "fail: p99.5_e2el_ms<=0" in out
    result = json.loads(path.read_text())
    assert (result["completed"], result["max_concurrency"]) == (20, 8)
    assert result["p99.5_e2el_ms"] > 0
    assert "ttfts" not in result, "lists need --save-detailed"


async def test_a_sweep_is_a_list_of_results_up_to_the_load_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "result.json"

    async def eleven(body: dict[str, Any], write: Write) -> None:
        if len(server.bodies) <= 11:
            await words(body, write)

    async with serving(eleven) as server:
        status, out, err = await command(
            *("--url", server.url, "--concurrency", "1,2,3", "--requests", "4", "--json", str(path)),
            *("--warmup", "1", "--save-detailed"),
        )

    assert status == FAILED
    assert "stream ended early" in err
    assert "2 requests at a time" in out
    first, second = json.loads(path.read_text())
    assert (first["max_concurrency"], second["max_concurrency"]) == (1, 2)
    assert first["generated_texts"] == ["word " * 128] * 4


async def test_ctrl_c_prints_what_was_measured() -> None:
    async def first_ones_only(body: dict[str, Any], write: Write) -> None:
        if len(server.bodies) > 4:
            await asyncio.Event().wait()
        await words(body, write)

    async with serving(first_ones_only) as server:
        status, out, err = await command(
            *("--url", server.url, "--concurrency", "2", "--warmup", "0"),
            interrupt_when=lambda: len(server.bodies) == 6 and server.in_flight == 2,
        )

    assert status == INTERRUPTED
    assert "stopping..." in err
    assert re.search(r"Successful requests: +3\n", out)


async def test_without_a_target_the_command_fails_with_a_status_of_its_own() -> None:
    status, out, err = await command("--target", "127.0.0.1:1")

    assert (status, out) == (FAILED, "")
    assert "no mesh at 127.0.0.1:1; start one with `headrace up`" in err


async def test_if_no_request_is_completed_the_command_fails() -> None:
    async def first_only(body: dict[str, Any], write: Write) -> None:
        if len(server.bodies) == 1:
            await words(body, write)

    async with serving(first_only) as server:
        status, out, err = await command("--url", server.url, "--requests", "3", "--warmup", "0")

    assert status == FAILED
    assert "stream ended early:" in out
    assert "no request was completed: stream ended early" in err

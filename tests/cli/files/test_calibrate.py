"""The commands `headrace calibrate`, `feedback` and `top`."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from headrace.cli.calls.amounts import money
from headrace.cli.calls.top import Snapshot, screen
from headrace.cli.files.calibrate import read_traffic
from headrace.client import chat
from headrace.routing import calibration
from headrace.routing.scoring import scorer
from headrace.routing.scoring.score import fingerprint
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing
from tests.harness import collect, running_mesh
from tests.router.fake_batchers import FakeBatcher, routed

PROMPTS = [
    "Hello!",
    "What is the capital of France?",
    "Translate 'good morning' into Spanish.",
    "Explain step by step why the sky is blue and compare it with Mars.",
    "Write a Python function that merges two sorted lists, with unit tests.",
    "Prove that there are infinitely many primes.",
]


async def headrace(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "headrace.cli", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await asyncio.wait_for(process.communicate(), 180)
    return process.returncode or 0, printed.decode()


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def test_traffic_becomes_a_file_that_a_router_loads(tmp_path: Path) -> None:
    traffic = write(tmp_path / "traffic.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    out = tmp_path / "calibration.json"

    status, printed = await headrace("calibrate", str(traffic), "--share", "0.33", "--out", str(out))

    assert status == 0, printed
    assert "chosen" in printed
    assert "only 6 rows" in printed
    made = calibration.load(out)
    assert made.shares[1] == pytest.approx(1 / 3, abs=0.01)
    async with routed({"calibration": out}, small=FakeBatcher(), large=FakeBatcher()) as client:
        tiers = [(await client.explain(chat(prompt))).tier for prompt in PROMPTS]
    assert tiers.count("large") == 2


def test_conversations_are_scored_like_by_a_router(tmp_path: Path) -> None:
    turns = [("user", PROMPTS[-1]), ("assistant", "Shall I write it out?"), ("user", "yes")]
    messages = [{"role": role, "content": text} for role, text in turns]
    traffic = write(tmp_path / "traffic.jsonl", [{"prompt": PROMPTS[-1]}, {"messages": messages}])

    hard, follows = read_traffic(traffic, scorer.load(), ["small", "large"], Console(file=io.StringIO()))

    assert follows.score == pytest.approx(hard.score, abs=0.02)


async def test_a_wanted_quality_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows: list[dict[str, object]] = [
        {"prompt": prompt, "small_ok": place < 3, "large_ok": True} for place, prompt in enumerate(PROMPTS)
    ]
    traffic = write(tmp_path / "labelled.jsonl", rows)
    out, png = tmp_path / "calibration.json", tmp_path / "curve.png"

    status, printed = await headrace(
        *("calibrate", str(traffic), "--quality", "1", "--out", str(out), "--png", str(png))
    )

    assert status == 0, printed
    assert "of the gap" in printed
    assert calibration.load(out).shares[1] == pytest.approx(0.5, abs=0.2)
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--share", "0.3", "--quality", "0.5"], "one of --share and --quality"),
        ([], "one of --share and --quality"),
        (["--share", "lots"], "numbers separated by commas"),
        (["--quality", "0.9"], "needs labels"),
        (["--share", "2"], "add up to at most 1"),
        (["--share", "nan"], "add up to at most 1"),
        (["--share", "0.3", "--costs", "1,inf"], "one number for each"),
        (["--share", "0.3", "--tiers", "a,a"], "needs two or more names"),
        (["--share", "0.1", "--tiers", "a,b,c"], "3 tiers need 2 shares"),
    ],
)
async def test_what_cannot_be_done_is_explained(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    traffic = write(tmp_path / "traffic.jsonl", [{"prompt": prompt} for prompt in PROMPTS])

    status, printed = await headrace(
        "calibrate", str(traffic), "--out", str(tmp_path / "out.json"), *arguments
    )

    assert status == 2
    assert complaint in printed
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("flag", "name"), [("--out", "nowhere/c.json"), ("--png", "nowhere/c.png"), ("--png", "c.foo")]
)
async def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, flag: str, name: str) -> None:
    traffic = write(tmp_path / "traffic.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    files = {"--out": str(tmp_path / "out.json"), flag: str(tmp_path / name)}

    status, printed = await headrace(
        "calibrate", str(traffic), "--share", "0.3", *(word for pair in files.items() for word in pair)
    )

    assert status == 2
    assert f"error: {tmp_path / name} cannot be written: " in printed


async def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    traffic = tmp_path / "traffic.jsonl"
    traffic.write_bytes('{"prompt": "Grüße"}'.encode("latin-1"))

    status, printed = await headrace("calibrate", str(traffic), "--share", "0.3")

    assert status == 2
    assert f"{traffic} is not UTF-8 text" in printed


async def test_an_invalid_line_is_named(tmp_path: Path) -> None:
    traffic = tmp_path / "traffic.jsonl"
    traffic.write_text('{"prompt": "Hello!"}\nHello!\n')

    status, printed = await headrace("calibrate", str(traffic), "--share", "0.3")

    assert status == 2
    assert "line 2" in printed


def test_outcomes_of_one_prompt_are_merged_and_incomplete_ones_are_ignored(tmp_path: Path) -> None:
    """`Feedback` writes a row for each outcome."""
    traffic = write(
        tmp_path / "feedback.jsonl",
        [
            {"prompt": "Hello!", "small_ok": 1.0},
            {"prompt": "Hello!", "large_ok": 0.5},
            {"prompt": "Bye!", "small_ok": 0.0},
        ],
    )

    rows = read_traffic(traffic, scorer.load(), ["small", "large"], Console(quiet=True))

    assert [row.quality for row in rows] == [(1.0, 0.5)]


def test_a_prompt_may_hold_what_looks_like_a_line_end_to_python(tmp_path: Path) -> None:
    traffic = tmp_path / "traffic.jsonl"
    traffic.write_text('{"prompt": "one\u2028two\x85three"}\n{"prompt": "four"}\n', encoding="utf-8")

    assert len(read_traffic(traffic, scorer.load(), ["small", "large"], Console(quiet=True))) == 2


async def test_feedback_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    async with running_mesh(router_settings={"feedback": path}) as mesh:
        answer = await collect(mesh.client, chat("Hello!"))
        target = f"127.0.0.1:{mesh.port}"
        told = await headrace("feedback", answer.accepted.answer_id, "--not-ok", "--target", target)
        by_request = ("--request-id", answer.accepted.request_id)
        repeated = await headrace("feedback", *by_request, "--not-ok", "--target", target)
        unnamed = await headrace("feedback", "--ok", "--target", target)
        unknown = await headrace("feedback", "who", "--ok", "--target", target)
        owned = chat("Hello!")
        owned.routing.tenant = "A"
        id = (await collect(mesh.client, owned)).accepted.answer_id
        others = await headrace("feedback", id, "--ok", "--target", target)
        own = await headrace("feedback", id, "--ok", "--tenant", "A", "--target", target)
        again = await headrace("feedback", id, "--not-ok", "--tenant", "A", "--target", target)
        top = await headrace("top", "--once", "--target", target)

    assert own == repeated == (0, "tier small: kept\n")
    assert unnamed == (2, "error: give the id of the answer, or --request-id\n")
    assert (others[0], again[0]) == (1, 1)
    assert "UNKNOWN_REQUEST" in others[1]
    assert "rated before, with 1" in again[1]
    assert told == (0, "tier small: kept\n")
    assert unknown[0] == 1
    assert "UNKNOWN_REQUEST" in unknown[1]
    assert [json.loads(row)["small_ok"] for row in path.read_text().splitlines()] == [0, 1]
    assert top[0] == 0
    assert "no prices" in top[1]


def test_top_shows_shares_waste_and_what_was_saved() -> None:
    now = routing.ListTiersResponse(
        tiers=[routing.Tier(name="small", model="s", healthy=True), routing.Tier(name="large", model="l")],
        bill=pb.Bill(
            charges=[
                pb.Charge(
                    tier="small",
                    answers=3,
                    prompt_tokens=800,
                    cached_tokens=200,
                    completion_tokens=300,
                    wasted_tokens=70,
                    cost=0.25,
                ),
                pb.Charge(tier="large", answers=1, completion_tokens=100, cost=0.5),
            ],
            cost=0.75,
            largest_tier_cost=1.0,
        ),
    )
    before = routing.ListTiersResponse()
    before.CopyFrom(now)
    before.bill.charges[0].answers = 1
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(screen(Snapshot(2.0, now), Snapshot(0.0, before)))
    printed = console.export_text()

    lines = [line.split() for line in printed.splitlines()]
    assert ["small", "3", "1.0", "75%", "800", "25%", "300", "70", "0.2500"] in lines
    assert ["large", "1", "0.0", "25%", "0", "-", "100", "0", "0.5000"] in lines
    assert "saved 25%" in printed
    assert "unhealthy" in printed


def test_top_shows_the_load_to_callers_that_may_not_see_the_bill() -> None:
    now = routing.ListTiersResponse(tiers=[routing.Tier(name="small", healthy=True)])

    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(screen(Snapshot(0.0, now)))
    shown = console.export_text()

    assert "small" in shown
    assert "administrators" in shown
    assert "cost" not in shown, "no figures of nothing"


def test_small_sums_keep_their_digits() -> None:
    assert [money(amount) for amount in (0, 12.3, 0.0042, 0.0000012)] == [
        "0.00",
        "12.30",
        "0.0042",
        "1.2e-06",
    ]


def test_the_fingerprint_is_the_same_each_time() -> None:
    assert fingerprint(scorer.load()) == fingerprint(scorer.load())

"""Prompts are scored, drafts checked and the scorer refitted from files, without a mesh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from headrace.cli.__main__ import app
from headrace.routing.drafts.check import DraftChecker
from headrace.routing.scoring.scorer import LearnedScorer

runner = CliRunner()


def rows_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_explain_scores_each_row_in_order_with_reasons(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.jsonl",
        [{"id": "easy", "prompt": "Hello!"}, {"id": 7, "prompt": "Prove that $n^3-n$ is divisible by 6."}],
    )

    result = runner.invoke(app, ["explain", "--jsonl", path])

    assert result.exit_code == 0, result.output
    easy, hard = rows_of(result.output)
    assert (easy["id"], hard["id"]) == ("easy", 7)
    assert easy["score"] < hard["score"]
    assert (easy["tier"], hard["tier"]) == ("small", "large")
    assert "mathematics" in hard["reason"]
    assert set(hard) == {"id", "score", "tier", "reason", "latency_ms"}


def test_explain_scores_the_last_turn_of_a_conversation_and_names_what_it_inherits(tmp_path: Path) -> None:
    hard = "Prove that $n^3-n$ is divisible by 6, and that this holds for every integer n."

    def messages(*texts: str) -> list[dict[str, str]]:
        roles = ["user", "assistant"] * len(texts)
        return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]

    path = write(
        tmp_path / "in.jsonl",
        [
            {"prompt": "Yes, go on."},
            {"messages": messages(hard, "Shall I write it out?", "Yes, go on.")},
            {"messages": messages(hard, "Here it is.", "Thank you!")},
        ],
    )

    alone, follows, thanks = rows_of(runner.invoke(app, ["explain", "--jsonl", path]).output)

    assert [row["tier"] for row in (alone, follows, thanks)] == ["small", "large", "small"]
    assert "of the turns that it continues" in follows["reason"]
    assert "turn:inherited" in follows["reason"]
    assert "turn:" not in thanks["reason"]


def test_explain_reads_standard_input_and_accepts_any_number_of_tiers() -> None:
    text = (
        json.dumps({"prompt": "Hello!"})
        + "\n\n"
        + json.dumps({"prompt": "Solve $x^2 = 4$ for all x."})
        + "\n"
    )

    result = runner.invoke(
        app, ["explain", "--jsonl", "-", "--tiers", "s,m,l", "--thresholds", "0.01,0.02"], input=text
    )

    assert [(row["id"], row["tier"]) for row in rows_of(result.output)] == [(1, "l"), (3, "l")]


def test_check_orders_drafts_by_how_much_they_need_a_larger_tier(tmp_path: Path) -> None:
    prompt = "Ann has 4 bags of 6 apples and eats 3. How many apples are left?"
    path = write(
        tmp_path / "in.jsonl",
        [
            {"id": "right", "prompt": prompt, "draft": "4 * 6 = 24 and 24 - 3 = 21. The answer is 21."},
            {"id": "wrong", "prompt": prompt, "draft": "4 * 6 = 26 and 26 - 3 = 23. The answer is 23."},
            {"id": "sorry", "prompt": prompt, "draft": "I'm sorry, I cannot tell.", "finished": False},
        ],
    )

    result = runner.invoke(app, ["check", "--jsonl", path])

    right, wrong, sorry = rows_of(result.output)
    assert right["score"] < wrong["score"] < sorry["score"]
    assert wrong["reasons"]


def test_check_reads_log_probabilities_and_samples_where_rows_have_them(tmp_path: Path) -> None:
    row = {"prompt": "What is 17 + 25?", "draft": "It is 42."}
    path = write(
        tmp_path / "in.jsonl",
        [
            {"id": "agree", **row, "samples": ["42", "The sum is 42."]},
            {"id": "differ", **row, "samples": ["41", "The sum is 32."]},
            {"id": "sure", **row, "logprobs": [-0.01] * 5},
            {"id": "unsure", **row, "logprobs": [-1.5] * 5},
        ],
    )

    agree, differ, sure, unsure = rows_of(runner.invoke(app, ["check", "--jsonl", path]).output)

    assert agree["score"] < differ["score"]
    assert sure["score"] < unsure["score"]
    assert differ["reasons"]


@pytest.mark.parametrize("text", ["Calculate --3 + 5", "-$-5", "so = -\u00a05", "9" * 5000, "\ud800 = --1"])
def test_a_check_accepts_any_text(tmp_path: Path, text: str) -> None:
    rows = [
        {"id": 1, "prompt": f"How many are {text}?", "draft": f"2 * 3 {text}", "samples": [text]},
        {"id": 2, "prompt": text, "draft": text, "samples": [text, "5"]},
    ]
    path = write(tmp_path / "in.jsonl", rows)

    checked = runner.invoke(app, ["check", "--jsonl", path])
    explained = runner.invoke(app, ["explain", "--jsonl", path])

    for result in (checked, explained):
        assert result.exit_code == 0, result.output
        assert [row["id"] for row in rows_of(result.output)] == [1, 2]
        assert all(0 <= row["score"] <= 1 for row in rows_of(result.output))


def test_a_row_that_cannot_be_judged_or_scored_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*texts: object, **evidence: object) -> None:
        raise ValueError("a secret")

    path = write(tmp_path / "in.jsonl", [{"prompt": "a", "draft": "b"}, {"prompt": "c", "draft": "d"}])
    with monkeypatch.context() as patched:
        patched.setattr(DraftChecker, "check", broken)
        checked = rows_of(runner.invoke(app, ["check", "--jsonl", path]).output)
    score = LearnedScorer.score
    monkeypatch.setattr(
        LearnedScorer, "score", lambda self, text: broken() if text == "a" else score(self, text)
    )
    explained = rows_of(runner.invoke(app, ["explain", "--jsonl", path]).output)

    assert [(row["score"], row["good"]) for row in checked] == [(None, None)] * 2
    assert checked[0]["reasons"] == ["the draft could not be checked (ValueError)"]
    assert explained[0]["score"] == 0.5
    assert "could not be scored (ValueError)" in explained[0]["reason"]
    assert "reads as" in explained[1]["reason"]


@pytest.mark.parametrize("logprob", [10**400, None, "x", float("nan")])
def test_check_requires_log_probabilities_to_be_numbers(tmp_path: Path, logprob: object) -> None:
    path = write(tmp_path / "in.jsonl", [{"prompt": "a", "draft": "b", "logprobs": [-0.1, logprob]}])

    result = runner.invoke(app, ["check", "--jsonl", path])

    assert result.exit_code == 2
    assert "'logprobs' must be a list of numbers" in result.stderr


@pytest.mark.parametrize("samples", ["42", [42], {}])
def test_check_requires_samples_to_be_texts(tmp_path: Path, samples: object) -> None:
    path = write(tmp_path / "in.jsonl", [{"prompt": "a", "draft": "b", "samples": samples}])

    result = runner.invoke(app, ["check", "--jsonl", path])

    assert result.exit_code == 2
    assert "'samples' must be a list of strings" in result.stderr


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: a row must be an object"),
        ('{"id": "a"}', "line 2: a row needs field 'prompt', a string, or 'messages', a list"),
        ('{"id": "a", "prompt": 3}', "line 2: field 'prompt' must be a string"),
        ('{"id": [], "prompt": "a"}', "line 2: field 'id'"),
        ('{"messages": []}', "line 2: field 'messages' must be a list"),
        ('{"messages": [{"role": "user"}]}', "line 2: messages[0] must be an object with 'role'"),
    ],
)
def test_a_bad_line_is_named_and_ends_the_run(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "Hello!"}\n' + line + "\n")

    result = runner.invoke(app, ["explain", "--jsonl", str(path)])

    assert result.exit_code == 2
    assert complaint in result.stderr


@pytest.mark.parametrize("command", [["explain", "--jsonl"], ["check", "--jsonl"]])
def test_files_and_artifacts_that_cannot_be_used_are_named(tmp_path: Path, command: list[str]) -> None:
    nothing = str(tmp_path / "nothing.jsonl")
    assert "nothing.jsonl cannot be read" in runner.invoke(app, [*command, nothing]).stderr

    path = write(tmp_path / "in.jsonl", [{"prompt": "a", "draft": "b"}])
    result = runner.invoke(app, [*command, path, "--artifact", path])

    assert result.exit_code == 2
    assert "in.jsonl" in result.stderr


def test_explain_requires_a_prompt_or_a_file() -> None:
    assert "give either a prompt" in runner.invoke(app, ["explain"]).stderr


def test_train_writes_an_artifact_that_explain_uses(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(200):
        hard = bool(rng.random() < 0.5)
        about = (
            "the court, the plaintiff and the statute" if hard else "the garden, the cake and the sunshine"
        )
        gained = bool(rng.random() < (0.6 if hard else 0.05))
        rows.append({"prompt": f"Say {number} words about {about}.", "small_ok": not gained, "large_ok": 1})
    out = tmp_path / "mine.json"

    result = runner.invoke(app, ["train", write(tmp_path / "rows.jsonl", rows), "--out", str(out)])

    assert result.exit_code == 0, result.output
    assert "before" in result.output
    assert "after" in result.output
    asked = write(
        tmp_path / "in.jsonl",
        [
            {"prompt": "Say 9 words about the garden, the cake and the sunshine."},
            {"prompt": "Say 9 words about the court, the plaintiff and the statute."},
        ],
    )
    shipped = rows_of(runner.invoke(app, ["explain", "--jsonl", asked]).output)
    mine = rows_of(runner.invoke(app, ["explain", "--jsonl", asked, "--artifact", str(out)]).output)
    assert mine[1]["score"] - mine[0]["score"] > shipped[1]["score"] - shipped[0]["score"] + 0.05


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "no rows"),
        ([{"prompt": "a", "small_ok": 0, "large_ok": 1}], "too few"),
        ([{"prompt": "a", "small_ok": 2, "large_ok": 1}], "'small_ok' must be a number from 0 to 1"),
        ([{"prompt": "a"}], "one of the fields 'small_ok', 'large_ok' is required"),
        ([{"prompt": "a", "small_ok": 1}], "no prompt has both"),
        ([{"prompt": f"{n}", "small_ok": 1, "large_ok": 1} for n in range(50)], "no better"),
    ],
)
def test_rows_without_information_are_rejected_and_nothing_is_written(
    tmp_path: Path, rows: list[dict[str, Any]], complaint: str
) -> None:
    out = tmp_path / "mine.json"

    result = runner.invoke(app, ["train", write(tmp_path / "rows.jsonl", rows), "--out", str(out)])

    assert result.exit_code == 2
    assert complaint in result.stderr
    assert not out.exists()


def test_train_merges_the_rows_of_each_tier(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n} and {n}?", "cheap_ok": n % 3 > 0} for n in range(60)]
    rows += [{"prompt": f"What is {n} and {n}?", "dear_ok": 0.9} for n in range(50)]
    path, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "mine.json"

    result = runner.invoke(app, ["train", path, "--out", str(out), "--tiers", "cheap,dear"])

    assert result.exit_code == 0, result.output
    assert "10 prompts ignored" in result.output
    assert "50 prompts, cross-validated" in result.output
    assert out.exists()


@pytest.mark.parametrize("command", ["explain", "check"])
def test_a_byte_order_mark_and_other_line_ends_are_not_part_of_a_row(command: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "draft": "b"}\r\n\r\n{"prompt": "a", "draft": "b"}\r\n')

    for source, given in ((str(path), ""), ("-", path.read_bytes())):
        result = runner.invoke(app, [command, "--jsonl", source], input=given)

        assert result.exit_code == 0, result.output
        assert [row["id"] for row in rows_of(result.output)] == [1, 3]


@pytest.mark.parametrize("command", ["explain", "check"])
def test_a_lone_surrogate_is_accepted(command: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [{"id": "\ud800", "prompt": "a\udfff", "draft": "\udfff"}])

    result = runner.invoke(app, [command, "--jsonl", path])

    assert result.exit_code == 0, result.output
    assert rows_of(result.output)[0]["id"] == "\ud800"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[" * 100_000, "line 1: not JSON"),
        ('{"prompt": "a", "draft": "b", "logprobs": [NaN]}', "must be a list of numbers"),
    ],
)
def test_rows_that_cannot_be_read_are_named(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(content)

    result = runner.invoke(app, ["check", "--jsonl", str(path)])

    assert result.exit_code == 2
    assert complaint in result.output


@pytest.mark.parametrize(
    "option", [("--objective", "preference"), ("--artifact", "scorer.json"), ("--thresholds", "0.6")]
)
def test_what_a_mesh_cannot_use_is_not_ignored(option: tuple[str, str]) -> None:
    result = runner.invoke(app, ["explain", *option, "Hello"])

    assert result.exit_code == 2
    assert "need --jsonl" in result.stderr

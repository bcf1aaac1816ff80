"""The benchmark of GPU workers: its plan, its figures, and that no part can stop the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer

from benchmarks.gpu import jobs, limits, shapes, wheels
from benchmarks.gpu.__main__ import environment
from benchmarks.gpu.jobs import Job
from benchmarks.gpu.processes import pytest_results
from benchmarks.gpu.report import Options, Report
from benchmarks.gpu.requests import workload
from benchmarks.gpu.results import Results, Row, sentence
from benchmarks.gpu.runner import Runner

H100 = limits.Ceilings(3.35e12, 800e12)
REAL = [shapes.SHAPES[name] for name in shapes.REAL]


def job(model: str, *, group: str = "one", seconds: float = 60.0, least: float = 1.0) -> Job:
    return Job("part", model, group, seconds, least, module="tests.benchmarks.gpu_parts")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Results]:
    """Run jobs of `gpu_parts`."""

    def run(*planned: Job, seconds: float = 600.0) -> Results:
        results = Results("command", "today")
        options = Options(True, "cpu", "float32", 1.0, 0.25, tmp_path)
        environ = environment(tmp_path, rehearse=True)
        Runner(results, options, seconds=seconds, environment=environ, echo=lambda line: None).run(planned)
        return results

    return run


def processes(results: Results) -> list[float | None]:
    return [row.value for row in results.rows if row.what == "process"]


def test_jobs_of_a_group_share_a_process_and_facts_reach_all(run: Callable[..., Results]) -> None:
    results = run(job("remembers"), job("recalls"), job("recalls", group="two"))

    first, second, third = processes(results)
    assert first == second != third
    assert [row.value for row in results.rows if row.what == "recalled"] == [42, 42]
    assert results.failed == []


def test_a_failure_is_reported_and_the_next_job_runs(run: Callable[..., Results], tmp_path: Path) -> None:
    results = run(job("fails"), job("works"))

    assert results.ended["part fails"]["error"] == "ValueError: it failed"
    assert results.failed == ["part fails"]
    first, second = processes(results)
    assert first == second
    assert json.loads((tmp_path / "gpu.json").read_text())["ended"]["part works"]["error"] == ""


@pytest.mark.parametrize(
    ("model", "reason"),
    [("dies", "exit code 7"), ("breaks the device", "illegal memory access"), ("hangs", "time limit")],
)
def test_what_breaks_a_process_costs_only_its_own_job(
    run: Callable[..., Results], monkeypatch: pytest.MonkeyPatch, model: str, reason: str
) -> None:
    monkeypatch.setattr("benchmarks.gpu.runner._GRACE", 0.0)
    # Long enough to start a process on a busy machine where it is not the limit that is tested.
    results = run(job(model, seconds=20.0 if model == "hangs" else 600.0), job("works"))

    assert reason in results.ended[f"part {model}"]["error"]
    assert results.failed == [f"part {model}"]
    assert len(set(processes(results))) == 2


def test_a_process_ends_with_the_runner(tmp_path: Path) -> None:
    """A command that is killed at its time limit leaves nothing that holds the device's memory."""
    options = Options(True, "cpu", "float32", 1.0, 0.25, tmp_path).as_json()
    ask = {"module": "tests.benchmarks.gpu_parts", "part": "part", "model": "hangs", "options": options}
    program = f"""
from pathlib import Path
from benchmarks.gpu.__main__ import environment
from benchmarks.gpu.runner import Child
child = Child(environment(Path(), rehearse=True), Path({str(tmp_path / "log")!r}), [])
child.ask({ask | {"facts": {}, "seconds": 600.0}!r})
print(int(child.events.get()["row"]["value"]), flush=True)
child.events.get()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as runner:
        assert runner.stdout is not None
        child = psutil.Process(int(runner.stdout.readline()))
        runner.kill()

    child.wait(60)


def test_results_of_tests_survive_the_end_of_their_processes(tmp_path: Path) -> None:
    """In a run of several processes that is killed while a test hangs."""
    tests = tmp_path / "test_them.py"
    tests.write_text(
        "import pytest, time\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2\n"
        "def test_c(): pytest.skip('why')\n"
        "def test_d(): time.sleep(600)\n"
    )
    file = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "xdist.plugin", "-p", pytest_results.__name__]
    environ = {**environment(tmp_path, rehearse=True), pytest_results.FILE: str(file)}
    environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    with subprocess.Popen(
        [*command, "-c", os.devnull, "--rootdir", str(tmp_path), str(tests)],
        env=environ,
        stdout=subprocess.DEVNULL,
    ) as process:
        ends = time.monotonic() + 300
        while len(pytest_results.read(file)) < 3 and time.monotonic() < ends:
            time.sleep(0.05)
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            each.kill()

    passed, failed, skipped = pytest_results.read(file)
    assert [result.outcome for result in (passed, failed, skipped)] == ["passed", "failed", "skipped"]
    assert failed.test.endswith("::test_b")
    assert failed.message == "assert 1 == 2"
    assert "def test_b" in failed.text


def test_a_job_is_skipped_if_it_no_longer_fits(run: Callable[..., Results]) -> None:
    results = run(job("works", least=700.0))

    assert "it needs at least 700" in results.ended["part works"]["skipped"]
    assert results.rows == []


def test_engines_are_measured_model_by_model_and_others_last() -> None:
    planned = jobs.plan(jobs.PARTS, ["a", "b"])

    assert [entry.name for entry in planned] == [
        *("card", "tests", "exact", "kernels"),
        *("start a", "prefill a", "decode a", "workload a"),
        *("start b", "prefill b", "decode b", "workload b"),
        *("exact a", "mesh a", "peers a", "mesh b", "peers b"),
    ]
    groups = [entry.group for entry in planned]
    assert len(set(groups)) == 8, "each engine, the mesh and the others have processes of their own"


def test_only_the_named_parts_are_planned() -> None:
    planned = jobs.plan(["decode", "card"], ["a"])

    assert [entry.name for entry in planned] == ["card", "decode a"]


def test_every_part_has_a_module() -> None:
    folder = Path(jobs.__file__).parent / "parts"

    assert all((folder / f"{part}.py").is_file() for part in jobs.PARTS)


def test_limits_are_those_of_the_hardware() -> None:
    """As computed by hand from weights, keys and values."""
    decode = {
        shape.name: [
            round(limits.decode_tokens_per_second(shape, H100, rows, 1024), -1) for rows in (1, 32, 256)
        ]
        for shape in REAL
    }
    prefill = [round(limits.prefill_tokens_per_second(shape, H100), -3) for shape in REAL]

    assert decode == {
        "qwen3-0.6b": [2560, 21660, 27440],
        "llama-3-8b": [220, 5550, 17370],
        "qwen2.5-0.5b": [3350, 77090, 203750],
    }
    assert prefill == [908_000, 57_000, 1_118_000]


def test_the_workload_is_that_of_nano_vllm() -> None:
    requests = workload(REAL[0], 1.0)

    assert sum(len(request.ids) for request in requests) == 142_827
    assert sum(request.tokens for request in requests) == 133_966
    assert workload(REAL[0], 0.25) == requests[:64]


@pytest.mark.parametrize("name", ["tiny-llama", "llama-3-8b"])
def test_prompts_are_the_same_as_text_and_as_ids(name: str, tmp_path: Path) -> None:
    shape = shapes.SHAPES[name]
    tokenizer = Tokenizer.from_file(str(shapes.model_folder(shape, tmp_path) / "tokenizer.json"))
    request = workload(shape, 0.01)[0]

    encoded = tokenizer.encode(shapes.text_of(request.ids, shape.vocabulary), add_special_tokens=False)

    assert tuple(encoded.ids) == request.ids
    assert tokenizer.get_vocab_size() == shape.vocabulary


@pytest.mark.parametrize(
    ("value", "limit", "verdict"),
    [(0.8, 1.0, "good"), (0.6, 1.0, "reached"), (0.4, 1.0, "missed"), (0.6, None, "reached")],
)
def test_a_goal_is_a_share_of_the_limit_or_a_value(value: float, limit: float | None, verdict: str) -> None:
    assert Row("decode", "", "B = 1", value, limit=limit, least=0.5, good=0.7).verdict == verdict


def test_a_rehearsal_has_no_goals(tmp_path: Path) -> None:
    """Its figures are those of a CPU."""
    sent: list[dict[str, Any]] = []
    report = Report("decode", "", Options(True, "cpu", "float32", 1.0, 0.25, tmp_path), sent.append)

    report.row("B = 1", 5.0, "tokens/s", limit=10.0, goal=(0.4, 0.6))

    row = Row(**sent[0]["row"])
    assert (row.limit, row.verdict) == (None, "")
    assert sentence(row) == "decode B = 1, 5.00 tokens/s"


def test_the_table_names_figures_and_failures(tmp_path: Path) -> None:
    results = Results("python -m benchmarks.gpu", "2026-01-01", facts={"card": "H100"})
    results.rows.append(Row("decode", "llama-3-8b", "B = 1", 150.0, "tokens/s", 221.0, 0.65, 0.75))
    results.ended["decode llama-3-8b"] = {"seconds": 3.0}
    results.ended["mesh llama-3-8b"] = {"seconds": 1.0, "error": "RuntimeError: a | b"}

    results.write(tmp_path)

    table = (tmp_path / "gpu.md").read_text()
    assert "| decode | llama-3-8b | B = 1 | 150 tokens/s | 221 | 68% | 65% / 75%: reached |  |" in table
    assert "| mesh llama-3-8b | 1 | RuntimeError: a / b |" in table


def test_wheels_are_pinned_and_unpack_to_one_folder(tmp_path: Path) -> None:
    carried = tmp_path / "carried"
    carried.mkdir()
    with zipfile.ZipFile(carried / "thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing/__init__.py", "")
        wheel.writestr("thing-1.data/platlib/other.py", "")
    wheels.unpack(carried, tmp_path / "unpacked")

    assert (tmp_path / "unpacked" / "thing" / "__init__.py").is_file()
    assert (tmp_path / "unpacked" / "other.py").is_file()
    assert all("==" in pin for pin in wheels.pinned([*wheels.PACKAGES, *wheels.NUMBA]))
    with pytest.raises(FileNotFoundError, match="no wheels"):
        wheels.unpack(tmp_path / "unpacked", tmp_path)


def test_the_platforms_of_all_wheels_are_asked_for() -> None:
    """Those of the installed versions, which constraints.txt has too."""
    for name in wheels.PACKAGES:
        text = metadata.distribution(name).read_text("WHEEL") or ""
        tags = [line.rpartition("-")[2] for line in text.splitlines() if line.startswith("Tag: ")]
        linux = [tag for tag in tags if tag.startswith("manylinux") and tag.endswith("x86_64")]

        assert "any" in tags or not linux or set(linux) & set(wheels.PLATFORMS), (name, tags)


def test_processes_find_this_checkout_and_no_settings_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_MODEL", "another")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    environ = environment(tmp_path, rehearse=False)

    assert environ["PYTHONPATH"].split(os.pathsep)[2] == str(tmp_path)
    assert "HEADRACE_MODEL" not in environ
    assert "TRITON_INTERPRET" not in environ
    assert environment(tmp_path, rehearse=True)["TRITON_INTERPRET"] == "1"

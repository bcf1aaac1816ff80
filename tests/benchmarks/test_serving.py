"""The serving benchmark as a user runs it, on the echo engine: real processes, files at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serving import __main__ as serving
from benchmarks.serving import campaign, registry, report
from benchmarks.serving.peers import Places
from benchmarks.serving.systems import Place
from benchmarks.serving.workload import load


def cell(system: str, rate: float, concurrency: int = 8, **more: object) -> dict[str, object]:
    figures = {"output_tokens_per_s": rate, "requests_per_s": 1.0, "ttft_p50_ms": 5.0}
    return {
        **{"model": "small", "system": system, "concurrency": concurrency, "repetition": 0},
        **{"figures": figures, "clean": True, "complete": True, "peak_mib": 1.0, **more},
    }


async def test_engine_and_mesh_are_measured_and_a_second_run_resumes(tmp_path: Path) -> None:
    workload = tmp_path / "workload.json"
    entries = [{"id": n, "prompt": f"prompt {n}", "output_tokens": 5 + n} for n in range(8)]
    workload.write_text(json.dumps({"requests": entries}))
    flags = ["--systems", "headrace-engine:echo", "headrace-mesh:echo", "--model", "small", "--reps", "1"]
    flags += ["--concurrency", "1", "4", "--tries", "1", "--patience", "0", "--workload", str(workload)]
    arguments = serving.parser().parse_args([*flags, "--out", str(tmp_path / "out"), "--resume"])

    await serving.run(arguments)
    await serving.run(arguments)

    lines = (tmp_path / "out" / "serving.jsonl").read_text().splitlines()
    cells = [json.loads(line) for line in lines]
    assert [(each["system"], each["concurrency"]) for each in cells] == [
        (system, concurrency)
        for system in ("headrace-engine:echo", "headrace-mesh:echo")
        for concurrency in (1, 4)
    ], "the second run found everything measured"
    assert [each["figures"]["output_tokens"] for each in cells] == [5 + 6, sum(range(5, 13))] * 2
    assert all(each["peak_mib"] > 1 for each in cells)
    written = json.loads((tmp_path / "out" / "serving.json").read_text())
    assert len(written["summary"]) == 4
    assert written["machine"]["cores"] >= 1
    assert "headrace-mesh:echo" in (tmp_path / "out" / "serving.md").read_text()
    assert (tmp_path / "out" / "serving.png").stat().st_size > 10_000


async def test_a_system_that_does_not_start_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    place = Place("nowhere", 1, tmp_path / "logs", Places(tmp_path))
    chosen = serving.systems(["headrace-engine:float16", "headrace-engine:echo"])
    plan = campaign.Plan(chosen, [2], 1, 0.0, 1, 0.0, 0.5)
    journal = campaign.Journal(tmp_path / "cells.jsonl", resume=False)
    broken = {"nowhere": "/no/such/model.gguf"}
    requests = [load(lambda text: list(text.encode()))[0]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.serving.systems.MODELS", broken)
        await campaign.campaign(plan, place, requests, journal, lambda line: None)

    failed, measured = journal.cells
    assert failed["system"] == "headrace-engine:float16"
    assert "/no/such/model.gguf" in failed["error"], "the end of its log has the reason"
    assert measured["system"] == "headrace-engine:echo"


def test_a_name_selects_one_system_or_several() -> None:
    assert [system.name for system in registry.find("vllm")] == ["vllm:w8a8", "vllm:bf16"]
    assert [system.name for system in registry.find("headrace-mesh:float32")] == ["headrace-mesh:float32"]
    assert len(registry.find("peers")) == len(registry.PEERS)
    assert [system.name for system in registry.find("headrace-mesh-lookup:int8")] == [
        "headrace-mesh-lookup:int8"
    ]
    assert "headrace-mesh-lookup:int8" in [system.name for system in registry.find("headrace")]
    assert [system.name for system in registry.find("vllm:float32-eager")] == ["vllm:float32-eager"]
    (mesh,) = registry.find("headrace-mesh-vllm:bf16")
    assert mesh.ours, "it is measured in every repetition, however slow"
    with pytest.raises(LookupError, match="openvino:int8"):
        registry.find("openvino:int4")


def test_a_peer_far_behind_everywhere_is_not_measured_again() -> None:
    cells = [cell("a", 100.0), cell("b", 40.0), cell("c", 45.0), cell("c", 60.0, 1), cell("a", 70.0, 1)]

    assert campaign.far_behind(cells, "b", 0.5)
    assert not campaign.far_behind(cells, "c", 0.5), "it keeps up at one of the concurrencies"
    assert not campaign.far_behind(cells, "a", 0.5)
    assert not campaign.far_behind(cells, "never seen", 0.5)


def test_the_table_compares_headrace_with_the_best_peer() -> None:
    rows = report.summarise(
        [
            cell("headrace-mesh:int8", 120.0),
            cell("headrace-mesh:int8", 140.0, repetition=1),
            cell("vllm:bf16", 100.0),
            cell("openvino:int8", 80.0),
            cell("openvino:int8", 500.0, repetition=1, clean=False),
        ]
    )

    table = report.markdown(rows)

    assert report.best_peer(rows, "small", 8) == ("vllm:bf16", 100.0), "a contaminated run counts for nothing"
    assert "| **headrace-mesh:int8** | 8 | **130** (120-140) | 1.30 |" in table
    assert "†" not in table


def test_a_cell_without_a_clean_run_is_marked() -> None:
    assert "†" in report.markdown(report.summarise([cell("vllm:bf16", 100.0, clean=False)]))

"""The autoscalers' queries give the numbers that their thresholds are about."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import tools
from tests.deploy.rendering import TRANSFORMERS, combined, of_kind

# Series of promtool: `5x10` is ten more samples of 5, `0+60x10` grows by 60 a minute.
WAITING = 'headrace_queue_depth{headrace_tier="small",headrace_queue_stage="worker",instance="a"}'
TOKENISING = 'headrace_queue_depth{headrace_tier="small",headrace_queue_stage="tokenizer",instance="b"}'
RUNNING = 'headrace_sequences_running{headrace_tier="small",instance="c"}'
OTHER = 'headrace_sequences_running{headrace_tier="large",instance="d"}'
FIRST_TOKEN = (
    "gen_ai_server_time_to_first_token_seconds_bucket"
    '{{headrace_tier="small",service_name="headrace-batcher",le="{}"}}'
)
MISSED = 'headrace_requests_total{service_name="headrace-router",headrace_tier="",error_type="NO_WORKERS"}'
ROUTED = 'headrace_routed_total{service_name="headrace-router",headrace_route_cause="health"}'


@pytest.fixture
def scaled(tmp_path: Path) -> dict[str, Any]:
    (folder := tmp_path / "rendered").mkdir()
    found = combined(folder, [], ["autoscaling/tier"], TRANSFORMERS)
    spec: dict[str, Any] = of_kind(found, "ScaledObject")["worker-small"]["spec"]
    return spec


def query(scaled: dict[str, Any], name: str) -> str:
    """Return a trigger's query."""
    (found,) = (each["metadata"]["query"] for each in scaled["triggers"] if each["name"] == name)
    return str(found)


def check(folder: Path, expression: str, series: dict[str, str], value: float) -> None:
    """Check that the query has *value* after ten minutes of *series*."""
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": expression, "eval_time": "10m", "exp_samples": [{"labels": "{}", "value": value}]}
        ],
    }
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump({"tests": [test]}))
    done = subprocess.run(
        [tools.need("promtool"), "test", "rules", file],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_demand_is_what_waits_and_runs_in_the_tier(scaled: dict[str, Any], tmp_path: Path) -> None:
    series = {WAITING: "5x10", TOKENISING: "2x10", RUNNING: "20x10", OTHER: "99x10"}

    check(tmp_path, query(scaled, "demand"), series, 27)


def test_the_time_to_first_token_is_zero_without_traffic(scaled: dict[str, Any], tmp_path: Path) -> None:
    """KEDA would take the absence of a number for a failure."""
    busy = {FIRST_TOKEN.format(1): "0+60x10", FIRST_TOKEN.format("+Inf"): "0+60x10"}
    idle = {FIRST_TOKEN.format(1): "7x10", FIRST_TOKEN.format("+Inf"): "7x10"}

    check(tmp_path, query(scaled, "ttft"), busy, 0.95)
    check(tmp_path, query(scaled, "ttft"), idle, 0)
    check(tmp_path, query(scaled, "ttft"), {}, 0)


def test_requests_that_no_worker_could_serve_wake_a_tier(scaled: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, query(scaled, "missed"), {MISSED: "0+60x10"}, 1)
    check(tmp_path, query(scaled, "missed"), {ROUTED: "0+120x10"}, 2)
    check(tmp_path, query(scaled, "missed"), {MISSED: "4x10"}, 0)
    check(tmp_path, query(scaled, "missed"), {}, 0)


def test_a_tier_that_may_have_no_worker_starts_at_zero(scaled: dict[str, Any]) -> None:
    assert scaled["minReplicaCount"] == 0
    assert "fallback" not in scaled  # KEDA rejects it beside targets that are not averages

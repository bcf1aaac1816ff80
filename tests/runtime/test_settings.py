"""Settings come from flags, the environment and defaults, in this order; all invalid ones are listed."""

from __future__ import annotations

import re

import pytest

from headrace.batcher.settings import Settings as BatcherSettings
from headrace.router.settings import Settings as RouterSettings
from headrace.worker.settings import Settings as WorkerSettings


def complaint_of(
    settings: type[BatcherSettings | RouterSettings | WorkerSettings],
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> str:
    with pytest.raises(SystemExit) as caught:
        settings.load(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_flags_precede_the_environment_which_precedes_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_QUEUE_LIMIT", "7")
    monkeypatch.setenv("HEADRACE_BATCH_SIZE", "9")

    settings = BatcherSettings.load(["--fake", "--workers", "a:1, b:2", "--batch-size", "3"])

    assert (settings.queue_limit, settings.batch_size, settings.batch_tokens) == (7, 3, 16384)
    assert settings.worker_targets == ["a:1", "b:2"]


@pytest.mark.parametrize("settings", [BatcherSettings, RouterSettings, WorkerSettings])
def test_help_lists_every_flag_the_variables_and_no_empty_default(
    settings: type[BatcherSettings | RouterSettings | WorkerSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        settings.load(["--help"])
    printed = capsys.readouterr().out

    for name in settings.model_fields:
        assert f"  --{name.replace('_', '-')}" in printed
    assert re.search(r"\nEach flag (may|can) .*variable.*: HEADRACE_\w+ is --", printed)
    assert "(default: 25.0)" in printed
    assert "(default: )" not in printed
    assert "(default: None)" not in printed


def test_settings_cannot_be_changed_later() -> None:
    settings = WorkerSettings.load(["--engine", "echo"])

    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


def test_a_worker_needs_a_model_or_the_fake(capsys: pytest.CaptureFixture[str]) -> None:
    assert "HEADRACE_MODEL is not set" in complaint_of(WorkerSettings, [], capsys)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "HEADRACE_TIERS is not set"),
        (["--tiers", "small"], "'small' is not NAME=TARGET"),
        (["--tiers", "a=x:1,a=y:2"], "names a tier twice"),
        (["--tiers", "a=x:1,b=y:2", "--thresholds", "high"], "is not numbers"),
        (["--tiers", "a=x:1,b=y:2", "--thresholds", "0.5,0.7"], "must be 1 ascending"),
        (["--tiers", "a=x:1,b=y:2,c=z:3", "--thresholds", "0.7,0.5"], "must be 2 ascending"),
        (["--tiers", "a=x:1,b=y:2", "--thresholds", "nan"], "must be 1 ascending"),
    ],
)
def test_invalid_tiers_are_explained(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in complaint_of(RouterSettings, arguments, capsys)


@pytest.mark.parametrize(
    ("settings", "flags", "other"),
    [
        (BatcherSettings, ["--fake"], "HEADRACE_FAKE (or --fake)"),
        (WorkerSettings, ["--engine", "echo"], "HEADRACE_ENGINE (or --engine)"),
    ],
)
def test_a_model_and_what_needs_none_are_both_named_when_both_are_given(
    settings: type[BatcherSettings | WorkerSettings],
    flags: list[str],
    other: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEADRACE_WORKERS", "127.0.0.1:1")
    monkeypatch.setenv("HEADRACE_MODEL", "some")

    complaint = complaint_of(settings, flags, capsys)

    assert "HEADRACE_MODEL (or --model)" in complaint
    assert other in complaint
    assert "not set" not in complaint


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        (BatcherSettings, ["--fake", "--workers", "a:1,{}"]),
        (RouterSettings, ["--tiers", "a=x:1,b=y:2+{}"]),
    ],
)
@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("::1:50051", "IPv6 address without brackets"),
        ("name", "no port"),
        ("http://name:1", "not a gRPC target"),
    ],
)
def test_an_invalid_target_stops_the_start(
    settings: type[BatcherSettings | RouterSettings],
    arguments: list[str],
    target: str,
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert problem in complaint_of(settings, [part.format(target) for part in arguments], capsys)


def test_ipv6_targets_are_accepted() -> None:
    batcher = BatcherSettings.load(["--fake", "--workers", "[::1]:50053,dns:///[fd00::2]:50053"])
    router = RouterSettings.load(["--tiers", "s=[::1]:1+[::2]:2"])

    assert batcher.worker_targets == ["[::1]:50053", "dns:///[fd00::2]:50053"]
    assert router.tier_targets() == [("s", ["[::1]:1", "[::2]:2"])]


@pytest.mark.parametrize("settings", [BatcherSettings, RouterSettings, WorkerSettings])
@pytest.mark.parametrize(
    "link", ["tcp://10.0.0.1:50051", "udp://10.0.0.1:53", "tcp://[fd00::1]:50051", "sctp://10.0.0.1:1"]
)
def test_a_variable_that_kubernetes_set_for_a_service_is_explained(
    settings: type[BatcherSettings | RouterSettings | WorkerSettings],
    link: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEADRACE_PORT", link)

    complaint = complaint_of(settings, [], capsys)

    assert f"HEADRACE_PORT='{link}'" in complaint
    assert "Kubernetes set it for a Service named 'headrace'" in complaint
    assert "enableServiceLinks: false" in complaint


@pytest.mark.parametrize("settings", [BatcherSettings, RouterSettings, WorkerSettings])
def test_only_ports_have_a_variable_name_that_kubernetes_uses(
    settings: type[BatcherSettings | RouterSettings | WorkerSettings],
) -> None:
    """For any Service name: headrace, headrace-cache..."""
    given = re.compile(r"(.*_)?(port|service_host|service_port(_\w+)?|port_\d+_\w+)")

    assert {name for name in settings.model_fields if given.fullmatch(name)} == {
        "port",
        "metrics_port",
        "health_port",
        "mtls_port",
    }


def test_a_service_named_headrace_metrics_is_explained_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_METRICS_PORT", "tcp://10.0.0.1:9464")

    assert "a Service named 'headrace-metrics'" in complaint_of(WorkerSettings, ["--engine", "echo"], capsys)


def test_each_process_of_a_router_needs_a_port_for_its_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tiers", "s=a:1", "--processes", "4", "--metrics-port"]

    assert RouterSettings.load([*flags, "65532"]).metrics_port == 65532
    assert "HEADRACE_METRICS_PORT=65533" in complaint_of(RouterSettings, [*flags, "65533"], capsys)


def test_other_variables_of_a_service_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_PORT", "tcp://10.0.0.1:50051")
    monkeypatch.setenv("HEADRACE_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("HEADRACE_SERVICE_PORT", "50051")
    monkeypatch.setenv("HEADRACE_PORT_50051_TCP", "tcp://10.0.0.1:50051")
    monkeypatch.setenv("HEADRACE_PORT_50051_TCP_ADDR", "10.0.0.1")

    settings = WorkerSettings.load(["--engine", "echo", "--port", "7"])

    assert (settings.host, settings.port) == ("127.0.0.1", 7)


@pytest.mark.parametrize(("given", "host"), [("[::1]", "::1"), (" 0.0.0.0 ", "0.0.0.0"), ("::", "::")])
def test_a_host_may_be_written_with_brackets(given: str, host: str) -> None:
    assert WorkerSettings.load(["--engine", "echo", "--host", given]).host == host


def test_tiers_keep_their_order_and_thresholds() -> None:
    settings = RouterSettings.load(["--tiers", "s=a:1,m=b:2+b:3,l=dns:///c:3", "--thresholds", "0.3,0.8"])

    assert settings.tier_targets() == [("s", ["a:1"]), ("m", ["b:2", "b:3"]), ("l", ["dns:///c:3"])]
    assert settings.tier_thresholds() == [0, 0.3, 0.8]


def test_a_drain_has_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    complaint = complaint_of(WorkerSettings, ["--engine", "echo", "--drain-seconds", "inf"], capsys)

    assert "drain-seconds" in complaint
    assert "finite" in complaint


@pytest.mark.parametrize("flag", ["--decision-log-megabytes", "--feedback-megabytes", "--cost-weight"])
def test_numbers_are_finite(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "finite" in complaint_of(RouterSettings, ["--tiers", "a=x:1", flag, "inf"], capsys)


@pytest.mark.parametrize("feedback", ["rows.jsonl", "here/../rows.jsonl", "rows.jsonl.1"])
def test_decision_log_and_feedback_do_not_write_to_the_same_file(
    feedback: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--decision-log", "rows.jsonl", "--feedback", feedback]

    assert "use the same file" in complaint_of(RouterSettings, ["--tiers", "a=x:1", *files], capsys)


def test_the_help_of_the_router_lists_tiers_before_changes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        RouterSettings.load(["--help"])
    printed = capsys.readouterr().out

    assert printed.index("\n  --tiers ") < printed.index("\n  --explore ") < printed.index("\n  --canary ")

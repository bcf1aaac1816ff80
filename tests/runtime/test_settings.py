"""Settings come from flags, then the environment, then defaults; wrong ones are all named at once."""

from __future__ import annotations

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


def test_flags_win_over_the_environment_which_wins_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_QUEUE_LIMIT", "7")
    monkeypatch.setenv("HEADRACE_BATCH_SIZE", "9")

    settings = BatcherSettings.load(["--fake", "--workers", "a:1, b:2", "--batch-size", "3"])

    assert (settings.queue_limit, settings.batch_size, settings.batch_tokens) == (7, 3, 4096)
    assert settings.worker_targets == ["a:1", "b:2"]


@pytest.mark.parametrize("settings", [BatcherSettings, RouterSettings, WorkerSettings])
def test_help_names_every_flag_the_variables_and_no_default_that_says_nothing(
    settings: type[BatcherSettings | RouterSettings | WorkerSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        settings.load(["--help"])
    printed = capsys.readouterr().out

    for name in settings.model_fields:
        assert f"  --{name.replace('_', '-')}" in printed
    assert "\nEach flag may be given as a variable instead: HEADRACE_" in printed
    assert "(default: 25.0)" in printed
    assert "(default: )" not in printed
    assert "(default: None)" not in printed


def test_settings_cannot_be_changed_later() -> None:
    settings = WorkerSettings.load(["--fake"])

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
def test_what_is_wrong_with_the_tiers_is_said(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in complaint_of(RouterSettings, arguments, capsys)


def test_tiers_keep_their_order_and_thresholds() -> None:
    settings = RouterSettings.load(["--tiers", "s=a:1,m=b:2+b:3,l=dns:///c:3", "--thresholds", "0.3,0.8"])

    assert settings.tier_targets() == [("s", ["a:1"]), ("m", ["b:2", "b:3"]), ("l", ["dns:///c:3"])]
    assert settings.tier_thresholds() == [0, 0.3, 0.8]


def test_a_drain_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    complaint = complaint_of(WorkerSettings, ["--fake", "--drain-seconds", "inf"], capsys)

    assert "drain-seconds" in complaint
    assert "finite" in complaint

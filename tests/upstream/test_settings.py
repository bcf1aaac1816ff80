"""Settings of an upstream are checked at the start, and no message shows a password."""

from __future__ import annotations

import subprocess
import sys

import pytest

from headrace.upstream.http.proxy import proxy_for
from headrace.upstream.settings import Settings


def test_urls_are_listed_by_preference_without_a_slash_at_their_end() -> None:
    settings = Settings(url=" https://a.example/v1/ , http://b.example:8000/v1,", model="m")

    assert settings.urls == ["https://a.example/v1", "http://b.example:8000/v1"]


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("", "names no URL"),
        ("api.openai.com/v1", "http:// or https://"),
        ("ftp://a.example", "http:// or https://"),
        ("https://", "have a host"),
        ("https://a.example:port/v1", "malformed"),
        ("https://a.example/v1?key=1", "a query"),
        ("https://a.example/v1/chat/completions", "an endpoint"),
        ("https://a.example/v1,https://a.example/v1/", "a URL twice"),
    ],
)
def test_a_url_that_cannot_be_used_stops_the_start(
    url: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        Settings.load(["--model", "m", "--url", url])

    assert complaint in capsys.readouterr().err


def test_a_password_in_a_url_is_refused_and_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Settings.load(["--model", "m", "--url", "https://user:hunter2@a.example/v1"])

    complaint = capsys.readouterr().err
    assert "--api-key-file" in complaint
    assert "hunter2" not in complaint


def test_what_is_missing_is_listed_at_once() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "headrace.upstream"], capture_output=True, text=True, timeout=60, check=False
    )

    assert run.returncode == 2
    assert "HEADRACE_URL is not set" in run.stderr
    assert "HEADRACE_MODEL is not set" in run.stderr


def test_the_proxy_of_the_environment_is_used_except_where_it_must_not_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", "http://user:p%40ss@proxy.example:3128")
    monkeypatch.setenv("no_proxy", "inside.example")

    used = proxy_for("https://api.example/v1")

    assert used.url == "http://proxy.example:3128"
    assert used.headers == {"Proxy-Authorization": "Basic dXNlcjpwQHNz"}
    assert "dXNl" not in repr(used)
    assert proxy_for("https://inside.example/v1").url is None
    assert proxy_for("https://127.0.0.1/v1").url is None
    assert proxy_for("http://api.example/v1").url is None


def test_a_proxy_of_another_kind_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "socks5://user:secret@proxy.example")

    with pytest.raises(ValueError, match="http://HOST:PORT") as raised:
        proxy_for("https://api.example/v1")

    assert "secret" not in str(raised.value)

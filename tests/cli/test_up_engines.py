"""`headrace up` with tiers of other engines: an upstream beside an echo engine, and vLLM that is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_end_to_end import run, up


def test_a_tier_at_a_url_answers_beside_a_tier_of_workers(tmp_path: Path) -> None:
    """Another mesh's gateway is a service with OpenAI's API, too."""
    with up(tmp_path / "there", "--gateway-port", "0") as there:
        tiers = ("--tier", "small", "--tier", f"cloud=auto@{there.gateway}/v1")
        with up(tmp_path / "here", *tiers) as here:
            assert sorted(here.pids) == ["batcher-small", "router", "upstream-cloud", "worker-small"]
            assert f"auto at {there.gateway}/v1" in here.printed
            asked = ("--target", here.address, "--max-tokens", "40")

            answers = [
                run("chat", *asked, "--tier", tier, "Hello there").stdout for tier in ("small", "cloud")
            ]
            listed = run("tiers", "--target", here.address).stdout

        assert answers == ["Hello there\n", "Hello there\n"]
        assert "cloud" in listed
        assert "auto" in listed
    assert here.process.returncode == 0


def test_without_vllm_nothing_starts_and_the_message_has_the_command_that_installs_it(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    logs = tmp_path / "logs"

    out = run(
        *("up", "--port", "0", "--no-gateway", "--tier", "small=vllm:org/model", "--log-dir", str(logs)),
        HEADRACE_VLLM_PYTHON=str(bare / "bin" / "python"),
    )

    assert out.returncode == 2
    assert "has no vllm" in out.stderr
    assert "-m pip install vllm 'headrace[server]'" in " ".join(out.stderr.split())
    assert not logs.exists()


@pytest.mark.parametrize("command", ["up", "demo"])
def test_a_tier_that_cannot_be_read_ends_the_start_with_2(command: str) -> None:
    out = run(command, "--tier", "large=gpt-5@api.openai.com/v1")

    assert out.returncode == 2
    assert "the URL after '@' begins with http:// or https://" in out.stderr


def test_unpack_names_what_it_cannot_read(tmp_path: Path) -> None:
    out = run("unpack", "no-such-model", str(tmp_path / "folder"), "--cache", str(tmp_path))

    assert out.returncode == 2
    assert "cannot unpack no-such-model: 'no-such-model' is not a known model" in out.stderr
    assert not (tmp_path / "folder").exists()

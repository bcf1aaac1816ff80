"""The `headrace` command with real processes, real gRPC and echo engines."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from headrace.cli.launch.mesh import require_free

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADRACE = [sys.executable, "-m", "headrace.cli"]
PATIENCE = 180.0  # seconds; the limit of every wait, far beyond what a busy machine needs
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("HEADRACE_", "OTEL_"))},
    "COLUMNS": "160",
    "NO_COLOR": "1",
}


def run(*arguments: str | bytes, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HEADRACE, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=PATIENCE,
        check=False,
        env={**ENVIRONMENT, **variables},
    )


@dataclass
class Up:
    """A running `headrace up`: its output, and the ids of its processes."""

    process: subprocess.Popen[str]
    printed: str

    @property
    def address(self) -> str:
        found = re.search(r"up at (\S+)", self.printed)
        assert found, self.printed
        return found[1]

    @property
    def gateway(self) -> str:
        found = re.search(r"OpenAI's API is at (\S+)/v1,", self.printed)
        assert found, self.printed
        return found[1]

    @property
    def pids(self) -> dict[str, int]:
        rows = re.findall(r"│ (\S+) +│ .*│ +\d+ │ +(\d+) │", self.printed)
        return {name: int(pid) for name, pid in rows}


@contextmanager
def up(folder: Path, *flags: str, feedback: Path | None = None) -> Iterator[Up]:
    command = [*HEADRACE, "up", "--fake", "--port", "0", "--drain-seconds", "60", "--processes", "1"]
    command += ["--log-dir", str(folder), *flags]
    command += [] if "--gateway-port" in flags else ["--no-gateway"]
    environment = {**ENVIRONMENT, **({"HEADRACE_FEEDBACK": str(feedback)} if feedback else {})}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if "GenerationService/Generate" in line:  # the last of the examples
                break
        running = Up(process, printed)
        try:
            yield running
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            running.printed += process.communicate(timeout=PATIENCE)[0]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with up(tmp_path_factory.mktemp("logs")) as running:
        yield running


def gone(pid: int) -> bool:
    """Return whether a process has ended, reaped or not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until_gone(pids: list[int]) -> None:
    ends = time.monotonic() + PATIENCE
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < ends, "a process is still running"
        time.sleep(0.02)


def test_the_answer_goes_to_stdout_and_the_figures_to_stderr(mesh: Up) -> None:
    out = run("chat", "--target", mesh.address, "Hello, mesh!")

    assert (out.returncode, out.stdout) == (0, "Hello, mesh!\n")
    assert re.search(
        r"tier small · echo · score 0\.\d\d · first token .* · 12 tokens · .* · stop\n", out.stderr
    )


def test_feedback_accepts_the_id_that_chat_shows(mesh: Up) -> None:
    printed = run("chat", "--target", mesh.address, "Hello").stderr
    shown = re.search(r"^request \S+ · answer (\S+)$", printed, re.MULTILINE)
    assert shown
    told = run("feedback", "--target", mesh.address, shown[1], "--ok")

    assert (told.returncode, told.stdout) == (
        0,
        "tier small: counted, not kept: the router was started without --feedback FILE\n",
    )


def test_standard_input_is_a_prompt(mesh: Up) -> None:
    out = run("chat", "--target", mesh.address, "--max-tokens", "5", "--tier", "large", stdin="from a pipe")

    assert (out.returncode, out.stdout) == (0, "from \n")
    assert "tier large" in out.stderr


def test_an_empty_prompt_is_not_sent(mesh: Up) -> None:
    out = run("chat", "--target", mesh.address, stdin=" \n")

    assert out.returncode == 2
    assert "empty" in out.stderr


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
@pytest.mark.parametrize("piped", [False, True])
def test_a_prompt_that_is_not_utf8_is_reported_in_one_line_and_not_sent(locale: str, piped: bool) -> None:
    """A file in Latin-1, for instance, or a word pasted from one. There is no mesh here."""
    word = b"Gr\xfc\xdfe"
    variables = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    nowhere = ("--target", "127.0.0.1:1")
    if piped:
        out = run("chat", *nowhere, stdin=word.decode(errors="surrogateescape"), **variables)
    else:
        out = run("chat", *nowhere, word, **variables)

    assert (out.returncode, out.stdout) == (1, "")
    assert out.stderr == "error: the text is not valid UTF-8 from character 2 on [INVALID_UTF8]\n"


def test_a_terminal_gets_the_characters_that_it_can_show(mesh: Up) -> None:
    told = ("--target", mesh.address, "Prove that 2 is prime.")

    out = run("explain", *told, PYTHONIOENCODING="ascii")

    assert out.returncode == 0, out.stderr
    assert "tier large" in out.stdout


def test_a_full_disk_is_reported_in_one_line(mesh: Up) -> None:
    with open("/dev/full", "w") as full:
        out = subprocess.run(
            [*HEADRACE, "chat", "--target", mesh.address, "Hello"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=False,
            env=ENVIRONMENT,
        )

    assert out.returncode != 0
    assert "No space left on device" in out.stderr
    assert "Traceback" not in out.stderr


def test_a_propagator_that_is_not_installed_is_reported_in_one_line() -> None:
    out = run("tiers", "--target", "127.0.0.1:1", OTEL_PROPAGATORS="sleipnir")

    assert out.returncode == 2
    assert out.stderr.startswith("error: OTEL_PROPAGATORS: sleipnir not installed; available: b3, ")
    assert out.stderr.count("\n") == 1


@pytest.mark.parametrize("target", ["http://127.0.0.1:1", "localhost", "::1:50051", "dns:///router"])
def test_an_invalid_target_is_answered_with_the_valid_forms(target: str) -> None:
    out = run("tiers", "--target", target)

    assert out.returncode == 1
    assert "a target is HOST:PORT" in out.stderr


def test_an_unknown_tier_is_reported_in_one_line_with_a_remedy(mesh: Up) -> None:
    out = run("chat", "--target", mesh.address, "--tier", "huge", "Hello")

    assert out.returncode == 1
    assert "UNKNOWN_TIER" in out.stderr
    assert "headrace tiers" in out.stderr
    assert "Traceback" not in out.stderr


def test_an_unreachable_mesh_is_reported_in_one_line_with_a_remedy() -> None:
    for arguments in (["chat", "Hi"], ["explain", "Hi"], ["tiers"]):
        out = run(*arguments, "--target", "127.0.0.1:1")

        assert out.returncode == 1
        assert out.stderr == (
            "error: no mesh at 127.0.0.1:1; start one with `headrace up`, or give another with --target\n"
        )


def test_explaining_shows_score_features_and_candidates(mesh: Up) -> None:
    out = run("explain", "--target", mesh.address, "Prove that there are infinitely many primes.")

    assert out.returncode == 0
    for word in ("score", "large", "log-odds", "(bias)", "candidates", "eligible"):
        assert word in out.stdout


def test_an_explanation_as_json_has_the_names_of_the_contract(mesh: Up) -> None:
    out = run("explain", "--target", mesh.address, "--json", "Hello")

    explanation = json.loads(out.stdout)
    assert explanation["tier"] == "small"
    assert {"name", "value", "log_odds"} <= explanation["features"][0].keys()


def test_tiers_are_listed_smallest_first(mesh: Up) -> None:
    out = run("tiers", "--target", mesh.address)

    assert out.returncode == 0
    assert re.search(r"small.*healthy.*\n.*large.*healthy", out.stdout)
    assert [
        tier["name"] for tier in json.loads(run("tiers", "--target", mesh.address, "--json").stdout)["tiers"]
    ] == [
        "small",
        "large",
    ]


@pytest.mark.parametrize(("command", "tables"), [(["tiers"], 1), (["top", "--once"], 3)])
def test_a_narrow_terminal_shows_the_names_of_the_tiers(mesh: Up, command: list[str], tables: int) -> None:
    out = run(*command, "--target", mesh.address, COLUMNS="50")

    assert len(re.findall(r"^ +small ", out.stdout, re.MULTILINE)) == tables, out.stdout


def test_a_port_in_use_ends_the_start_with_2(mesh: Up, tmp_path: Path) -> None:
    port = mesh.address.rpartition(":")[2]
    out = run("up", "--fake", "--port", port, "--log-dir", str(tmp_path / "logs"))

    assert out.returncode == 2
    assert "--port" in out.stderr
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tier", "Small=x"], "not a valid name of a tier"),
        (["--tier", "small"], "write NAME=MODEL"),
        (["--tier", "small=./nowhere"], "hub id"),
    ],
)
def test_a_bad_tier_ends_the_start_with_2(tmp_path: Path, flags: list[str], said: str) -> None:
    out = run("up", "--port", "0", "--cache", str(tmp_path), *flags)

    assert out.returncode == 2
    assert said in out.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_in_order(tmp_path: Path, number: signal.Signals) -> None:
    with up(tmp_path) as running:
        pids = running.pids
        assert len(pids) == 5
        running.process.send_signal(number)
        assert running.process.wait(PATIENCE) == 0

    assert "killed" not in running.printed
    assert all(gone(pid) for pid in pids.values())
    assert len(list(tmp_path.glob("*.log"))) == 5
    require_free(int(running.address.rpartition(":")[2]))


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_printed_command_for_curl_is_answered_by_the_gateway(tmp_path: Path) -> None:
    with up(tmp_path, "--gateway-port", "0") as running:
        assert len(running.pids) == 6
        (command,) = re.findall(r"^ +(curl .*)$", running.printed, re.MULTILINE)
        out = subprocess.run(
            shlex.split(command), capture_output=True, timeout=PATIENCE, check=True, env=ENVIRONMENT
        )
        health = httpx.get(f"{running.gateway}/health", trust_env=False)

    assert json.loads(out.stdout)["choices"][0]["message"]["content"] == "Hello!"
    assert health.status_code == 200
    assert running.process.returncode == 0
    assert "killed" not in running.printed


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        pytest.param(["--gateway-port", "{taken}"], "set another --gateway-port", id="in use"),
        pytest.param(["--gateway-port", "0", "--no-gateway"], "exclude each other", id="both"),
    ],
)
def test_a_gateway_that_cannot_be_started_as_asked_ends_the_start_with_2(
    tmp_path: Path, flags: list[str], said: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        given = [flag.format(taken=server.getsockname()[1]) for flag in flags]
        out = run("up", "--fake", "--port", "0", "--log-dir", str(tmp_path / "logs"), *given)

    assert out.returncode == 2
    assert said in out.stderr
    assert not (tmp_path / "logs").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="processes share a port on Linux only")
def test_a_mesh_with_several_routers_and_batchers_has_one_address(tmp_path: Path) -> None:
    with up(tmp_path, "--processes", "2") as running:
        pids = running.pids
        assert sorted(pids) == [
            *("batcher-large", "batcher-small", "batcher2-large", "batcher2-small", "router"),
            *("worker-large", "worker-small"),
        ]
        children = Path(f"/proc/{pids['router']}/task/{pids['router']}/children").read_text().split()
        assert len(children) == 2
        for _ in range(4):
            out = run("chat", "--target", running.address, "hello there")
            assert (out.returncode, "hello there" in out.stdout) == (0, True)
        os.kill(int(children[0]), signal.SIGKILL)
        out = run("chat", "--target", running.address, "hello there")
        assert (out.returncode, "hello there" in out.stdout) == (0, True)

    assert running.process.returncode == 0
    assert "killed" not in running.printed
    until_gone([*pids.values(), *map(int, children)])


def test_a_dead_child_is_named_and_ends_the_mesh(tmp_path: Path) -> None:
    with up(tmp_path) as running:
        pids = running.pids
        os.kill(pids["worker-large"], signal.SIGKILL)
        assert running.process.wait(PATIENCE) == 1

    assert "worker-large was terminated by SIGKILL" in running.printed
    assert "worker-large.log" in running.printed
    until_gone(list(pids.values()))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and the parent-death signal are Linux's")
def test_nothing_outlives_a_killed_up(tmp_path: Path) -> None:
    with up(tmp_path) as running:
        pids = running.pids
        running.process.kill()
        running.process.wait(PATIENCE)

        until_gone(list(pids.values()))


def test_one_tier_is_a_mesh_too(tmp_path: Path) -> None:
    with up(tmp_path, "--tier", "only") as running:
        assert sorted(running.pids) == ["batcher-only", "router", "worker-only"]
        assert run("chat", "--target", running.address, "Hi").stdout == "Hi\n"


def test_the_demo_answers_everything_and_shows_a_whole_trace(tmp_path: Path) -> None:
    out = run("demo", "--fake", "--log-dir", str(tmp_path))

    assert out.returncode == 0, out.stdout + out.stderr
    assert re.search(r"failures +│ 0", out.stdout)
    if shutil.which("curl"):
        assert '"content":"What is the capital of I"' in out.stdout
    tree = out.stdout[out.stdout.index("trace ") :]
    for name in (
        "demo.prompt",
        "router.score",
        "batcher.queue",
        "batcher.batch",
        "worker.prefill",
        "worker.decode",
    ):
        assert name in tree
    assert "first_token" in tree
    for tier in ("small", "large"):
        assert f"one request across all processes: {tier}, echo" in out.stdout
    assert "not arrived" not in out.stdout


class Terminal:
    """`headrace chat` on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        master, slave = pty.openpty()
        self.master = master
        self.seen = ""
        self.process = subprocess.Popen(
            [*HEADRACE, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**ENVIRONMENT, "TERM": "dumb"},
            preexec_fn=self._take_terminal,
            close_fds=True,
        )
        os.close(slave)

    @staticmethod
    def _take_terminal() -> None:
        """Make the terminal the controlling one, so that it turns ^C into SIGINT."""
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # A shell ignores it for background jobs, and children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, text: str, *, pressing: str = "") -> None:
        """Read until *text* appears after what was expected before.

        *pressing* is typed, and again after each second without output: readline handles a signal that
        arrives just before it waits for a key only at the next key.
        """
        ends = time.monotonic() + PATIENCE
        self.type(pressing)
        while text not in self.seen:
            assert time.monotonic() < ends, f"{text!r} did not appear; seen: {self.seen!r}"
            if select.select([self.master], [], [], 1)[0]:
                with suppress(OSError):
                    self.seen += os.read(self.master, 4096).decode(errors="replace")
            elif pressing:
                self.type(pressing)
        self.seen = self.seen.partition(text)[2]

    def close(self, *, pressing: str) -> int:
        """Wait for the end. *pressing* is typed until then: before the prompt appears, a key is lost."""
        ends = time.monotonic() + PATIENCE
        try:
            while self.process.poll() is None and time.monotonic() < ends:
                self.type(pressing)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(1)
            return self.process.wait(0)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.master)


def test_a_conversation_is_stopped_by_control_c_and_ended_by_control_d(mesh: Up) -> None:
    terminal = Terminal("chat", "--target", mesh.address)
    terminal.expect("> ")
    terminal.type("Hello there\n")
    terminal.expect("Hello there")  # as typed
    terminal.expect("Hello there")  # as answered
    terminal.expect("stop")
    terminal.expect("> ")
    terminal.type("long " * 200 + "indeed\n")  # 20 s to stop it in
    terminal.expect("indeed")  # as typed
    terminal.expect("long long")  # as answered
    terminal.type("\x03")
    terminal.expect("(cancelled)")
    terminal.expect("> ")
    terminal.expect("Ctrl-D exits", pressing="\x03")

    assert terminal.close(pressing="\x04") == 0


def test_a_conversation_continues_after_text_that_cannot_be_sent(mesh: Up) -> None:
    """A pasted word in Latin-1 fails its turn, and not the conversation."""
    terminal = Terminal("chat", "--target", mesh.address)
    terminal.expect("> ")
    os.write(terminal.master, b"Gr\xfc\xdfe\n")
    terminal.expect("the text is not valid UTF-8")
    terminal.expect("> ")

    assert terminal.close(pressing="\x04") == 0


def test_answers_of_a_conversation_are_rated_where_they_are_read(tmp_path: Path) -> None:
    kept = tmp_path / "feedback.jsonl"
    with up(tmp_path / "logs", feedback=kept) as running:
        terminal = Terminal("chat", "--target", running.address)
        terminal.expect("/good or /bad")
        terminal.expect("> ")
        for line, reply in (
            ("/good", "no answer to rate yet"),
            ("/sing", "unknown command /sing"),
            ("Hello there", "· stop"),
            ("/good", "tier small: kept"),
            ("Write a Python function that sorts a list.", "tier large"),
            ("/bad", "tier large: kept"),
            ("Now sort it backwards.", "tier large"),  # it continues
            ("/new", "> "),
            ("/good", "no answer to rate yet"),
            ("Hello again", "tier small"),
        ):
            terminal.type(f"{line}\n")
            terminal.expect(reply)
        terminal.expect("> ")
        assert terminal.close(pressing="\x04") == 0

    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    asked = [row["prompt"] if "prompt" in row else row["messages"][-1]["content"] for row in rows]
    outcomes = [(row.get("small_ok"), row.get("large_ok")) for row in rows]
    assert [(text[:5], *found) for text, found in zip(asked, outcomes, strict=True)] == [
        ("Hello", 1.0, None),
        ("Write", None, 0.0),
    ]


def test_the_version_is_the_installed_one() -> None:
    out = run("--version")

    assert (out.returncode, out.stdout) == (0, f"headrace {version('headrace')}\n")

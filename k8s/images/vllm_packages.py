"""Add Headrace to an image with vLLM: `python3 vllm_packages.py LOCK WHEEL [options of pip]`.

Packages go to /opt/headrace/packages and Headrace to /opt/headrace/app, which are on PYTHONPATH. A package
that the image has, in a version that Headrace supports, is not installed again: PYTHONPATH comes first, so it
would replace the one that vLLM was built and tested with. The others are installed by hash, without
dependencies.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES, APP = (Path("/opt/headrace", name) for name in ("packages", "app"))
_EXTRA = "server"


def main(lock: str, wheel: str, *options: str) -> None:
    """Choose, install."""
    entries = re.split(r"\n(?=[a-z0-9])", Path(lock).read_text().rstrip("\n"))[1:]
    wanted = supported(wheel)
    missing = [entry for entry in entries if not is_there(entry, wanted)]
    print("installing", ", ".join(entry.partition(" ")[0] for entry in missing), flush=True)
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", *options]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as chosen:
        chosen.write("\n".join(missing))
        chosen.flush()
        hashed = ["--require-hashes", "--only-binary=:all:", "--requirement", chosen.name]
        subprocess.run([*install, "--target", str(PACKAGES), *hashed], check=True)
    subprocess.run([*install, "--target", str(APP), "--no-index", wheel], check=True)


def supported(wheel: str) -> dict[str, str]:
    """Return the versions that Headrace's services need, as pip writes them, by package."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    found = {}
    for name, specifier, marker in re.findall(
        r"^Requires-Dist: ([\w.-]+)(?:\[[^]]*\])?\s*([^;\n]*)(?:;(.*))?$", text, re.MULTILINE
    ):
        if "extra" not in marker or f'"{_EXTRA}"' in marker or f"'{_EXTRA}'" in marker:
            found[canonical(name)] = specifier.strip()
    return found


def is_there(entry: str, wanted: dict[str, str]) -> bool:
    """Return whether the image has the package of an entry of the lock, in a supported version."""
    from pip._vendor.packaging.specifiers import SpecifierSet

    name = canonical(re.split(r"[=\s;]", entry)[0])
    try:
        present = version(name)
    except PackageNotFoundError:
        return False
    return SpecifierSet(wanted.get(name, "")).contains(present, prereleases=True)


def canonical(name: str) -> str:
    """Return the form of a package's name in which names are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The packages of the programs in Node.js."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INSTALLED = HERE.parent.parent / "build" / "node"
# What npm reports if it does not reach the registry.
UNREACHABLE = re.compile(
    r"^npm (?:error|ERR!) code (?:EAI_AGAIN|ECONNREFUSED|ECONNRESET|EHOSTUNREACH|ENETUNREACH|ENOTFOUND"
    r"|ERR_SOCKET_TIMEOUT|ETIMEDOUT)$",
    re.MULTILINE,
)


@pytest.fixture(scope="session")
def packages() -> Path:
    """Return the folder with the packages that the programs import, installed once for each lockfile."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    lockfile = HERE / "package-lock.json"
    folder = INSTALLED / hashlib.sha256(lockfile.read_bytes()).hexdigest()[:16]
    if not folder.exists():
        INSTALLED.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: an installation that is interrupted is not used.
        with tempfile.TemporaryDirectory(dir=INSTALLED) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            for file in (lockfile, HERE / "package.json"):
                shutil.copy(file, new)
            install(new)
            try:
                new.rename(folder)
            except OSError:
                if not folder.exists():  # otherwise another process of the run was faster
                    raise
    return folder / "node_modules"


def install(folder: Path) -> None:
    """Run `npm ci`. Skips the test if the registry cannot be reached."""
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=60000"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode and UNREACHABLE.search(done.stderr):
        pytest.skip(f"npm's registry cannot be reached: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stdout + done.stderr

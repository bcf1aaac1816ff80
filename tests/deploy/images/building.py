"""Build the images with buildah, on the official Python image or on a stand-in for it.

Where no registry can be reached, the stand-in is Debian with its own Python, made by mmdebstrap from Debian's
packages. The Dockerfile is the same; versions of Python and Debian, and sizes by a few MB, differ.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.images.engine import Engine, Failed, Missing

ROOT = Path(__file__).parent.parent.parent.parent
SERVICES = ("gateway", "router", "batcher", "upstream", "worker")
STAND_IN = "localhost/python-stand-in"
# All files in the images have this time; it is SOURCE_DATE_EPOCH in the Dockerfile.
EPOCH = "315532800"
_MIRROR = "http://deb.debian.org/debian"
_PULL_SECONDS = 120
_CONTAINERFILE = """FROM scratch
ADD base.tar /
RUN ["/bin/ln", "-s", "/usr/bin/python3", "/usr/local/bin/python"]
ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin
"""


@dataclass(frozen=True)
class Built:
    """An image that was built.

    size     in bytes, unpacked
    layers   digests of its layers
    """

    name: str
    size: int
    layers: tuple[str, ...]
    seconds: float


def pinned() -> str:
    """Return the image that the Dockerfile names, with its digest."""
    found = re.search(
        r"^ARG PYTHON_IMAGE=(\S+@sha256:[0-9a-f]{64})$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    assert found, "the Dockerfile names a base image without a digest"
    return found[1]


def base_image(engine: Engine, wanted: str) -> str:
    """Return the name of the base image.

    wanted   "official", "stand-in", "any" for the first of them that can be had, or the name of another image

    Raises Missing.
    """
    if wanted not in ("any", "official", "stand-in"):
        return wanted
    if wanted != "stand-in":
        try:
            engine.buildah("pull", pinned(), timeout=_PULL_SECONDS)
        except (Failed, subprocess.TimeoutExpired) as error:
            if wanted == "official":
                raise Missing(f"{pinned()} cannot be pulled: {error}") from None
        else:
            return pinned()
    # An earlier run may have kept it.
    if STAND_IN in engine.buildah("images", "--format", "{{.Name}}"):
        return STAND_IN
    if not shutil.which("mmdebstrap"):
        raise Missing("no registry can be reached, and mmdebstrap, which makes a stand-in, is not installed")
    folder = engine.folder / "base"
    folder.mkdir(exist_ok=True)
    subprocess.run(
        [
            *("nice", "mmdebstrap", "--quiet", "--variant=minbase"),
            "--include=python3,python3-venv,python3-pip,ca-certificates",
            *("bookworm", str(folder / "base.tar"), _MIRROR),
        ],
        env=os.environ | {"SOURCE_DATE_EPOCH": EPOCH},
        check=True,
    )
    (folder / "Containerfile").write_text(_CONTAINERFILE)
    engine.buildah(
        *_BUILD, "--timestamp", EPOCH, "--tag", STAND_IN, "--file", "Containerfile", ".", cwd=folder
    )
    shutil.rmtree(folder)
    return STAND_IN


_BUILD = ("bud", "--isolation", "chroot", "--network", "host")


def build(engine: Engine, base: str, service: str, *, tag: str = "", anew: bool = False) -> Built:
    """Build the image of a service. *anew*: without anything that an earlier build left."""
    name = f"localhost/headrace-{service}:{tag or version()}"
    started = time.monotonic()
    options, arguments = _access()
    engine.buildah(
        *_BUILD,
        *("--timestamp", EPOCH, "--layers", *(["--no-cache"] if anew else []), *options),
        *("--build-arg", f"PYTHON_IMAGE={base}", "--build-arg", f"REVISION={_revision()}", *arguments),
        *("--target", service, "--tag", name, "."),
        cwd=ROOT,
    )
    found = engine.inspect(name)
    return Built(name, found["Size"], tuple(found["RootFS"]["Layers"]), time.monotonic() - started)


def version() -> str:
    """Return Headrace's version, which is the tag of images."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def _access() -> tuple[list[str], list[str]]:
    """Return what lets pip in a build reach what pip here reaches: mounts, and arguments of the build.

    PIP_CERT and PIP_FIND_LINKS are settings of pip: certificates of a proxy, a folder of wheels.
    """
    mounts, words = [], []
    if certificates := os.environ.get("PIP_CERT"):
        mounts += ["--volume", f"{certificates}:/certificates.pem:ro"]
        words += ["--cert", "/certificates.pem"]
    wheels = os.environ.get("PIP_FIND_LINKS", "")
    if wheels and Path(wheels).is_dir():
        mounts += ["--volume", f"{wheels}:/wheels:ro"]
        words += ["--find-links", "/wheels"]
    else:
        words += ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
    return mounts, ["--build-arg", f"PIP_ARGS={' '.join(words)}"]


def _revision() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"

"""buildah and podman with a storage of their own, so that nothing else of the machine is read or changed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Missing(Exception):
    """A program is not installed, or cannot work here."""


class Failed(Exception):
    """A command failed; the message has the end of its output."""


class Engine:
    """Runs the programs.

    folder   for images, containers and temporary files; `close` removes it
    """

    PROGRAMS = ("buildah", "podman", "runc")

    def __init__(self, folder: Path) -> None:
        if lacking := [name for name in self.PROGRAMS if not shutil.which(name)]:
            raise Missing(
                f"{', '.join(lacking)} not installed: apt-get install --no-install-recommends buildah podman "
                "runc mmdebstrap"
            )
        if os.geteuid():
            raise Missing("this needs root: it builds without user namespaces")
        self.folder = folder
        self._environment = os.environ | {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
        for name in ("home", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._storage = [
            "--root",
            str(folder / "storage"),
            "--runroot",
            str(folder / "run"),
            "--storage-driver",
            "overlay",
        ]

    def buildah(self, *arguments: str, cwd: Path | None = None, timeout: float = 3600) -> str:
        """Return the output of buildah. Raises Failed."""
        return self._run(["nice", "buildah", *self._storage, *arguments], cwd, timeout)

    def podman(self, *arguments: str, timeout: float = 120) -> str:
        """Return the output of podman. Raises Failed."""
        # Neither systemd nor its journal is there in containers and small virtual machines.
        options = ["--runtime", "runc", "--cgroup-manager", "cgroupfs", "--events-backend", "none"]
        return self._run(["podman", *self._storage, *options, *arguments], None, timeout)

    def inspect(self, image: str) -> Any:
        """Return what podman knows about an image."""
        return json.loads(self.podman("image", "inspect", image))[0]

    def start(self, name: str, image: str, arguments: tuple[str, ...], volumes: Mapping[Path, str]) -> None:
        """Start a container as restricted as in a cluster, on the network of this machine."""
        self.podman("run", "--detach", "--name", name, *hardened(), *_mounts(volumes), image, *arguments)

    def run(self, image: str, *command: str) -> str:
        """Return the output of a command in a container of the image. Raises Failed."""
        program, *arguments = command
        return self.podman("run", "--rm", *hardened(), "--entrypoint", program, image, *arguments)

    def close(self) -> None:
        """Remove containers, images and files."""
        for arguments in (("rm", "--all", "--force"), ("image", "umount", "--all")):
            try:
                self.podman(*arguments)
            except (Failed, subprocess.TimeoutExpired) as error:
                print(error)
        # The programs leave the folder of layers mounted on itself.
        layers = self.folder / "storage" / "overlay"
        subprocess.run(["umount", "--lazy", str(layers)], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, command: list[str], cwd: Path | None, timeout: float) -> str:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self._environment,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = (done.stdout[-1500:] + done.stderr[-3000:]).strip()
            raise Failed(f"`{' '.join(command[:1] + command[-6:])}` failed with {done.returncode}:\n{lines}")
        return done.stdout


def hardened() -> list[str]:
    """Return the options that stand for the security context in k8s/base."""
    # The limits that podman sets by default need a capability that some machines lack.
    files, processes = (
        resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)
    )
    limits = [f"nofile={_limit(files)}", f"nproc={_limit(processes)}"]
    return [
        *("--network", "host", "--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp"),
        *("--cap-drop", "all", "--security-opt", "no-new-privileges"),
        *(word for limit in limits for word in ("--ulimit", limit)),
    ]


def _limit(hard: int) -> str:
    value = 16384 if hard == resource.RLIM_INFINITY else min(hard, 16384)
    return f"{value}:{value}"


def _mounts(volumes: Mapping[Path, str]) -> list[str]:
    return [word for folder, place in volumes.items() for word in ("--volume", f"{folder}:{place}")]

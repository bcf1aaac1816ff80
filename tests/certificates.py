"""Certificates of test meshes, as settings of services and as arguments of `connect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.cli.launch.certificates import CA, HOSTS, ROLES, cert_file, issue, key_file


@dataclass(frozen=True)
class Certificates:
    """Certificates of one authority, in a folder."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The file of the authority."""
        return self.folder / CA

    def client(self, name: str = "admin") -> dict[str, Any]:
        """Return the arguments of `connect` with the certificate of *name*."""
        return {"ca": self.ca, "cert": cert_file(self.folder, name), "key": key_file(self.folder, name)}

    def settings(self, name: str) -> dict[str, Any]:
        """Return the settings of a service with the certificate of *name*."""
        return {f"tls_{kind}": path for kind, path in self.client(name).items()}

    def mesh(self) -> dict[str, Any]:
        """Return the arguments of `running_mesh`."""
        services = {f"{role}_settings": self.settings(role) for role in ("router", "batcher", "worker")}
        return {**services, "client_options": self.client()}


def issued(
    folder: Path,
    names: Sequence[str] = (*ROLES, "caller"),
    *,
    hosts: Sequence[str] = HOSTS,
    days: float = 1.0,
) -> Certificates:
    """Issue certificates for each of *names*: roles, and names of callers."""
    issue(folder, names, hosts=hosts, days=days)
    return Certificates(folder)


def replace(path: Path, data: bytes) -> None:
    """Replace a file at once, as Kubernetes and `headrace certs` do."""
    new = path.with_suffix(".tmp")
    new.write_bytes(data)
    new.replace(path)

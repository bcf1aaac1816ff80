"""Print a software bill of materials in CycloneDX's JSON: `python sbom.py SERVICE ROOT FOLDER...`.

It has the packages of Python in the folders and the packages of Debian that files in the root come from.
Equal contents give an equal document: it has neither a time nor a random number.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import uuid
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any


def main(service: str, root: str, *folders: str) -> None:
    """Print the document."""
    components = [_python_package(package) for package in distributions(path=list(folders))]
    components += _debian_packages(Path(root))
    components.append(_component("generic", "python", sys.version.split()[0], "Python-2.0"))
    components.sort(key=lambda component: component["bom-ref"])
    version = next(c["version"] for c in components if c["name"] == "headrace")
    digest = hashlib.sha256(json.dumps(components).encode()).digest()
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.UUID(bytes=digest[:16], version=4)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "bom-ref": f"headrace-{service}",
                "name": f"headrace-{service}",
                "version": version,
            }
        },
        "components": components,
    }
    print(json.dumps(document, indent=1))


def _component(kind: str, name: str, version: str, licence: str | None) -> dict[str, Any]:
    purl = f"pkg:{kind}/{name.lower().replace('_', '-')}@{version.replace('+', '%2B').replace(':', '%3A')}"
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
    }
    if licence:
        component["licenses"] = [{"license": {"name": licence}}]
    return component


def _python_package(package: Distribution) -> dict[str, Any]:
    metadata = package.metadata
    licence = metadata.get("License-Expression") or (metadata.get("License") or "").partition("\n")[0]
    return _component("pypi", metadata["Name"], package.version, licence or None)


def _debian_packages(root: Path) -> Iterator[dict[str, Any]]:
    for file in sorted((root / "var/lib/dpkg/status.d").iterdir()):
        fields = dict(re.findall(r"^(\S+): (.*)$", file.read_text(), re.MULTILINE))
        yield _component("deb/debian", fields["Package"], fields["Version"], None)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Keep the .env files of k8s/base complete: every setting of the services, with its value there.

`python -m tests.deploy.settings_files` adds new settings with their defaults, removes those that no longer
exist, and keeps all other values. A setting without a default is a comment: `# HEADRACE_PRICES=`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from headrace.batcher.settings import Settings as BatcherSettings
from headrace.gateway.settings import Settings as GatewaySettings
from headrace.router.settings import Settings as RouterSettings
from headrace.runtime.settings import PREFIX, ProcessSettings, ServiceSettings
from headrace.upstream.settings import Settings as UpstreamSettings
from headrace.worker.settings import Settings as WorkerSettings

K8S = Path(__file__).parent.parent.parent / "k8s"
SETTINGS: dict[str, type[ProcessSettings]] = {
    "gateway": GatewaySettings,
    "router": RouterSettings,
    "batcher": BatcherSettings,
    "upstream": UpstreamSettings,
    "worker": WorkerSettings,
}
BASE = K8S / "base"
# What all services share, what of it the gateway shares, which speaks no gRPC, what batcher and worker of
# a tier share, and what follows from the tier's name.
OF_THE_MESH = tuple(
    name
    for name, field in ServiceSettings.model_fields.items()
    if all(
        kind.model_fields[name].default == field.default
        for kind in SETTINGS.values()
        if issubclass(kind, ServiceSettings)
    )
)
WITH_THE_GATEWAY = tuple(
    name
    for name, field in GatewaySettings.model_fields.items()
    if name in OF_THE_MESH and field.default == ServiceSettings.model_fields[name].default
)
OF_THE_TIER = ("model",)
FROM_THE_NAME = ("tier", "workers")


@dataclass(frozen=True)
class SettingsFile:
    """A file of settings: which class they are of, and which fields are in other places."""

    path: Path
    kind: type[ProcessSettings]
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def fields(self) -> list[str]:
        """The settings that belong into the file, in the order of the class."""
        return list(self.only) or [name for name in self.kind.model_fields if name not in self.without]


FILES = (
    SettingsFile(BASE / "mesh.env", ServiceSettings, only=OF_THE_MESH),
    SettingsFile(BASE / "gateway.env", GatewaySettings, without=WITH_THE_GATEWAY),
    SettingsFile(BASE / "router.env", RouterSettings, without=OF_THE_MESH),
    SettingsFile(BASE / "tier" / "tier.env", BatcherSettings, only=OF_THE_TIER),
    SettingsFile(
        BASE / "tier" / "batcher.env", BatcherSettings, without=OF_THE_MESH + OF_THE_TIER + FROM_THE_NAME
    ),
    SettingsFile(
        BASE / "tier" / "worker.env", WorkerSettings, without=OF_THE_MESH + OF_THE_TIER + FROM_THE_NAME
    ),
    SettingsFile(BASE / "upstream" / "upstream.env", UpstreamSettings, without=OF_THE_MESH + FROM_THE_NAME),
)
HEAD = "# docs/operating.md explains these settings. Those in comments have no default.\n"
LINE = re.compile(rf"(?P<comment># )?{PREFIX}(?P<name>\w+)=(?P<value>.*)")


def written(path: Path) -> dict[str, str | None]:
    """Return the settings in a file, in their order; the value of one in a comment is None."""
    found: dict[str, str | None] = {}
    for line in path.read_text().splitlines():
        if match := LINE.fullmatch(line):
            assert match["name"].lower() not in found, f"{path.name} has HEADRACE_{match['name']} twice"
            found[match["name"].lower()] = None if match["comment"] else match["value"]
    return found


def default_of(kind: type[ProcessSettings], name: str) -> str | None:
    """Return a default as the environment would have it, or None."""
    value: Any = kind.model_fields[name].default
    if value is PydanticUndefined or value is None or value == "":
        return None
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def completed(file: SettingsFile) -> str:
    """Return what the file contains when it is complete."""
    present = written(file.path)
    lines = [HEAD]
    for name in file.fields:
        value = present.get(name)
        value = default_of(file.kind, name) if value is None else value
        lines.append(f"{'# ' if value is None else ''}{PREFIX}{name.upper()}={value or ''}\n")
    return "".join(lines)


def main() -> None:
    """Write the files."""
    for file in FILES:
        file.path.write_text(completed(file))


if __name__ == "__main__":
    main()

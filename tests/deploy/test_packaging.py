"""The extras install what the services import, and the image refers to what exists."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from headrace import models
from headrace.runtime.settings import PREFIX, ServiceSettings
from tests.deploy.settings_files import SETTINGS

ROOT = Path(__file__).parent.parent.parent
# Variables that are not settings of a service: the Dockerfile's own, and the cache folder.
OTHERS = {f"{PREFIX}SERVICE", f"{PREFIX}CACHE"}


# Runs a module with imports limited to what one of our extras requires, directly or indirectly.
ONLY_WITH = """
import importlib.metadata as metadata, json, runpy, sys
from packaging.requirements import Requirement

ours, extra, module, *arguments = sys.argv[1:]
project = json.loads(ours)
asked = set()

def ask(name, extras):
    name = name.lower().replace("_", "-")
    if (name, extras) in asked:
        return
    asked.add((name, extras))
    if name == "headrace":
        needs = [*project["dependencies"], *(need for each in extras for need in project["extras"][each])]
    else:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another system
            return
    for need in map(Requirement, needs):
        if not need.marker or any(need.marker.evaluate({"extra": each}) for each in (*extras, "")):
            ask(need.name, tuple(sorted(need.extras)))

ask("headrace", (extra,))
brought = {name for name, _ in asked} | {"headrace"}
for top, names in metadata.packages_distributions().items():
    if not brought & {name.lower().replace("_", "-") for name in names}:
        sys.modules[top] = None  # as if it were not there
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def only_with(extra: str, *command: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = {"dependencies": project["dependencies"], "extras": project["optional-dependencies"]}
    out = subprocess.run(
        [sys.executable, "-c", ONLY_WITH, json.dumps(ours), extra, *command],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("extra", [*SETTINGS, "cli"])
def test_an_extra_installs_all_that_its_command_imports(extra: str) -> None:
    only_with(extra, f"headrace.{extra}", "--help")


@pytest.mark.model
def test_the_batcher_extra_can_read_the_tokenizer_of_a_default_model(tmp_path: Path) -> None:
    """An image without these packages would start only where the tokenizer is cached."""
    (tmp_path / "load.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from headrace.batcher.text.tokens import load_tokenizer\n"
        "load_tokenizer(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    model = models.resolve(models.SMALL, models.cache_folder(), weights=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
        only_with("batcher", "load", str(model), str(tmp_path))

    assert list((tmp_path / "tokenizers").iterdir())


def test_the_image_refers_to_existing_files_extras_and_settings() -> None:
    """Each service has an extra and a module."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    built = re.findall(r"docker build .*(?:--build-arg SERVICE=|--target )(\w+)", dockerfile)
    assert list(dict.fromkeys(built)) == list(SETTINGS)
    for service in SETTINGS:
        assert service in project["optional-dependencies"]
        assert (ROOT / "services" / "headrace" / service / "__main__.py").exists()
    for source in re.findall(r"^COPY ([^-].*) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())
    for name in re.findall(r"(HEADRACE_\w+)=", dockerfile):
        assert name in OTHERS or name.removeprefix(PREFIX).lower() in ServiceSettings.model_fields

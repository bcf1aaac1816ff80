"""Manifests and image agree with the services: settings, ports, probes, drains."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace import models
from headrace.batcher.settings import Settings as BatcherSettings
from headrace.router.settings import Settings as RouterSettings
from headrace.runtime.limits import MIB
from headrace.runtime.server import LIVENESS, READINESS
from headrace.runtime.settings import PREFIX, ServiceSettings
from headrace.runtime.turns import TURNS
from headrace.validation import MAX_RESUME_TOKENS
from headrace.worker.settings import Settings as WorkerSettings
from tests.hostile.confine import parsed

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, type[ServiceSettings]] = {
    "router": RouterSettings,
    "batcher": BatcherSettings,
    "worker": WorkerSettings,
}
# Variables that are not ours, and those that have other readers: the Dockerfile's own, the cache folder.
OTHERS = {f"{PREFIX}SERVICE", f"{PREFIX}CACHE"}


def manifests(kind: str) -> list[dict[str, Any]]:
    base = ROOT / "k8s" / "base"
    listed = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    assert set(listed) == {path.name for path in base.glob("*.yaml")} - {"kustomization.yaml"}
    every = [found for name in listed for found in yaml.safe_load_all((base / name).read_text())]
    return [found for found in every if found["kind"] == kind]


DEPLOYMENTS = {found["metadata"]["name"]: found for found in manifests("Deployment")}


def container_of(name: str) -> dict[str, Any]:
    (container,) = DEPLOYMENTS[name]["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def settings_of(name: str, monkeypatch: pytest.MonkeyPatch) -> ServiceSettings:
    """What the service of the container would read."""
    container = container_of(name)
    kind = SETTINGS[container["name"]]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
        known = variable["name"].removeprefix(PREFIX).lower() in kind.model_fields
        assert known or not variable["name"].startswith(PREFIX) or variable["name"] in OTHERS
    return kind.load([])


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_service_takes_what_its_manifest_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, container = settings_of(name, monkeypatch), container_of(name)
    pod = DEPLOYMENTS[name]["spec"]["template"]["spec"]

    assert [port["containerPort"] for port in container["ports"]] == [settings.port]
    for probe, service in (
        ("startupProbe", LIVENESS),
        ("livenessProbe", LIVENESS),
        ("readinessProbe", READINESS),
    ):
        assert container[probe]["grpc"] == {"port": settings.port, "service": service}
    assert pod["terminationGracePeriodSeconds"] > settings.drain_seconds
    # A Service called `headrace` in the namespace sets HEADRACE_PORT=tcp://... otherwise.
    assert pod["enableServiceLinks"] is False
    assert re.fullmatch(rf"headrace-{container['name']}:[\d.]+", container["image"])


# What a process has without requests, and what each byte of a request in hand comes to at its worst: the
# message, its parsed form, what is forwarded, and the text as it is scored. Measured by tests/hostile.
BASE_BYTES = {"router": 100 * MIB, "batcher": 600 * MIB}
BYTES_PER_BYTE = 8
BYTES_PER_CALL = 64 * 1024
RUN_STREAMS = 64  # whose messages arrive at the same time


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_memory_of_a_pod_holds_what_its_settings_let_callers_send(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, container = settings_of(name, monkeypatch), container_of(name)
    limits, memory = settings.limits, parsed(container["resources"]["limits"]["memory"])

    assert parsed(container["resources"]["requests"]["memory"]) <= memory
    if container["name"] == "worker":  # bounded by its model; requests are token ids
        assert limits.held_bytes + RUN_STREAMS * limits.message_bytes < memory
        return
    requests = BYTES_PER_BYTE * limits.held_bytes + TURNS * limits.message_bytes
    calls = BYTES_PER_CALL * limits.calls
    assert BASE_BYTES[container["name"]] + requests + calls <= memory


def test_what_a_router_takes_fits_its_batchers_with_an_answer_to_continue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the longest prompts would be taken, and lost with the first batcher."""
    limits = {}
    for name in DEPLOYMENTS:
        with monkeypatch.context() as environment:
            limits[name] = settings_of(name, environment).limits.message_bytes
    resumed = MAX_RESUME_TOKENS * 3  # bytes of an id below two million

    for name in ("batcher-small", "batcher-large"):
        assert limits["router"] + resumed + 4096 <= limits[name]


def test_what_services_ask_for_by_name_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    served = {
        f"{found['metadata']['name']}:{found['spec']['ports'][0]['port']}" for found in manifests("Service")
    }
    asked = set()
    for name in DEPLOYMENTS:
        with monkeypatch.context() as environment:
            settings = settings_of(name, environment)
        if isinstance(settings, RouterSettings):
            asked |= {target for _, targets in settings.tier_targets() for target in targets}
        elif isinstance(settings, BatcherSettings):
            asked |= set(settings.worker_targets)

    assert len(asked) == 4
    assert {target.removeprefix("dns:///") for target in asked} < served
    assert {found["metadata"]["name"] for found in manifests("Service")} == set(DEPLOYMENTS)


def test_the_tiers_of_router_and_batchers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batcher's tier and model are its worker's, and the router knows it by that name."""
    tiers = {}
    for name in DEPLOYMENTS:
        with monkeypatch.context() as environment:
            settings = settings_of(name, environment)
        if isinstance(settings, BatcherSettings):
            assert settings.worker_targets == [f"dns:///worker-{settings.tier}:50053"]
            tiers[settings.tier] = settings.model
        elif isinstance(settings, RouterSettings):
            routed = [tier for tier, _ in settings.tier_targets()]

    assert list(tiers) == routed
    for tier, model in tiers.items():
        env = {variable["name"]: variable["value"] for variable in container_of(f"worker-{tier}")["env"]}
        assert env[f"{PREFIX}MODEL"] == model


def test_what_the_manifests_suggest_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """In comments, where nothing else would notice."""
    suggested = re.findall(
        r"# - \{name: (\w+), value: \"?([^\"}]+)", (ROOT / "k8s" / "base" / "router.yaml").read_text()
    )
    assert len(suggested) == 3
    for name, value in suggested:
        assert name.removeprefix(PREFIX).lower() in RouterSettings.model_fields
        monkeypatch.setenv(name, value)

    settings_of("router", monkeypatch)


# Run a module where nothing can be imported but what an extra of ours asks for, directly or not.
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
def test_an_extra_brings_all_that_its_command_imports(extra: str) -> None:
    only_with(extra, f"headrace.{extra}", "--help")


@pytest.mark.model
def test_the_extra_of_the_batcher_brings_what_reads_the_tokenizer_of_a_default_model(tmp_path: Path) -> None:
    """An image that has less starts where the tokenizer is cached, and nowhere else."""
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


def test_the_image_builds_what_is_there() -> None:
    """Each service has an extra to install and a module to run; the version is the one that is deployed."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert re.findall(r"--build-arg SERVICE=(\w+)", dockerfile) == list(SETTINGS)
    for service in SETTINGS:
        assert service in project["optional-dependencies"]
        assert (ROOT / "services" / "headrace" / service / "__main__.py").exists()
    for source in re.findall(r"^COPY ([^-].*) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())
    for name in re.findall(r"(HEADRACE_\w+)=", dockerfile):
        assert name in OTHERS or name.removeprefix(PREFIX).lower() in ServiceSettings.model_fields
    for name in DEPLOYMENTS:
        assert container_of(name)["image"].endswith(f":{project['version']}")

"""Manifests and image agree with the services on settings, ports, probes and drains."""

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
from headrace.runtime.serving.interceptor import MAX_STARTING
from headrace.runtime.serving.limits import MIB
from headrace.runtime.serving.server import LIVENESS, READINESS
from headrace.runtime.settings import PREFIX, ServiceSettings
from headrace.validation import MAX_RESUME_TOKENS
from headrace.worker.settings import Settings as WorkerSettings
from tests.hostile.confine import parsed

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, type[ServiceSettings]] = {
    "router": RouterSettings,
    "batcher": BatcherSettings,
    "worker": WorkerSettings,
}
# Variables that are not settings of a service: the Dockerfile's own, and the cache folder.
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
    """Return the settings that the container's service reads."""
    container = container_of(name)
    kind = SETTINGS[container["name"]]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
        known = variable["name"].removeprefix(PREFIX).lower() in kind.model_fields
        assert known or not variable["name"].startswith(PREFIX) or variable["name"] in OTHERS
    return kind.load([])


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_service_accepts_the_settings_of_its_manifest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    # Else a Service named `headrace` in the namespace would set HEADRACE_PORT=tcp://...
    assert pod["enableServiceLinks"] is False
    assert re.fullmatch(rf"headrace-{container['name']}:[\d.]+", container["image"])


# Memory of an idle process, and the most memory per byte of a request in flight: the message, its parsed
# form, the forwarded message, and the text for the score. Measured by tests/hostile.
BASE_BYTES = {"router": 100 * MIB, "batcher": 600 * MIB}
BYTES_PER_BYTE = 8
BYTES_PER_CALL = 64 * 1024
RUN_STREAMS = 64  # whose messages arrive at the same time


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_memory_limit_of_a_pod_covers_what_its_settings_admit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, container = settings_of(name, monkeypatch), container_of(name)
    limits, memory = settings.limits, parsed(container["resources"]["limits"]["memory"])

    assert parsed(container["resources"]["requests"]["memory"]) <= memory
    if container["name"] == "worker":  # the model bounds it; requests are token ids
        assert limits.max_inflight_bytes + RUN_STREAMS * limits.max_message_bytes < memory
        return
    requests = BYTES_PER_BYTE * limits.max_inflight_bytes + MAX_STARTING * limits.max_message_bytes
    calls = BYTES_PER_CALL * limits.max_calls
    assert BASE_BYTES[container["name"]] + requests + calls <= memory


def test_what_a_router_admits_fits_its_batchers_with_an_answer_to_resume(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the longest prompts would be admitted, and lost with the first batcher."""
    limits = {}
    for name in DEPLOYMENTS:
        with monkeypatch.context() as environment:
            limits[name] = settings_of(name, environment).limits.max_message_bytes
    resumed = MAX_RESUME_TOKENS * 3  # bytes of an id below two million

    for name in ("batcher-small", "batcher-large"):
        assert limits["router"] + resumed + 4096 <= limits[name]


def test_every_name_that_a_manifest_refers_to_exists(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_router_batchers_and_workers_agree_on_the_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batcher has the tier and the model of its worker, and the router uses the same tier name."""
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


def test_settings_in_comments_of_the_manifests_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    suggested = re.findall(
        r"# - \{name: (\w+), value: \"?([^\"}]+)", (ROOT / "k8s" / "base" / "router.yaml").read_text()
    )
    assert len(suggested) == 3
    for name, value in suggested:
        assert name.removeprefix(PREFIX).lower() in RouterSettings.model_fields
        monkeypatch.setenv(name, value)

    settings_of("router", monkeypatch)


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
    """Each service has an extra and a module; the manifests deploy the project's version."""
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

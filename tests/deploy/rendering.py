"""Render overlays with kubectl, and read what a pod of them gets."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from tests.deploy import tools
from tests.deploy.settings_files import K8S, SETTINGS

Resource: TypeAlias = dict[str, Any]

OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
# What an overlay lists as components, and what the folder of a tier lists.
OF_OVERLAYS = (
    "anonymous",
    "callers",
    "gpu",
    "autoscaling/gateways",
    "autoscaling/routers",
    "telemetry",
    "network-policies",
    "mtls",
    "mtls/tokens",
    "quotas",
    "gateway-api",
    "gateway-api/tls",
    "priority",
)
OF_TIERS = ("model-cache", "model-image", "tokenizer-image", "autoscaling/tier")
TRANSFORMERS = ("tier-name", "autoscaling/to-zero")


def render(folder: Path) -> list[Resource]:
    """Return the resources of a kustomization, or skip the test if there is no kubectl."""
    kubectl = tools.need("kubectl")
    done = subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    assert "deprecated" not in done.stderr
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def overlay(name: str) -> tuple[Resource, ...]:
    """Return the resources of an overlay."""
    return tuple(render(K8S / "overlays" / name))


def combined(
    folder: Path, of_overlay: Sequence[str], of_tier: Sequence[str] = (), transformers: Sequence[str] = ()
) -> list[Resource]:
    """Render a mesh of one tier with the given components. *folder* is empty, for its files."""

    def paths(start: Path, names: Iterable[str]) -> list[str]:
        return [os.path.relpath(K8S / "components" / name, start.resolve()) for name in names]

    tier = folder / "small"
    tier.mkdir()
    common = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    of_the_tier = {
        "resources": [os.path.relpath(K8S / "base" / "tier", tier.resolve())],
        "components": paths(tier, of_tier),
        "transformers": paths(tier, transformers),
        "nameSuffix": "-small",
        "labels": [{"pairs": {"headrace/tier": "small"}, "includeSelectors": True}],
        "configMapGenerator": [
            {"name": "tier", "behavior": "merge", "literals": ["HEADRACE_FAKE=true"]},
            {"name": "worker", "behavior": "merge", "literals": ["HEADRACE_ENGINE=echo"]},
        ],
    }
    (tier / "kustomization.yaml").write_text(yaml.safe_dump(common | of_the_tier))
    of_the_mesh = {
        "namespace": "headrace",
        "resources": [os.path.relpath(K8S / "base", folder.resolve()), "small"],
        "components": paths(folder, of_overlay),
        "configMapGenerator": [
            {
                "name": "router",
                "behavior": "merge",
                "literals": ["HEADRACE_TIERS=small=dns:///batcher-small:50052"],
            }
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(common | of_the_mesh))
    return render(folder)


def of_kind(resources: Iterable[Resource], kind: str) -> dict[str, Resource]:
    """Return the resources of a kind by name."""
    return {each["metadata"]["name"]: each for each in resources if each["kind"] == kind}


def services(resources: Iterable[Resource]) -> dict[str, Resource]:
    """Return the Deployments of gateways, routers, batchers and workers by name."""
    deployments = of_kind(resources, "Deployment")
    return {name: each for name, each in deployments.items() if container(each)["name"] in SETTINGS}


def container(deployment: Resource) -> Resource:
    """Return the only container of a Deployment."""
    (only,) = pod(deployment)["containers"]
    assert isinstance(only, dict)
    return only


def pod(deployment: Resource) -> Resource:
    """Return the spec of a Deployment's pods."""
    spec = deployment["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def environment(resources: Iterable[Resource], deployment: Resource) -> dict[str, str]:
    """Return the variables of a pod, as the kubelet computes them: `envFrom`, then `env` in order."""
    maps = of_kind(resources, "ConfigMap")
    found: dict[str, str] = {}
    for source in container(deployment).get("envFrom", ()):
        found |= maps[source["configMapRef"]["name"]]["data"]
    defined: dict[str, str] = {}  # `$(NAME)` refers to variables of `env` before it
    for variable in container(deployment).get("env", ()):
        defined[variable["name"]] = _value(variable, deployment, defined)
    return found | defined


def _value(variable: Mapping[str, Any], deployment: Resource, defined: Mapping[str, str]) -> str:
    if "value" in variable:
        return re.sub(r"\$\((\w+)\)", lambda match: defined.get(match[1], match[0]), variable["value"])
    path = variable["valueFrom"]["fieldRef"]["fieldPath"]
    if path in ("metadata.name", "metadata.namespace"):
        return str(deployment["metadata"][path.removeprefix("metadata.")])
    match = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
    assert match, path
    label = deployment["spec"]["template"]["metadata"]["labels"][match[1]]
    assert isinstance(label, str)
    return label

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
# Of a tier, each in place of its worker, and what a tier with one sets.
INSTEAD_OF_WORKERS = {
    "vllm": "--tensor-parallel-size 1",
    "vllm-multinode": "--tensor-parallel-size 8 --pipeline-parallel-size 2",
}


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
    """Render a mesh of a tier and an upstream with the given components. *folder* is empty, for its files."""

    def paths(start: Path, names: Iterable[str]) -> list[str]:
        return [os.path.relpath(K8S / "components" / name, start.resolve()) for name in names]

    engines = [INSTEAD_OF_WORKERS[name] for name in of_tier if name in INSTEAD_OF_WORKERS]
    # By ConfigMap: echo engines, which need no model, or vLLM.
    literals = {"batcher": "HEADRACE_FAKE=true", "worker": "HEADRACE_ENGINE=echo"}
    if engines:
        literals = {"tier": "HEADRACE_MODEL=org/model", "worker": f"HEADRACE_ENGINE_ARGS={engines[0]}"}
    tier, upstream = folder / "small", folder / "cloud"
    tier.mkdir()
    upstream.mkdir()
    common = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    of_the_tier = {
        "resources": [os.path.relpath(K8S / "base" / "tier", tier.resolve())],
        "components": paths(tier, of_tier),
        "transformers": paths(tier, transformers),
        "nameSuffix": "-small",
        "labels": [{"pairs": {"headrace/tier": "small"}, "includeSelectors": True}],
        "configMapGenerator": [
            {"name": name, "behavior": "merge", "literals": [literal]} for name, literal in literals.items()
        ],
    }
    (tier / "kustomization.yaml").write_text(yaml.safe_dump(common | of_the_tier))
    of_the_upstream = {
        "resources": [os.path.relpath(K8S / "base" / "upstream", upstream.resolve())],
        "nameSuffix": "-cloud",
        "labels": [{"pairs": {"headrace/tier": "cloud"}, "includeSelectors": True}],
        "configMapGenerator": [
            {
                "name": "upstream",
                "behavior": "merge",
                "literals": ["HEADRACE_URL=https://api.example.com/v1", "HEADRACE_MODEL=big"],
            }
        ],
    }
    (upstream / "kustomization.yaml").write_text(yaml.safe_dump(common | of_the_upstream))
    of_the_mesh = {
        "namespace": "headrace",
        "resources": [os.path.relpath(K8S / "base", folder.resolve()), "small", "cloud"],
        "components": paths(folder, of_overlay),
        "configMapGenerator": [
            {
                "name": "router",
                "behavior": "merge",
                "literals": [
                    "HEADRACE_TIERS=small=dns:///batcher-small:50052,cloud=dns:///batcher-cloud:50054"
                ],
            }
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(common | of_the_mesh))
    return render(folder)


def of_kind(resources: Iterable[Resource], kind: str) -> dict[str, Resource]:
    """Return the resources of a kind by name."""
    return {each["metadata"]["name"]: each for each in resources if each["kind"] == kind}


def services(resources: Iterable[Resource]) -> dict[str, Resource]:
    """Return what runs gateways, routers, batchers, upstreams and workers, by name."""
    found = workloads(resources)
    return {name: each for name, each in found.items() if container(each)["name"] in SETTINGS}


def workloads(resources: Iterable[Resource]) -> dict[str, Resource]:
    """Return what runs pods without end, by name; of groups of pods, the leader runs a service."""
    kinds = ("Deployment", "StatefulSet", "LeaderWorkerSet")
    return {name: each for kind in kinds for name, each in of_kind(resources, kind).items()}


def template(workload: Resource) -> Resource:
    """Return the template of a workload's pods; of a group's, that of the leader."""
    spec = workload["spec"]
    found = spec["template"] if "template" in spec else spec["leaderWorkerTemplate"]["leaderTemplate"]
    assert isinstance(found, dict)
    return found


def container(deployment: Resource) -> Resource:
    """Return the only container of a Deployment."""
    (only,) = pod(deployment)["containers"]
    assert isinstance(only, dict)
    return only


def pod(deployment: Resource) -> Resource:
    """Return the spec of a workload's pods."""
    spec = template(deployment)["spec"]
    assert isinstance(spec, dict)
    return spec


def environment(resources: Iterable[Resource], deployment: Resource) -> dict[str, str]:
    """Return the variables of a pod, as the kubelet computes them: `envFrom`, then `env` in order."""
    maps = of_kind(resources, "ConfigMap")
    found: dict[str, str] = {}
    for source in container(deployment).get("envFrom", ()):
        found |= maps[source["configMapRef"]["name"]].get("data", {})
    defined: dict[str, str] = {}  # `$(NAME)` refers to variables of `env` before it
    for variable in container(deployment).get("env", ()):
        defined[variable["name"]] = _value(variable, deployment, defined)
    return found | defined


def _value(variable: Mapping[str, Any], deployment: Resource, defined: Mapping[str, str]) -> str:
    if "value" in variable:
        return re.sub(r"\$\((\w+)\)", lambda match: defined.get(match[1], match[0]), variable["value"])
    path = variable["valueFrom"]["fieldRef"]["fieldPath"]
    if path == "status.podIP":
        return "10.0.0.1"
    if path in ("metadata.name", "metadata.namespace"):
        return str(deployment["metadata"][path.removeprefix("metadata.")])
    match = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
    assert match, path
    label = template(deployment)["metadata"]["labels"][match[1]]
    assert isinstance(label, str)
    return label

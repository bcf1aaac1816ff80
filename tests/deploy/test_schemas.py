"""Resources have the fields and values that Kubernetes and the operators accept."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.deploy import tools
from tests.deploy.rendering import (
    INSTEAD_OF_WORKERS,
    OF_OVERLAYS,
    OF_TIERS,
    OVERLAYS,
    TRANSFORMERS,
    Resource,
    combined,
    of_kind,
    overlay,
)

VERSIONS = ("1.31", "1.34", "1.37")  # the oldest that is supported, one between, and the newest
# Packages of schemas by API group.
PACKAGES = {
    "cert-manager.io": "cert-manager",
    "gateway.networking.k8s.io": "gateway-api",
    "keda.sh": "keda",
    "monitoring.coreos.com": "prometheus-operator",
}
# No package has the schema of a group of pods: its fields are checked here, its pods like a Deployment's.
GROUP = "leaderworkerset.x-k8s.io/v1"
GROUP_FIELDS = {
    "": {"replicas", "leaderWorkerTemplate", "rolloutStrategy", "startupPolicy", "networkConfig"},
    "leaderWorkerTemplate": {
        *("leaderTemplate", "workerTemplate", "size", "restartPolicy", "subGroupPolicy"),
        *("volumeClaimTemplates", "persistentVolumeClaimRetentionPolicy"),
    },
    "rolloutStrategy": {"type", "rollingUpdateConfiguration"},
}
SCRIPT = Path(__file__).parent / "crds" / "validate.mjs"
# Prints a problem per line. Reads a stream of YAML.
VALIDATE = """
import sys, yaml, kubernetes_validate
for resource in yaml.safe_load_all(sys.stdin):
    for version in sys.argv[1:]:
        try:
            kubernetes_validate.validate(resource, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            name = f"{resource['kind']}/{resource['metadata']['name']}"
            print(name, version, ".".join(map(str, error.path)), error.message)
"""


def is_custom(resource: Resource) -> bool:
    """Return whether an operator, rather than Kubernetes, defines the resource."""
    return str(resource["apiVersion"]).partition("/")[0] in PACKAGES


def pods_of_groups(resources: Sequence[Resource]) -> list[Resource]:
    """Return Deployments with the pods of groups: of the leader, and of the others."""
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": f"{role}-of-{name}"},
            "spec": {
                "selector": {"matchLabels": pods["metadata"]["labels"]},
                "template": pods,
            },
        }
        for name, group in of_kind(resources, "LeaderWorkerSet").items()
        for role in ("leader", "worker")
        for pods in [group["spec"]["leaderWorkerTemplate"][f"{role}Template"]]
    ]


def kubernetes_problems(resources: Sequence[Resource]) -> list[str]:
    """Return the problems that the schemas of Kubernetes find."""
    known = [each for each in resources if not is_custom(each) and each["apiVersion"] != GROUP]
    done = subprocess.run(
        [tools.need("kubernetes-validate"), "-c", VALIDATE, *VERSIONS],
        input=yaml.safe_dump_all([*known, *pods_of_groups(resources)]),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    problems: list[str] = done.stdout.splitlines()
    return problems


def custom_problems(resources: Sequence[Resource], folder: Path) -> list[str]:
    """Return the problems that the schemas of the operators find: unknown fields by type, values by class."""
    crds = tools.need("crds")
    custom = [each for each in resources if is_custom(each)]
    lines = []
    for number, each in enumerate(custom):
        package = PACKAGES[each["apiVersion"].partition("/")[0]]
        module = crds / "@kubernetes-models" / package / each["apiVersion"] / f"{each['kind']}.js"
        lines += [
            f"import type {{ I{each['kind']} as T{number} }} from {json.dumps(str(module))};"
            f" export const r{number}: T{number} = {json.dumps(each)};"
        ]
    (folder / "check.mts").write_text("\n".join(lines))
    options = {"noEmit": True, "strict": True, "skipLibCheck": True, "types": [], "module": "nodenext"}
    (folder / "tsconfig.json").write_text(json.dumps({"compilerOptions": options, "files": ["check.mts"]}))
    compiled = _node(crds / "typescript" / "bin" / "tsc", "-p", folder, "--pretty", "false")
    validated = _node(SCRIPT, crds, given=json.dumps(custom))
    assert validated.returncode == 0, validated.stderr
    values = [": ".join(problem) for problem in json.loads(validated.stdout)]
    return [*filter(None, compiled.stdout.splitlines()), *values]


def _node(*arguments: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", *arguments], input=given, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid_for_kubernetes(name: str) -> None:
    assert not kubernetes_problems(overlay(name))


def test_all_components_are_valid(tmp_path: Path) -> None:
    found = combined(tmp_path, OF_OVERLAYS, OF_TIERS, TRANSFORMERS)

    assert {each["apiVersion"].partition("/")[0] for each in found if is_custom(each)} == set(PACKAGES)
    assert not kubernetes_problems(found)
    assert not custom_problems(found, tmp_path)


@pytest.mark.parametrize("name", INSTEAD_OF_WORKERS)
def test_workers_on_vllm_are_valid(name: str, tmp_path: Path) -> None:
    found = combined(tmp_path, OF_OVERLAYS, [name])

    assert not kubernetes_problems(found)
    for group in of_kind(found, "LeaderWorkerSet").values():
        spec = group["spec"]
        assert group["apiVersion"] == GROUP
        for field, known in GROUP_FIELDS.items():
            assert set(spec[field] if field else spec) <= known
        assert spec["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
        assert set(spec["rolloutStrategy"]["rollingUpdateConfiguration"]) <= {
            *("partition", "maxUnavailable", "maxSurge")
        }


def test_an_unknown_field_and_a_wrong_value_are_found(tmp_path: Path) -> None:
    """The checks above would otherwise pass if they checked nothing."""
    metadata = {"name": "wrong"}
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata,
        "spec": {"acessModes": []},
    }
    issuer = {
        "apiVersion": "cert-manager.io/v1",
        "kind": "Issuer",
        "metadata": metadata,
        "spec": {"selfsigned": {}},
    }
    scaled = {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": metadata,
        "spec": {"scaleTargetRef": {"name": "worker"}, "triggers": [{"type": "cron", "metadata": {"a": 1}}]},
    }

    assert len(kubernetes_problems([claim])) == len(VERSIONS)
    unknown, value, again = custom_problems([issuer, scaled], tmp_path)
    assert "selfsigned" in unknown
    assert "TS2322" in value
    assert again.startswith("ScaledObject/wrong: ")

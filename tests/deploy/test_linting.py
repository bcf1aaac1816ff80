"""Linters find nothing in manifests and Dockerfile but what k8s/waivers.toml allows, with a reason."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import yaml

from tests.deploy import tools
from tests.deploy.rendering import OF_OVERLAYS, OF_TIERS, TRANSFORMERS, combined, overlay, template
from tests.deploy.settings_files import K8S

WAIVERS: dict[str, dict[str, str]] = tomllib.loads((K8S / "waivers.toml").read_text())


def checkov(folder: Path) -> list[dict[str, Any]]:
    """Return what checkov finds in the manifests of a folder."""
    done = subprocess.run(
        [
            tools.need("checkov"),
            "-d",
            folder,
            "--framework",
            "kubernetes",
            "--compact",
            "--quiet",
            "-o",
            "json",
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["resource_count"] > 0
    assert report["summary"]["parsing_errors"] == 0
    found: list[dict[str, Any]] = report["results"]["failed_checks"]
    return found


def as_deployments(resource: dict[str, Any]) -> dict[str, Any]:
    """Return a group of pods as the Deployment of its leader, which checkov knows; others as they are."""
    if resource["kind"] != "LeaderWorkerSet":
        return resource
    pods = template(resource)
    spec = {"selector": {"matchLabels": pods["metadata"]["labels"]}, "template": pods}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": resource["metadata"], "spec": spec}


def test_checkov_finds_only_what_is_waived(tmp_path: Path) -> None:
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    for name in ("gpu", "gpu-vllm"):
        (manifests / f"{name}.yaml").write_text(yaml.safe_dump_all(overlay(name)))
    (tmp_path / "combined").mkdir()
    everything = combined(tmp_path / "combined", OF_OVERLAYS, OF_TIERS, TRANSFORMERS)
    (manifests / "everything.yaml").write_text(yaml.safe_dump_all(everything))
    (tmp_path / "groups").mkdir()
    groups = combined(tmp_path / "groups", OF_OVERLAYS, ["vllm-multinode"])
    (manifests / "groups.yaml").write_text(yaml.safe_dump_all(map(as_deployments, groups)))

    found = checkov(manifests)

    rest = [(each["check_id"], each["check_name"], each["resource"]) for each in found]
    assert not [each for each in rest if each[0] not in WAIVERS["checkov"]]
    assert {each[0] for each in rest} == set(WAIVERS["checkov"])  # no waiver outlives its finding


def test_hadolint_finds_only_what_is_waived() -> None:
    done = subprocess.run(
        [tools.need("hadolint"), "--format", "json", K8S.parent / "Dockerfile"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found = json.loads(done.stdout)

    assert not [each for each in found if each["code"] not in WAIVERS.get("hadolint", {})]


def test_each_waiver_has_a_reason() -> None:
    assert set(WAIVERS) <= {"checkov", "hadolint"}
    for waived in WAIVERS.values():
        assert all(len(reason.split()) >= 5 for reason in waived.values())

"""What k8s/README.md says to type refers to what exists, and its tier renders."""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml

from tests.deploy.rendering import (
    INSTEAD_OF_WORKERS,
    OF_OVERLAYS,
    OF_TIERS,
    OVERLAYS,
    TRANSFORMERS,
    combined,
    environment,
    of_kind,
    overlay,
    render,
    services,
)
from tests.deploy.settings_files import K8S

README = (K8S / "README.md").read_text()


def test_the_tier_of_the_readme_renders(tmp_path: Path) -> None:
    (example,) = (block for block in blocks("yaml") if "nameSuffix: -medium" in block)
    (listed,) = (block for block in blocks("yaml") if "medium=dns" in block)
    tier = yaml.safe_load(example)
    (base,) = tier["resources"]
    in_the_overlay = K8S / "overlays" / "cpu" / "medium"
    assert os.path.normpath(in_the_overlay / base) == str(K8S / "base" / "tier")
    tier["resources"] = [os.path.relpath(K8S / "base" / "tier", (tmp_path / "medium").resolve())]
    (tmp_path / "medium").mkdir()
    (tmp_path / "medium" / "kustomization.yaml").write_text(yaml.safe_dump(tier))
    cpu = yaml.safe_load((K8S / "overlays" / "cpu" / "kustomization.yaml").read_text())
    for field in ("resources", "components"):
        folder = K8S / "overlays" / "cpu"
        cpu[field] = [os.path.relpath(folder / name, tmp_path.resolve()) for name in cpu[field]]
    cpu["resources"].append("medium")
    (settings,) = cpu["configMapGenerator"]
    settings["literals"] = yaml.safe_load(listed)
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(cpu))

    found = render(tmp_path)

    assert set(services(found)) == {
        "gateway",
        "router",
        *(f"{kind}-{name}" for kind in ("batcher", "worker") for name in ("small", "medium", "large")),
    }
    assert environment(found, services(found)["batcher-medium"])["HEADRACE_WORKERS"] == (
        "dns:///worker-medium:50053"
    )
    routed = environment(found, services(found)["router"])["HEADRACE_TIERS"]
    assert [tier.partition("=")[0] for tier in routed.split(",")] == ["small", "medium", "large"]


def test_the_tier_over_two_nodes_of_the_docs_renders(tmp_path: Path) -> None:
    (example,) = blocks("yaml", (K8S.parent / "docs" / "deployment.md").read_text())
    tier = yaml.safe_load(example)
    folder = tmp_path / "large"
    folder.mkdir()
    for field in ("resources", "components"):
        paths = [os.path.normpath(K8S / "overlays" / "gpu-vllm" / "large" / name) for name in tier[field]]
        tier[field] = [os.path.relpath(path, folder.resolve()) for path in paths]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(tier))

    (group,) = of_kind(found := render(folder), "LeaderWorkerSet").values()

    pods = group["spec"]["leaderWorkerTemplate"]
    (arguments,) = (
        each["data"]["HEADRACE_ENGINE_ARGS"]
        for name, each in of_kind(found, "ConfigMap").items()
        if name.startswith("worker-large")
    )
    assert arguments == f"--tensor-parallel-size 4 --pipeline-parallel-size {pods['size']}"
    for role in ("leader", "worker"):
        (box,) = pods[f"{role}Template"]["spec"]["containers"]
        assert box["resources"]["limits"]["nvidia.com/gpu"] == "4"


def blocks(language: str, text: str = README) -> list[str]:
    """Return the code blocks of the README, or of another text."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return ["\n".join(line.removeprefix(indent) for line in text.splitlines()) for indent, text in found]


def test_commands_of_the_readme_name_what_exists(tmp_path: Path) -> None:
    found = [each for name in OVERLAYS for each in overlay(name)]
    found += combined(tmp_path, OF_OVERLAYS, OF_TIERS, TRANSFORMERS)
    kinds = {"deployment": "Deployment", "service": "Service"}
    named = re.findall(r"\b(deployment|service)/([a-z][a-z-]+)", README)

    assert len(named) > 8
    for kind, name in named:
        assert name in of_kind(found, kinds[kind]) or name.endswith("-medium"), name
    for name in re.findall(r"delete job ([\w-]+)", README):
        assert name in of_kind(found, "Job")
    secrets = {each["spec"]["secretName"] for each in of_kind(found, "Certificate").values()}
    assert set(re.findall(r"get secret ([\w-]+)", README)) <= secrets
    for name in re.findall(r"-k (k8s/[\w/]+)", README):
        assert (K8S.parent / name / "kustomization.yaml").exists()


def test_the_readme_lists_all_components() -> None:
    listed = re.findall(r"^\| \[`([\w/-]+)`\]\(components/([\w/-]+)\)", README, re.MULTILINE)

    assert all(name == folder for name, folder in listed)
    # `tier-name` belongs to the autoscaler, which explains it.
    assert {name for name, _ in listed} | {"tier-name"} == {
        *(*OF_OVERLAYS, *OF_TIERS, *TRANSFORMERS, *INSTEAD_OF_WORKERS),
    }

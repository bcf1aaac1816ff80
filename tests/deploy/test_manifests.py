"""Every overlay and combination of components renders, into pods that survive drains and are locked down."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from headrace.runtime.serving.server import LIVENESS, READINESS
from tests.deploy.rendering import (
    INSTEAD_OF_WORKERS,
    OF_OVERLAYS,
    OF_TIERS,
    OVERLAYS,
    TRANSFORMERS,
    Resource,
    combined,
    container,
    environment,
    of_kind,
    overlay,
    pod,
    services,
    template,
    workloads,
)
from tests.deploy.settings_files import K8S, SETTINGS

VERSION = tomllib.loads((K8S.parent / "pyproject.toml").read_text())["project"]["version"]
# What each component adds or changes, so that one that renders to nothing is found.
SEEN: dict[str, Callable[[list[Resource]], bool]] = {
    "anonymous": lambda found: "HEADRACE_AUTH_ANONYMOUS" in _mesh(found),
    "callers": lambda found: all("callers" in _volumes(found, name) for name in ("gateway", "router")),
    "gpu": lambda found: "nvidia.com/gpu" in _worker(found)["resources"]["limits"],
    "autoscaling/gateways": lambda found: "gateway" in of_kind(found, "HorizontalPodAutoscaler"),
    "autoscaling/routers": lambda found: "router" in of_kind(found, "HorizontalPodAutoscaler"),
    "telemetry": lambda found: "headrace" in of_kind(found, "PodMonitor"),
    "network-policies": lambda found: "deny" in of_kind(found, "NetworkPolicy"),
    "mtls": lambda found: all("tls" in _volumes(found, name) for name in ("gateway", "worker-small")),
    "mtls/tokens": lambda found: any(port["name"] == "mtls" for port in _ports(found, "router")),
    "quotas": lambda found: "quotas" in _volumes(found, "router"),
    "gateway-api": lambda found: (
        "router" in of_kind(found, "GRPCRoute") and "gateway" in of_kind(found, "HTTPRoute")
    ),
    "gateway-api/tls": lambda found: {"gateway", "router"} <= set(of_kind(found, "BackendTLSPolicy")),
    "priority": lambda found: pod(of_kind(found, "Deployment")["router"])["priorityClassName"] == "headrace",
    "model-cache": lambda found: "models-small" in of_kind(found, "PersistentVolumeClaim"),
    "model-image": lambda found: "model" in _volumes(found, "worker-small"),
    "tokenizer-image": lambda found: "tokenizer" in _volumes(found, "batcher-small"),
    "autoscaling/tier": lambda found: "worker-small" in of_kind(found, "ScaledObject"),
}


def _mesh(found: list[Resource]) -> dict[str, str]:
    (mesh,) = (each for name, each in of_kind(found, "ConfigMap").items() if name.startswith("mesh-"))
    data: dict[str, str] = mesh["data"]
    return data


def _worker(found: list[Resource]) -> Resource:
    return container(of_kind(found, "Deployment")["worker-small"])


def _volumes(found: list[Resource], name: str) -> set[str]:
    return {volume["name"] for volume in pod(of_kind(found, "Deployment")[name])["volumes"]}


def _ports(found: list[Resource], name: str) -> list[dict[str, Any]]:
    ports: list[dict[str, Any]] = container(of_kind(found, "Deployment")[name])["ports"]
    return ports


def test_every_component_is_tested() -> None:
    found = {
        str(path.parent.relative_to(K8S / "components"))
        for path in K8S.rglob("components/**/kustomization.yaml")
    }

    nested = {"telemetry/rules", "telemetry/dashboards"}  # of the component telemetry
    assert found == {*OF_OVERLAYS, *OF_TIERS, *TRANSFORMERS, *INSTEAD_OF_WORKERS, *nested}
    assert set(SEEN) == {*OF_OVERLAYS, *OF_TIERS}


@pytest.mark.parametrize("name", OF_OVERLAYS)
def test_a_component_of_overlays_renders_alone(name: str, tmp_path: Path) -> None:
    found = combined(tmp_path, [name])

    assert SEEN[name](found)
    check_pods(found)


@pytest.mark.parametrize("name", OF_TIERS)
def test_a_component_of_tiers_renders_alone(name: str, tmp_path: Path) -> None:
    found = combined(tmp_path, [], [name], ["tier-name"] if name == "autoscaling/tier" else [])

    assert SEEN[name](found)
    check_pods(found)


def test_the_order_of_components_does_not_matter(tmp_path: Path) -> None:
    found = combined(tmp_path, OF_OVERLAYS[::-1], OF_TIERS[::-1], TRANSFORMERS)

    assert all(seen(found) for seen in SEEN.values())
    check_pods(found)


def test_all_components_render_together(tmp_path: Path) -> None:
    found = combined(tmp_path, OF_OVERLAYS, OF_TIERS, TRANSFORMERS)

    assert all(seen(found) for seen in SEEN.values())
    check_pods(found)
    check_names(found)


@pytest.mark.parametrize("name", INSTEAD_OF_WORKERS)
def test_workers_on_vllm_replace_those_of_the_base_and_have_what_others_have(
    name: str, tmp_path: Path
) -> None:
    found = combined(tmp_path, [each for each in OF_OVERLAYS if each != "gpu"], [name])

    check_pods(found)
    check_names(found)
    assert "worker-small" not in of_kind(found, "Deployment")
    worker = workloads(found)["worker-small"]
    assert environment(found, worker)["HEADRACE_ENGINE"] == "vllm"
    assert {"tls", "shm", "cache"} <= mounted(worker)
    assert "metrics" in {each["name"] for each in container(worker)["ports"]}
    assert pod(worker)["priorityClassName"] == "headrace"
    assert labels_of(worker)["headrace/tier"] == "small"
    assert of_kind(found, "Service")["worker-small"]["spec"]["selector"].items() <= labels_of(worker).items()


def test_each_gpu_of_a_pod_has_a_rank_of_tensor_parallelism(tmp_path: Path) -> None:
    (multinode := tmp_path / "multinode").mkdir()
    groups = combined(multinode, [], ["vllm-multinode"])
    workers = [
        *((list(overlay("gpu-vllm")), f"worker-{tier}") for tier in ("small", "large")),
        (groups, "worker-small"),
    ]
    for found, name in workers:
        worker = workloads(found)[name]
        given = shlex.split(environment(found, worker)["HEADRACE_ENGINE_ARGS"])
        gpus = container(worker)["resources"]["limits"]["nvidia.com/gpu"]

        assert given[given.index("--tensor-parallel-size") + 1] == gpus
    group = of_kind(groups, "LeaderWorkerSet")["worker-small"]["spec"]["leaderWorkerTemplate"]
    assert given[given.index("--pipeline-parallel-size") + 1] == str(group["size"])


def test_the_pods_of_a_group_have_equal_arguments_and_the_service_has_the_leader_alone(
    tmp_path: Path,
) -> None:
    found = combined(tmp_path, [], ["vllm-multinode"])
    group = of_kind(found, "LeaderWorkerSet")["worker-small"]["spec"]["leaderWorkerTemplate"]
    leader, rank = (
        {"kind": "pods of a group", "metadata": {}, "spec": {"template": group[f"{role}Template"]}}
        for role in ("leader", "worker")
    )

    assert container(leader)["args"] == container(rank)["args"]
    assert set(re.findall(r"\$\((\w+)\)", container(rank)["args"][0])) == {
        *("HEADRACE_ENGINE_ARGS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS")
    }
    for field in ("image", "env", "envFrom", "resources", "volumeMounts", "securityContext"):
        assert container(leader)[field] == container(rank)[field], field
    assert pod(leader)["volumes"] == pod(rank)["volumes"]
    assert container(rank)["command"] == ["python3", "-m", "headrace.worker.vllm.headless"]
    assert importlib.util.find_spec("headrace.worker.vllm.headless")
    assert not {"ports", "readinessProbe"} & set(container(rank))
    check_security(rank)
    selector = of_kind(found, "Service")["worker-small"]["spec"]["selector"]
    assert not selector.items() <= template(rank)["metadata"]["labels"].items()


def test_templates_of_volumes_have_no_label_that_a_new_version_changes() -> None:
    """A StatefulSet with another template of its volumes is refused."""
    for each in of_kind(overlay("gpu-vllm"), "StatefulSet").values():
        for claim in each["spec"]["volumeClaimTemplates"]:
            assert "app.kubernetes.io/version" not in claim["metadata"].get("labels", {})


def labels_of(workload: Resource) -> dict[str, str]:
    """Return the labels of a workload's pods."""
    labels: dict[str, str] = template(workload)["metadata"]["labels"]
    return labels


def mounted(workload: Resource) -> set[str]:
    """Return the names of the volumes that a container mounts."""
    return {each["name"] for each in container(workload)["volumeMounts"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_renders_pods_that_survive_drains_and_are_locked_down(name: str) -> None:
    check_pods(list(overlay(name)))
    check_names(list(overlay(name)))


def check_pods(found: list[Resource]) -> None:
    """Check what holds for every pod of the mesh, whatever the components."""
    deployments = services(found)
    running = {container(each)["name"] for each in deployments.values()}
    assert set(SETTINGS) - {"upstream"} <= running <= set(SETTINGS)
    for each in deployments.values():
        check_probes(found, each)
        check_drain(found, each)
    jobs = of_kind(found, "Job").values()
    for each in (*workloads(found).values(), *jobs):
        check_security(each)
        assert each["metadata"]["labels"]["app.kubernetes.io/part-of"] == "headrace"


def check_probes(found: list[Resource], deployment: Resource) -> None:
    """Check that readiness and liveness are asked separately, on a port that serves health."""
    variables, box = environment(found, deployment), container(deployment)
    if box["name"] == "gateway":
        check_http_probes(variables, box)
        return
    port = int(variables.get("HEADRACE_HEALTH_PORT", 0)) or int(variables["HEADRACE_PORT"])
    ports = {each["name"]: each["containerPort"] for each in box["ports"]}
    assert ports["grpc"] == int(variables["HEADRACE_PORT"])
    assert port in ports.values()
    for probe, service in (
        # A worker reports that it is live before it loads its model, which keeps it from answering in time.
        ("startupProbe", READINESS if box["name"] == "worker" else LIVENESS),
        ("livenessProbe", LIVENESS),
        ("readinessProbe", READINESS),
    ):
        assert box[probe]["grpc"] == {"port": port, "service": service}


def check_http_probes(variables: Mapping[str, str], box: Resource) -> None:
    """Check that a gateway is asked over HTTP, or over HTTPS if that is what it serves."""
    ports = {each["name"]: each["containerPort"] for each in box["ports"]}
    assert ports["http"] == int(variables["HEADRACE_PORT"])
    expected = {"port": "http"} | ({"scheme": "HTTPS"} if variables.get("HEADRACE_HTTPS_CERT") else {})
    for probe, path in (
        ("startupProbe", "/health/live"),
        ("livenessProbe", "/health/live"),
        ("readinessProbe", "/health"),
    ):
        assert box[probe]["httpGet"] == {"path": path, **expected}


def check_drain(found: list[Resource], deployment: Resource) -> None:
    """Check that a pod that is stopped has the time to finish the longest generation."""
    variables, spec = environment(found, deployment), pod(deployment)
    before = container(deployment)["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = float(variables["HEADRACE_DRAIN_SECONDS"])
    deadline = float(variables.get("HEADRACE_DEFAULT_DEADLINE", 120))

    assert drain > deadline
    # After the drain, a worker hands off what is unfinished in two seconds; a server sends it in three.
    assert spec["terminationGracePeriodSeconds"] >= before + drain + 5
    # A group has no selector in its specification: that of the Service finds its leader.
    selector = deployment["spec"].get("selector", {}).get("matchLabels")
    labels = selector or of_kind(found, "Service")[deployment["metadata"]["name"]]["spec"]["selector"]
    budgets = of_kind(found, "PodDisruptionBudget").values()
    assert [
        each["spec"]["maxUnavailable"]
        for each in budgets
        if each["spec"]["selector"]["matchLabels"] == labels
    ] == [1]
    if deployment["kind"] == "LeaderWorkerSet":  # whose pods are on different nodes, because of their GPUs
        return
    spreads = spec["topologySpreadConstraints"]
    assert {each["topologyKey"] for each in spreads} == {
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    }
    assert all(each["labelSelector"]["matchLabels"] == labels for each in spreads)


def check_security(workload: Resource) -> None:
    """Check that a pod meets the restricted standard, and what it does not ask for."""
    spec, box = pod(workload), container(workload)
    assert spec["enableServiceLinks"] is False  # else a Service named `headrace` would set HEADRACE_PORT
    assert spec["automountServiceAccountToken"] is False
    assert spec["serviceAccountName"] != "default"
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == context["runAsGroup"] == 10001
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert box["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for kind in ("memory", "ephemeral-storage"):
        assert kind in box["resources"]["requests"]
        assert kind in box["resources"]["limits"]
    for volume in spec.get("volumes", ()):
        assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"]
    claims = workload["spec"].get("volumeClaimTemplates", ())
    volumes = {volume["name"] for volume in spec["volumes"]} | {each["metadata"]["name"] for each in claims}
    assert mounted(workload) == volumes


def check_names(found: list[Resource]) -> None:
    """Check that all that a resource refers to exists, with the suffix of its tier."""
    accounts, maps = of_kind(found, "ServiceAccount"), of_kind(found, "ConfigMap")
    claims, running = of_kind(found, "PersistentVolumeClaim"), workloads(found)
    for each in (*running.values(), *of_kind(found, "Job").values()):
        spec = pod(each)
        assert spec["serviceAccountName"] in accounts
        assert {source["configMapRef"]["name"] for source in container(each).get("envFrom", ())} <= set(maps)
        for volume in spec["volumes"]:
            assert volume.get("configMap", {}).get("name", next(iter(maps))) in maps
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in claims
    for each in of_kind(found, "Service").values():
        assert any(
            each["spec"]["selector"].items() <= labels_of(workload).items() for workload in running.values()
        )
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        for each in of_kind(found, kind).values():
            reference = each["spec"]["scaleTargetRef"]
            target = running[reference["name"]]
            assert reference.get("kind", "Deployment") == target["kind"]
            assert "replicas" not in target["spec"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_images_and_labels_have_the_version_of_the_project(name: str) -> None:
    for each in services(overlay(name)).values():
        assert container(each)["image"].endswith(f":{VERSION}")
        for labels in (each["metadata"]["labels"], labels_of(each)):
            assert labels["app.kubernetes.io/version"] == VERSION
            assert labels["app.kubernetes.io/instance"] == "headrace"


@pytest.mark.parametrize("name", sorted(set(OVERLAYS) - {"local"}))
def test_no_node_holds_all_pods_of_a_service(name: str) -> None:
    """A drained node is then not an outage; `local` is one node."""
    for each in services(overlay(name)).values():
        assert each["spec"].get("replicas", 2) >= 2


def test_routes_from_outside_lead_to_services_and_do_not_cut_streams(tmp_path: Path) -> None:
    found = combined(tmp_path, ["gateway-api", "gateway-api/tls"])

    (gateway,) = of_kind(found, "Gateway").values()
    listeners = {each["name"]: each["hostname"] for each in gateway["spec"]["listeners"]}
    routes = [of_kind(found, "GRPCRoute")["router"], of_kind(found, "HTTPRoute")["gateway"]]
    for route in routes:
        (parent,) = route["spec"]["parentRefs"]
        assert route["spec"]["hostnames"] == [listeners[parent["sectionName"]]]
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                assert backend["port"] in _service_ports(found, backend["name"]).values()
    # A GRPCRoute and an HTTPRoute of one listener must not have a name in common.
    assert len(set(listeners.values())) == len(listeners) == len(routes)
    assert [rule["timeouts"] for rule in routes[1]["spec"]["rules"]] == [{"request": "0s"}]
    for policy in of_kind(found, "BackendTLSPolicy").values():
        (target,) = policy["spec"]["targetRefs"]
        assert target["sectionName"] in _service_ports(found, target["name"])
        assert policy["spec"]["validation"]["hostname"] == target["name"], "a name in the pods' certificates"


def _service_ports(found: list[Resource], name: str) -> dict[str, int]:
    return {each["name"]: each["port"] for each in of_kind(found, "Service")[name]["spec"]["ports"]}


def test_a_service_over_http_has_an_address_of_its_own(tmp_path: Path) -> None:
    """Clients of HTTP take one address of a headless name and stay there."""
    for components, protocol in (([], "http"), (["mtls"], "https")):
        (folder := tmp_path / protocol).mkdir()
        spec = of_kind(combined(folder, components), "Service")["gateway"]["spec"]
        assert "clusterIP" not in spec
        assert [each["appProtocol"] for each in spec["ports"]] == [protocol]


def test_the_namespace_admits_restricted_pods_only() -> None:
    labels = of_kind(overlay("local"), "Namespace")["headrace"]["metadata"]["labels"]

    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert re.fullmatch(r"v1\.\d+", labels["pod-security.kubernetes.io/enforce-version"])


def test_a_tier_is_a_file_of_a_few_lines() -> None:
    paths = list(K8S.glob("overlays/*/*/kustomization.yaml"))
    assert len(paths) > len(OVERLAYS), "most overlays have several tiers"
    for path in paths:
        lines = path.read_text().split("patches:")[0].splitlines()

        assert len(lines) <= 20, path
        assert f"nameSuffix: -{path.parent.name}" in lines
        assert f"  - pairs: {{headrace/tier: {path.parent.name}}}" in lines

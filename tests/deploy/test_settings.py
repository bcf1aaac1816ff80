"""ConfigMaps have every setting, and services accept what their pods are given."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from headrace.batcher.settings import Settings as BatcherSettings
from headrace.gateway.settings import Settings as GatewaySettings
from headrace.router.settings import Settings as RouterSettings
from headrace.runtime.serving.interceptor import MAX_STARTING
from headrace.runtime.serving.limits import MIB
from headrace.runtime.settings import PREFIX, ProcessSettings, ServiceSettings
from headrace.upstream.settings import Settings as UpstreamSettings
from headrace.validation import MAX_RESUME_TOKENS
from tests.deploy.rendering import (
    OVERLAYS,
    Resource,
    combined,
    container,
    environment,
    of_kind,
    overlay,
    services,
)
from tests.deploy.settings_files import (
    FILES,
    FROM_THE_NAME,
    K8S,
    OF_THE_MESH,
    SETTINGS,
    SettingsFile,
    completed,
    default_of,
    written,
)
from tests.hostile.confine import parsed

# Variables that are not settings of a service: the Dockerfile's own.
OTHERS = {f"{PREFIX}SERVICE"}
# What the base sets otherwise than the services' defaults, and why.
CHANGED = {
    "host": "pods listen on their address",
    "drain_seconds": "longer than the longest generation, so that a stopped pod need not hand requests over",
    "cache": "the volume",
    "router": "the Service",
}


def settings_of(found: Iterable[Resource], deployment: Resource) -> ProcessSettings:
    """Return the settings that a pod's service reads; its variables are settings of it or of the mesh."""
    kind = SETTINGS[container(deployment)["name"]]
    variables = environment(tuple(found), deployment)
    known = {f"{PREFIX}{name.upper()}" for name in (*kind.model_fields, *OF_THE_MESH)} | OTHERS
    unknown = {name for name in variables if name.startswith(PREFIX)} - known
    assert not unknown
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        return kind.load([])


def router_settings(found: Iterable[Resource]) -> RouterSettings:
    """Return the settings that the routers read."""
    (router,) = (each for each in services(found).values() if container(each)["name"] == "router")
    settings = settings_of(found, router)
    assert isinstance(settings, RouterSettings)
    return settings


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.path.name)
def test_a_file_of_settings_is_complete(file: SettingsFile) -> None:
    """`python -m tests.deploy.settings_files` adds what is missing."""
    assert set(written(file.path)) == set(file.fields)
    assert file.path.read_text() == completed(file)


def test_every_setting_of_a_service_is_in_a_file_or_follows_from_the_tier() -> None:
    for service, kind in SETTINGS.items():
        names = {file.path.stem for file in FILES} - (set(SETTINGS) - {service})
        present = {name for file in FILES if file.path.stem in names for name in file.fields}

        assert set(kind.model_fields) - present <= set(FROM_THE_NAME)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.path.name)
def test_the_base_has_the_defaults_of_the_services_but_for_a_few(file: SettingsFile) -> None:
    different = {name for name, value in written(file.path).items() if value != default_of(file.kind, name)}

    assert different <= set(CHANGED)


@pytest.mark.parametrize("name", OVERLAYS)
def test_services_accept_the_settings_of_their_pods(name: str) -> None:
    found = overlay(name)
    for deployment in services(found).values():
        settings = settings_of(found, deployment)

        assert settings.host == "0.0.0.0"
        assert settings.port in {port["containerPort"] for port in container(deployment)["ports"]}


# Memory of an idle process, and the most memory per byte of a request in flight: the message, its parsed
# form, the forwarded message, and the text for the score. Measured by tests/hostile; those of the gateway by
# hand: 65 MiB idle, 9 KiB for an idle connection, and 64 KiB for an open stream with a short prompt.
BASE_BYTES = {"gateway": 100 * MIB, "router": 100 * MIB, "batcher": 600 * MIB, "upstream": 100 * MIB}
BYTES_PER_BYTE = 8
BYTES_PER_CALL = 64 * 1024
BYTES_PER_CONNECTION = 16 * 1024  # of HTTP, idle or not
RUN_STREAMS = 64  # whose messages arrive at the same time


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_memory_limit_of_a_pod_covers_what_its_settings_admit(name: str) -> None:
    check_memory(overlay(name))


def test_an_upstream_accepts_its_settings_is_found_by_routers_and_has_the_memory_it_needs(
    tmp_path: Path,
) -> None:
    """No overlay has one: its URL and key are those of whoever deploys it."""
    found = combined(tmp_path, ["anonymous"])
    settings = settings_of(found, services(found)["upstream-cloud"])
    (port,) = of_kind(found, "Service")["batcher-cloud"]["spec"]["ports"]

    assert isinstance(settings, UpstreamSettings)
    assert settings.tier == "cloud"
    assert settings.urls == ["https://api.example.com/v1"]
    assert (port["port"], port["targetPort"]) == (settings.port, "grpc")
    assert dict(router_settings(found).tier_targets())["cloud"] == [f"dns:///batcher-cloud:{settings.port}"]
    check_memory(found)


def check_memory(found: Iterable[Resource]) -> None:
    """Check that limits cover what the settings admit."""
    found = tuple(found)
    for deployment in services(found).values():
        box, settings = container(deployment), settings_of(found, deployment)
        memory = parsed(box["resources"]["limits"]["memory"])

        assert parsed(box["resources"]["requests"]["memory"]) <= memory
        if isinstance(settings, GatewaySettings):
            http = settings.limits
            held = BYTES_PER_BYTE * http.max_inflight_bytes + BYTES_PER_CALL * http.max_calls
            connections = BYTES_PER_CONNECTION * http.max_connections
            assert BASE_BYTES["gateway"] + held + connections <= memory
            continue
        assert isinstance(settings, ServiceSettings)
        limits = settings.limits
        if box["name"] == "worker":  # the model bounds it; requests are token ids
            assert limits.max_inflight_bytes + RUN_STREAMS * limits.max_message_bytes < memory
            continue
        # Requests, and as many calls of other methods, start at a time.
        starting = 2 * MAX_STARTING * limits.max_message_bytes
        requests = BYTES_PER_BYTE * limits.max_inflight_bytes + starting
        assert BASE_BYTES[box["name"]] + requests + BYTES_PER_CALL * limits.max_calls <= memory


def test_what_a_router_admits_fits_its_batchers_with_an_answer_to_resume() -> None:
    """Else the longest prompts would be admitted, and lost with the first batcher."""
    found = overlay("cpu")
    read = {name: settings_of(found, each) for name, each in services(found).items()}
    limits = {
        name: settings.limits.max_message_bytes
        for name, settings in read.items()
        if isinstance(settings, ServiceSettings)
    }
    resumed = MAX_RESUME_TOKENS * 3  # bytes of an id below two million

    for name in ("batcher-small", "batcher-large"):
        assert limits["router"] + resumed + 4096 <= limits[name]


@pytest.mark.parametrize("name", OVERLAYS)
def test_router_batchers_and_workers_agree_on_names_and_models(name: str) -> None:
    """The router names the tiers' Services, a batcher its workers, and both of a tier the same model."""
    found = overlay(name)
    served = {
        f"dns:///{each}:{port['port']}"
        for each, service in of_kind(found, "Service").items()
        for port in service["spec"]["ports"]
    }
    tiers = {}
    for each, deployment in services(found).items():
        settings = settings_of(found, deployment)
        if isinstance(settings, UpstreamSettings):
            tiers[settings.tier] = f"dns:///batcher-{settings.tier}:{settings.port}"
        if isinstance(settings, BatcherSettings):
            assert each == f"batcher-{settings.tier}"
            assert settings.worker_targets == [f"dns:///worker-{settings.tier}:50053"]
            assert set(settings.worker_targets) < served
            variables = environment(found, services(found)[f"worker-{settings.tier}"])
            assert variables.get(f"{PREFIX}MODEL", "") == settings.model
            tiers[settings.tier] = f"dns:///{each}:{settings.port}"
    router = router_settings(found)

    assert dict(router.tier_targets()) == {tier: [target] for tier, target in tiers.items()}
    assert set(tiers.values()) < served


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_gateway_calls_the_routers_and_takes_the_same_tokens(name: str) -> None:
    found = overlay(name)
    (deployment,) = (each for each in services(found).values() if container(each)["name"] == "gateway")
    gateway, router = settings_of(found, deployment), router_settings(found)
    assert isinstance(gateway, GatewaySettings)
    (service,) = of_kind(found, "Service")["router"]["spec"]["ports"]

    assert gateway.router == f"dns:///router:{service['port']}"
    for setting in ("auth_tokens", "auth_jwks", "auth_issuer", "auth_audience", "auth_tenant_claim"):
        assert getattr(gateway, setting) == getattr(router, setting)
    assert bool(gateway.tls_ca) == bool(router.tls_ca), "the router's certificate is verified"
    assert bool(gateway.https_cert) == bool(router.tls_cert), "callers of both use TLS, or of neither"


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_component_replaces_what_an_overlay_sets(name: str) -> None:
    maps = {
        each.partition("-")[0]: found.get("data", {})
        for each, found in of_kind(overlay(name), "ConfigMap").items()
    }
    written = yaml.safe_load((K8S / "overlays" / name / "kustomization.yaml").read_text())
    for generator in written.get("configMapGenerator", ()):
        for literal in generator.get("literals", ()):
            key, _, value = literal.partition("=")
            assert maps[generator["name"]][key] == value


@pytest.mark.parametrize("name", OVERLAYS)
def test_routers_share_quotas_on_the_port_where_they_show_certificates(name: str) -> None:
    router = router_settings(overlay(name))

    port = router.mtls_port or router.port
    assert all(peer.endswith(f":{port}") for peer in filter(None, router.quota_peers.split(",")))


def test_settings_in_the_comments_and_the_readme_of_k8s_exist() -> None:
    fields = {name for kind in SETTINGS.values() for name in kind.model_fields}
    known = {f"{PREFIX}{name.upper()}" for name in fields} | OTHERS
    texts = [path for path in K8S.rglob("*") if path.suffix in (".yaml", ".md", ".env")]

    assert len(texts) > 30
    for path in texts:
        named = set(re.findall(rf"{PREFIX}[A-Z_]+[A-Z]", path.read_text()))
        assert named <= known, path

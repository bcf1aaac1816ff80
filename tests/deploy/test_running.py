"""Services that start with what their pods are given, all settings included, answer a request and drain."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import ssl
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from headrace.cli.launch.mesh import reserved_ports
from headrace.client import Client, chat, connect
from headrace.errors import CredentialsRequired
from headrace.runtime.settings import PREFIX
from tests.deploy import certificates
from tests.deploy.rendering import (
    Resource,
    combined,
    container,
    environment,
    of_kind,
    overlay,
    pod,
    services,
)
from tests.faults.fleet import HOST, START_SECONDS, Child
from tests.harness import collect

TOKEN = "hr_a-token-of-this-test"


@dataclass
class Pod(Child):
    """A container of a Deployment, as a process on this machine.

    health_port   where it serves health without TLS; 0: on its port
    http          how a gateway is called: "http" or "https"; empty for services over gRPC
    """

    variables: Mapping[str, str] = field(default_factory=dict)
    health_port: int = 0
    http: str = ""

    @property
    def address(self) -> str:
        """The address that probes ask for health."""
        return f"{HOST}:{self.health_port or self.port}"

    async def start(self) -> None:
        """Start the process with the variables of the pod, and no others of Headrace."""
        rest = {name: value for name, value in os.environ.items() if not name.startswith((PREFIX, "OTEL_"))}
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "headrace.cli.launch.child", str(os.getpid()), self.module),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**rest, **self.variables},
                start_new_session=True,
            )

    async def ready(self, *, seconds: float = START_SECONDS) -> None:
        """Wait until the service reports that it is ready. Probes over HTTPS do not verify certificates."""
        if not self.http:
            await super().ready(seconds=seconds)
            return
        async with (
            asyncio.timeout(seconds),
            httpx.AsyncClient(verify=False, trust_env=False) as client,
        ):
            while not await self._is_ready(client):
                assert self.alive, self.tail()
                await asyncio.sleep(0.05)

    async def _is_ready(self, client: httpx.AsyncClient) -> bool:
        with suppress(httpx.TransportError):
            return (await client.get(f"{self.http}://{self.address}/health")).is_success
        return False


@asynccontextmanager
async def started(found: Sequence[Resource], folder: Path) -> AsyncGenerator[dict[str, Pod], None]:
    """Run a process per Deployment, and wait until they are ready.

    What a cluster provides is replaced: addresses for DNS names, ports of pods, and folders for volumes,
    where those of ConfigMaps have their files.
    """
    deployments = services(found)
    pods: dict[str, Pod] = {}
    with reserved_ports(3 * len(deployments)) as ports:
        free = iter(ports)
        variables = {each: environment(found, deployment) for each, deployment in deployments.items()}
        names = {}  # dns:///NAME:PORT, and the address here
        for each, own in variables.items():
            own[f"{PREFIX}HOST"] = HOST
            for setting in ("PORT", "HEALTH_PORT", "MTLS_PORT"):
                if (port := own.get(PREFIX + setting, "0")) != "0":
                    own[PREFIX + setting] = str(next(free))
                    names[f"dns:///{each}:{port}"] = f"{HOST}:{own[PREFIX + setting]}"
        for each, deployment in deployments.items():
            paths = volumes(found, deployment, folder / each)
            for setting, value in variables[each].items():
                for before, after in (names | paths).items():
                    value = value.replace(before, after)
                variables[each][setting] = value
            own = variables[each]
            module = f"headrace.{container(deployment)['name']}"
            health = int(own.get(f"{PREFIX}HEALTH_PORT", 0))
            log = folder / f"{each}.log"
            http = ("https" if own.get(f"{PREFIX}HTTPS_CERT") else "http") if each == "gateway" else ""
            health = 0 if http else health
            own_port = int(own[f"{PREFIX}PORT"])
            pods[each] = Pod(each, module, (), own_port, log, variables=own, health_port=health, http=http)
        try:
            for process in pods.values():
                await process.start()
            for process in pods.values():
                await process.ready()
            yield pods
        finally:
            for process in pods.values():
                await process.kill()


def volumes(found: Sequence[Resource], deployment: Resource, folder: Path) -> dict[str, str]:
    """Make a folder for each volume of a pod. Returns their paths by the paths in the container."""
    paths = {}
    for mount in container(deployment)["volumeMounts"]:
        (volume,) = (each for each in pod(deployment)["volumes"] if each["name"] == mount["name"])
        local = folder / mount["name"]
        local.mkdir(parents=True)
        if "configMap" in volume:
            for name, text in of_kind(found, "ConfigMap")[volume["configMap"]["name"]]["data"].items():
                (local / name).write_text(text)
        if volume["name"] == "callers":
            digest = hashlib.sha256(TOKEN.encode()).hexdigest()
            line = f'[[tokens]]\nid = "test"\nsha256 = "{digest}"\ntenant = "test"\n'
            (local / "callers.toml").write_text(line)
        if "csi" in volume:
            attributes = volume["csi"]["volumeAttributes"]
            account = pod(deployment)["serviceAccountName"]
            certificates.issue(attributes, account, deployment["metadata"]["namespace"], local)
        if mount["mountPath"] != "/tmp":
            paths[mount["mountPath"]] = str(local)
    return paths


async def check_answer(client: Client, tier: str) -> None:
    """Check that a tier answers."""
    request = chat("the sky is blue", max_tokens=8)
    request.routing.tier = tier
    answer = await collect(client, request)
    assert answer.accepted.tier == tier
    assert answer.tokens == 8


async def asked_by_http(client: httpx.AsyncClient, model: str) -> httpx.Response:
    """Return the response to a chat completion."""
    body = {"model": model, "messages": [{"role": "user", "content": "the sky is blue"}], "max_tokens": 8}
    return await client.post("/v1/chat/completions", json=body)


async def test_pods_of_the_local_overlay_answer_and_drain(tmp_path: Path) -> None:
    async with started(overlay("local"), tmp_path) as pods:
        async with connect(pods["router"].address) as client:
            for tier in ("small", "large"):
                await check_answer(client, tier)
        async with httpx.AsyncClient(base_url=f"http://{pods['gateway'].address}", trust_env=False) as http:
            response = await asked_by_http(http, "small")
            assert response.json()["choices"][0]["message"]["content"] == "the sky "
        for name in ("gateway", "router", "batcher-small", "worker-small"):
            pods[name].send(signal.SIGTERM)
            async with asyncio.timeout(60):
                assert await pods[name].gone() == 0


async def test_pods_with_certificates_and_tokens_answer_callers_with_a_token(tmp_path: Path) -> None:
    """The certificates have the names that the volumes of the pods ask cert-manager for."""
    components = ["mtls", "callers", "mtls/tokens", "quotas"]
    (rendered := tmp_path / "rendered").mkdir()
    async with started(combined(rendered, components), tmp_path) as pods:
        target = f"{HOST}:{pods['router'].port}"
        tls: dict[str, Any] = {"ca": tmp_path / "router" / "tls" / "ca.crt"}
        token: dict[str, Any] = {"token": TOKEN}
        async with connect(target, **tls, **token) as client:
            await check_answer(client, "small")
        async with connect(target, retries=0, **tls) as client:
            with pytest.raises(CredentialsRequired):
                await check_answer(client, "small")
        verified = ssl.create_default_context(cafile=tmp_path / "gateway" / "tls" / "ca.crt")
        url = f"https://{pods['gateway'].address}"
        async with httpx.AsyncClient(base_url=url, verify=verified, trust_env=False) as http:
            assert (await asked_by_http(http, "small")).status_code == 401
            http.headers["authorization"] = f"Bearer {TOKEN}"
            response = await asked_by_http(http, "small")
            assert response.json()["choices"][0]["message"]["content"] == "the sky "

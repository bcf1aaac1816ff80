"""Services that start with what their pods are given, all settings included, answer a request and drain."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from headrace.cli.launch.mesh import reserved_ports
from headrace.client import chat, connect
from headrace.runtime.settings import PREFIX
from tests.deploy.rendering import container, environment, overlay, services
from tests.faults.fleet import HOST, Child
from tests.harness import collect


@dataclass
class Pod(Child):
    """A container of a Deployment, as a process on this machine."""

    variables: Mapping[str, str] = field(default_factory=dict)

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


@asynccontextmanager
async def started(name: str, folder: Path) -> AsyncGenerator[dict[str, Pod], None]:
    """Run a process per Deployment of an overlay, and wait until they are ready.

    What a cluster provides is replaced: addresses for DNS names, and a folder for the volume.
    """
    found = overlay(name)
    deployments = services(found)
    with reserved_ports(len(deployments)) as ports:
        at = dict(zip(deployments, ports, strict=True))
        pods = {}
        for each, deployment in deployments.items():
            variables = environment(found, deployment)
            variables |= {
                f"{PREFIX}HOST": HOST,
                f"{PREFIX}PORT": str(at[each]),
                f"{PREFIX}CACHE": str(folder),
            }
            for setting in {f"{PREFIX}TIERS", f"{PREFIX}WORKERS"} & set(variables):
                for other, port in at.items():
                    served = environment(found, deployments[other])[f"{PREFIX}PORT"]
                    variables[setting] = variables[setting].replace(
                        f"dns:///{other}:{served}", f"{HOST}:{port}"
                    )
            module = f"headrace.{container(deployment)['name']}"
            pods[each] = Pod(each, module, (), at[each], folder / f"{each}.log", variables=variables)
        try:
            for pod in pods.values():
                await pod.start()
            for pod in pods.values():
                await pod.ready()
            yield pods
        finally:
            for pod in pods.values():
                await pod.kill()


async def test_pods_of_the_local_overlay_answer_and_drain(tmp_path: Path) -> None:
    async with started("local", tmp_path) as pods:
        async with connect(pods["router"].address) as client:
            for tier in ("small", "large"):
                request = chat("the sky is blue", max_tokens=8)
                request.routing.tier = tier
                answer = await collect(client, request)

                assert answer.accepted.tier == tier
                assert answer.tokens == 8
        for name in ("router", "batcher-small", "worker-small"):
            pods[name].send(signal.SIGTERM)
            async with asyncio.timeout(60):
                assert await pods[name].gone() == 0

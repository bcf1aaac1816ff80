"""Run the images as restricted as in a cluster, and check what is in them and what they do."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.client import chat, connect
from tests.deploy.images.building import SERVICES, Built, version
from tests.deploy.images.engine import Engine, Failed
from tests.deploy.images.report import Check

UID = 10001
EDGE_BYTES = 150_000_000  # of an image without a model
MODEL = "smollm2-135m-instruct"
# Unpacking a model and compiling the kernels of a CPU worker takes minutes on a busy machine.
READY_SECONDS, STOP_SECONDS = 900.0, 40.0
_EDGES = ("gateway", "router", "upstream")  # services that need no model
_CACHE = "/var/cache/headrace"
_SHAPE = """
import importlib.metadata, json, os, stat
modes = [os.lstat(os.path.join(d, f)).st_mode for d, _, fs in os.walk('/', onerror=None) for f in fs
         if not d.startswith(('/proc', '/sys', '/dev'))]
bill = json.load(open('/opt/headrace/app/sbom.cdx.json'))
print(json.dumps({
    'setuid': sum(bool(m & (stat.S_ISUID | stat.S_ISGID)) for m in modes if stat.S_ISREG(m)),
    'packages': sorted({d.metadata['Name'].lower().replace('_', '-').replace('.', '-') + '@' + d.version
                        for d in importlib.metadata.distributions()}),
    'listed': [c['purl'] for c in bill['components']],
    'ids': [os.getuid(), os.getgid()],
}))
"""
_WRITE = "import sys\ntry: open('/opt/headrace/x', 'w')\nexcept OSError as error: print(error.strerror)"


def contents(engine: Engine, built: Built, service: str) -> Iterator[Check]:
    """Check an image without its service."""
    config = engine.inspect(built.name)
    yield Check(service, "does not run as root", config["User"] == f"{UID}:{UID}", config["User"])
    labels = config["Labels"]
    known = (labels.get("org.opencontainers.image.version"), labels.get("org.opencontainers.image.title"))
    yield Check(
        service,
        "has labels with version and revision",
        known == (version(), f"headrace-{service}"),
        str(known[0]),
    )
    shape = json.loads(engine.run(built.name, "python", "-c", _SHAPE))
    yield Check(service, "has no setuid program", not shape["setuid"])
    try:
        engine.run(built.name, "/bin/sh", "-c", "true")
        yield Check(service, "has no shell", False)
    except Failed as error:
        yield Check(service, "has no shell", "no such file" in str(error).lower())
    listed = {
        purl.removeprefix("pkg:pypi/").replace("%2B", "+") for purl in shape["listed"] if "pypi" in purl
    }
    debian = sum("pkg:deb" in purl for purl in shape["listed"])
    yield Check(
        service,
        "lists its packages in a bill of materials",
        listed == set(shape["packages"]) and debian > 5,
        f"{len(listed)} of Python, {debian} of Debian",
    )
    if service in _EDGES:
        yield Check(service, "is smaller than 150 MB", built.size < EDGE_BYTES, f"{built.size / 1e6:.0f} MB")


def echo(engine: Engine, images: Mapping[str, Built]) -> Iterator[Check]:
    """Check a mesh whose engine repeats prompts."""
    fake = {**dict.fromkeys(_EDGES, ()), "batcher": ("--fake",), "worker": ("--engine", "echo")}
    with _mesh(engine, images, fake, {}) as (ports, checks):
        yield from checks
        for service in SERVICES:
            yield from _restricted(engine, service)
        text, _ = asyncio.run(_ask(ports["router"], "seen, deployed and locked"))
        yield Check("mesh", "answers a request", text == "seen, deployed and locked", repr(text))
        text = _ask_by_http(ports["gateway"], "seen, over HTTP")
        yield Check("mesh", "answers a request over HTTP", text == "seen, over HTTP", repr(text))
        text, _ = asyncio.run(_ask(ports["upstream"], "seen, by way of the gateway"))
        expected = "seen, by way of the gateway"
        yield Check("upstream", "asks the gateway for an answer", text == expected, repr(text))
        yield from _stopped(engine)


def model(engine: Engine, images: Mapping[str, Built], file: Path) -> Iterator[Check]:
    """Check a mesh with a real model, which is unpacked, and whose kernels are compiled."""
    arguments = {
        **dict.fromkeys(_EDGES, ()),
        "batcher": ("--model", MODEL),
        "worker": ("--model", MODEL, "--device", "cpu"),
    }
    cache = engine.folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    target = cache / "models" / MODEL / file.name
    target.parent.mkdir(parents=True)
    shutil.copyfile(file, target)
    for path in (cache, *cache.rglob("*")):
        os.chown(path, UID, UID)
    try:
        with _mesh(engine, images, arguments, {cache: _CACHE}) as (ports, checks):
            yield from checks
            text, seconds = asyncio.run(_ask(ports["router"], "What is the capital of France?"))
            yield Check("mesh", f"answers with {MODEL}", "Paris" in text, f"{text[:40]!r} in {seconds:.1f} s")
            text = _ask_by_http(ports["gateway"], "What is the capital of France?")
            yield Check("mesh", f"answers with {MODEL} over HTTP", "Paris" in text, repr(text[:40]))
            yield from _stopped(engine)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


@contextmanager
def _mesh(
    engine: Engine,
    images: Mapping[str, Built],
    arguments: Mapping[str, tuple[str, ...]],
    volumes: Mapping[Path, str],
) -> Iterator[tuple[dict[str, int], list[Check]]]:
    ports = {service: _free_port() for service in SERVICES}
    targets = {
        "gateway": ("--router", f"127.0.0.1:{ports['router']}"),
        "router": ("--tiers", f"small=127.0.0.1:{ports['batcher']}"),
        "batcher": ("--tier", "small", "--workers", f"127.0.0.1:{ports['worker']}"),
        "worker": (),
        # It asks the same mesh, over HTTP.
        "upstream": (
            *("--url", f"http://127.0.0.1:{ports['gateway']}/v1", "--tier", "outside"),
            *("--model", "auto", "--api", "vllm"),
        ),
    }
    checks: list[Check] = []
    started: dict[str, float] = {}
    try:
        for service in reversed(SERVICES):
            address = ("--host", "127.0.0.1", "--port", str(ports[service]))
            words = (*address, *targets[service], *arguments[service])
            started[service] = time.monotonic()
            engine.start(service, images[service].name, words, {} if service in _EDGES else volumes)
        for service in reversed(SERVICES):
            _until_ready(engine, service, ports[service])
            seconds = time.monotonic() - started[service]
            checks.append(Check(service, "becomes ready, read-only and restricted", True, f"{seconds:.1f} s"))
        yield ports, checks
    finally:
        engine.podman("rm", "--all", "--force", "--time", "0")


def _until_ready(engine: Engine, service: str, port: int) -> None:
    """Wait until a service reports readiness. Raises Failed."""
    started = time.monotonic()
    is_ready = _is_ready_http if service == "gateway" else _is_ready_grpc
    while time.monotonic() - started < READY_SECONDS:
        if is_ready(port):
            return
        if engine.podman("inspect", "--format", "{{.State.Status}}", service).strip() != "running":
            break
        time.sleep(0.2)
    raise Failed(f"{service} did not become ready:\n{engine.podman('logs', service)[-3000:]}")


def _is_ready_grpc(port: int) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            status = stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=2).status
        except grpc.RpcError:
            return False
    return bool(status == health_pb2.HealthCheckResponse.SERVING)


def _is_ready_http(port: int) -> bool:
    try:
        with _HTTP.open(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except (OSError, urllib.error.URLError):
        return False


# Without the proxies of this machine.
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _ask_by_http(port: int, text: str) -> str:
    """Return the answer of a gateway to a chat message."""
    body = {
        "model": "auto",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 64,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with _HTTP.open(request, timeout=120) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


async def _ask(port: int, text: str) -> tuple[str, float]:
    started = time.monotonic()
    async with connect(f"127.0.0.1:{port}") as client:
        request = chat(text, temperature=0, max_tokens=64)
        async with aclosing(client.generate(request, timeout=120)) as stream:
            parts = [response.delta.text async for response in stream]
    return "".join(parts), time.monotonic() - started


def _restricted(engine: Engine, service: str) -> Iterator[Check]:
    """Check what the kernel grants to the process of a running container."""
    process = engine.podman("inspect", "--format", "{{.State.Pid}}", service).strip()
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    ids = {*status["Uid"].split(), *status["Gid"].split()}
    granted = (
        ids,
        int(status["CapEff"], 16),
        int(status["CapBnd"], 16),
        status["NoNewPrivs"],
        status["Seccomp"],
    )
    yield Check(
        service,
        "has no capability, new privileges or unfiltered calls",
        granted == ({str(UID)}, 0, 0, "1", "2"),
        f"uid {'/'.join(sorted(ids))}, capabilities {granted[1]:x}, seccomp {granted[4].strip()}",
    )
    seen = engine.podman("exec", service, "python", "-c", _WRITE).strip()
    yield Check(service, "cannot write to its root", "Read-only" in seen, seen)


def _stopped(engine: Engine) -> Iterator[Check]:
    """Send SIGTERM to each service, from the gateway on, and check the exit status."""
    for service in SERVICES:
        started = time.monotonic()
        engine.podman("kill", "--signal", "TERM", service)
        status = engine.podman("wait", service, timeout=STOP_SECONDS).strip()
        seconds = time.monotonic() - started
        yield Check(service, "exits with 0 after SIGTERM", status == "0", f"{status} in {seconds:.1f} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

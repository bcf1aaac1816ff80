"""`headrace up`: run a whole mesh on this machine until Ctrl-C."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shlex
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.table import Table

from headrace.cli.launch.boards import StartBoard
from headrace.cli.launch.certificates import CA, CLIENT, cert_file, key_file, shared_folder
from headrace.cli.launch.gpu_memory import memory_shares, weight_bytes
from headrace.cli.launch.mesh import HOST, mesh, require_free, require_free_ports
from headrace.cli.launch.model_files import prepare_models
from headrace.cli.launch.tiers import require_one_provider
from headrace.cli.launch.vllm import require_vllm
from headrace.runtime.serving.bind_check import bind_error

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

    from rich.console import Console

    from headrace.cli.launch.mesh import MeshSpec, Running

DEFAULT_PORT = 50051
DEFAULT_TARGET = f"127.0.0.1:{DEFAULT_PORT}"
DEFAULT_GATEWAY_PORT = 8080
_SAME_SIGNAL_SECONDS = 0.5  # timeout(1) and some shells signal a process, and then its process group


def gateway_port(router_port: int, console: Console) -> int:
    """Return the default port of the gateway, or 0, for any free one, if that is in use. Raises BadSpec.

    Unlike the router's, it is a port that many other programs use by default.
    """
    require_free(router_port)  # if it is in use, the same mesh may be running: that is the message to show
    if router_port != DEFAULT_GATEWAY_PORT and bind_error(HOST, DEFAULT_GATEWAY_PORT) is None:
        return DEFAULT_GATEWAY_PORT
    console.print(
        f"port {DEFAULT_GATEWAY_PORT} is in use: the gateway gets a free one. --gateway-port PORT sets it, "
        "--no-gateway starts none",
        style="yellow",
        markup=False,
        soft_wrap=True,
    )
    return 0


def prepare(spec: MeshSpec, console: Console) -> MeshSpec:
    """Check ports, keys and vLLM, fetch the models, and divide the memory of a GPU between their workers.

    Raises BadSpec or ModelUnavailable.
    """
    require_free_ports(spec)
    require_one_provider(spec.tiers, os.environ)
    if spec.fake:
        return spec
    if any(tier.engine == "vllm" for tier in spec.tiers):
        require_vllm(spec.vllm_python)
    paths = prepare_models(spec.tiers, spec.cache, console)
    weights = {tier.name: weight_bytes(paths[tier.model]) for tier in spec.tiers if tier.engine == "torch"}
    if len(weights) < 2 or not spec.device.startswith("cuda"):
        return spec
    return dataclasses.replace(spec, gpu_memory_shares=memory_shares(weights))


async def up(spec: MeshSpec, console: Console) -> None:
    """Run the mesh until cancelled. Raises BadSpec and ChildDied."""
    console.print(f"logs in {spec.log_dir}", style="dim", markup=False, highlight=False, soft_wrap=True)

    def notify(line: str) -> None:
        console.print(line, style="yellow", markup=False, soft_wrap=True)

    with StartBoard(console) as board:
        async with mesh(spec, on_states=board, notify=notify) as running:
            with shared_certificates(spec.cache, running):
                await _serve(spec, board, running, console)


async def _serve(spec: MeshSpec, board: StartBoard, running: Running, console: Console) -> None:
    """Describe the mesh, and wait until cancelled."""
    board.finish()
    console.print(_processes(spec, running))
    lines = [f"Headrace is up at [bold]{running.address}[/] (Ctrl-C stops it)."]
    if running.gateway:
        url = f"[bold]{running.gateway}[/]"
        plain = "; both over plain HTTP, for this machine only" if running.certificates else ""
        lines.append(f"OpenAI's API is at {url}[bold]/v1[/], a page to chat at {url}[bold]/[/]{plain}.")
    for line in (*lines, "Try:\n"):
        console.print(line, highlight=False, soft_wrap=True)
    for line in http_examples(running.gateway) + examples(running.address, running.certificates):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    await asyncio.Event().wait()


@contextmanager
def shared_certificates(cache: Path, running: Running) -> Iterator[None]:
    """Let commands on this machine find the mesh's certificates by its port while the block runs."""
    link = shared_folder(cache, running.address)
    link.unlink(missing_ok=True)  # of a mesh that was killed
    if running.certificates is None:
        yield
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(running.certificates.resolve())
    try:
        yield
    finally:
        link.unlink(missing_ok=True)


def run_until_signal(
    main: Coroutine[Any, Any, None],
    on_signal: Callable[[], None],
    *,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> bool:
    """Run *main*, cancel it on Ctrl-C or SIGTERM, and return whether a signal ended it.

    loop_factory   makes the event loop; None: asyncio does

    A second signal cancels the cleanup of *main*. Two signals in quick succession count as one.
    """
    signalled: float | None = None

    async def guarded() -> None:
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"

        def stop() -> None:
            nonlocal signalled
            if signalled is None:
                signalled = loop.time()
                on_signal()
            elif loop.time() - signalled < _SAME_SIGNAL_SECONDS:
                return
            task.cancel()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        await main

    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(guarded())
    except asyncio.CancelledError:
        if signalled is None:
            raise
    return signalled is not None


def examples(address: str, certificates: Path | None = None) -> list[str]:
    """Return example commands for a router at *address*.

    certificates   the folder of its certificates, if it uses TLS; our own commands find them by themselves
    """
    target = "" if address == DEFAULT_TARGET else f" --target {address}"
    chat = '{"chat": {"messages": [{"role": "user", "content": "Hello!"}]}, "sampling": {"max_tokens": 32}}'
    security = "-plaintext"
    if certificates is not None:
        cert, key = cert_file(certificates, CLIENT), key_file(certificates, CLIENT)
        security = f"-cacert {certificates / CA} -cert {cert} -key {key}"
    return [
        f'headrace chat{target} "Why is the sky blue?"',
        f'headrace explain{target} "Prove that there are infinitely many primes."',
        f"headrace tiers{target}",
        f"grpcurl {security} {address} list",
        f"grpcurl {security} -d '{chat}' {address} headrace.v1.GenerationService/Generate",
    ]


def http_examples(gateway: str) -> list[str]:
    """Return example commands for a gateway with the URL *gateway*; none without one."""
    if not gateway:
        return []
    return [
        shlex.join(curl(gateway, "Hello!")),
        f"export OPENAI_BASE_URL={gateway}/v1 OPENAI_API_KEY=none  # for OpenAI's clients",
    ]


def curl(gateway: str, text: str, *options: str, **fields: object) -> list[str]:
    """Return the words of the command that asks a gateway for a chat completion.

    options  of curl
    fields   of the request, besides model and messages
    """
    body = {"model": "auto", "messages": [{"role": "user", "content": text}], **fields}
    header = ["-H", "content-type: application/json"]
    data = ["-d", json.dumps(body, ensure_ascii=False)]
    return ["curl", *options, f"{gateway}/v1/chat/completions", *header, *data]


def _processes(spec: MeshSpec, running: Running) -> Table:
    table = Table("process", "model")
    table.add_column("port", justify="right")
    table.add_column("pid", justify="right")
    if spec.metrics_port:
        table.add_column("metrics", justify="right")
    for process in running.processes:
        metrics = [process.environment["HEADRACE_METRICS_PORT"]] if spec.metrics_port else []
        table.add_row(
            process.name, process.about, str(process.port), str(running.pids[process.name]), *metrics
        )
    return table

"""`headrace up`: run a whole mesh on this machine until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.table import Table

from headrace import models
from headrace.cli.launch.boards import FetchBoard, StartBoard
from headrace.cli.launch.certificates import CA, CLIENT, cert_file, key_file, shared_folder
from headrace.cli.launch.mesh import mesh, require_free

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

    from rich.console import Console

    from headrace.cli.launch.mesh import MeshSpec, Running

DEFAULT_PORT = 50051
DEFAULT_TARGET = f"127.0.0.1:{DEFAULT_PORT}"
_SAME_SIGNAL_SECONDS = 0.5  # timeout(1) and some shells signal a process, and then its process group


def fetch_models(names: Sequence[str], cache: Path, console: Console) -> dict[str, Path]:
    """Fetch the models that are not on this machine, and show progress. Raises ModelUnavailable."""
    with FetchBoard(console) as board:
        return {name: models.resolve(name, cache, board) for name in dict.fromkeys(names)}


def prepare(spec: MeshSpec, console: Console) -> None:
    """Check the port and fetch the models. Raises BadSpec or ModelUnavailable."""
    require_free(spec.port)
    if not spec.fake:
        fetch_models([tier.model for tier in spec.tiers], spec.cache, console)


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
    console.print(f"Headrace is up at [bold]{running.address}[/] (Ctrl-C stops it). Try:\n", highlight=False)
    for line in examples(running.address, running.certificates):
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


def _processes(spec: MeshSpec, running: Running) -> Table:
    models_by_name = {tier.name: "echo" if spec.fake else tier.model for tier in spec.tiers}
    table = Table("process", "model")
    table.add_column("port", justify="right")
    table.add_column("pid", justify="right")
    if spec.metrics_port:
        table.add_column("metrics", justify="right")
    for process in running.processes:
        model = models_by_name.get(process.name.partition("-")[2], "")
        metrics = [process.environment["HEADRACE_METRICS_PORT"]] if spec.metrics_port else []
        table.add_row(process.name, model, str(process.port), str(running.pids[process.name]), *metrics)
    return table

"""Show three kinds of tiers in one mesh: `make demo-tiers`.

Our engine computes the tier "small" and vLLM the tier "medium". The tier "large" is at a URL: that of vLLM's
own server, which this starts in the place of a provider, and which knows nothing of Headrace. `headrace demo`
does the rest. With UPSTREAM=MODEL@URL the tier "large" is at that URL, and no server is started.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
from pathlib import Path

from rich.console import Console

from headrace import models
from headrace.cli.complaints import complain
from headrace.cli.launch.cores import cores
from headrace.cli.launch.mesh import HOST, reserved_ports
from headrace.cli.launch.model_files import unpack
from headrace.cli.launch.processes import ChildDied, Process, crew, log_folder
from headrace.cli.launch.tiers import BadSpec
from headrace.cli.launch.vllm import environment, require_vllm

KV = "--max-model-len 4096 --enforce-eager"  # it starts three times as fast without compilation
_STOP_SECONDS = 20.0


def server(python: str, model: str, folder: Path, port: int, log: Path) -> Process:
    """Return vLLM's server with OpenAI's API, for the model in *folder*."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    return Process(
        name="vLLM's server",
        command=[
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
            *("--served-model-name", model, "--host", HOST, "--port", str(port), *KV.split()),
        ],
        log=log,
        environment=environment(
            alone, python=python, packages=log.parent / "none", threads=max(1, cores() // 3), arguments=KV
        ),
        port=port,
    )


def command(python: str, upstream: str) -> list[str]:
    """Return the words of `headrace demo` with the three tiers."""
    words = ["headrace", "demo", "--tier", f"small={models.SMALL}", "--tier", f"medium=vllm:{models.LARGE}"]
    return [*words, "--tier", f"large={upstream}", "--vllm-python", python, f"--vllm-args={KV}"]


async def run(words: list[str], beside: list[Process], console: Console) -> int:
    """Run a command while the processes *beside* it run, and return its exit code. Raises ChildDied."""
    console.print(f"$ {shlex.join(words)}", style="bold", markup=False, highlight=False, soft_wrap=True)
    async with crew([beside], grace=_STOP_SECONDS) as running:
        process = await asyncio.create_subprocess_exec(
            *words,
            env={"HEADRACE_API": "vllm", **os.environ},  # what the server accepts beyond OpenAI's API
        )
        watch = asyncio.create_task(running.watch() if beside else asyncio.Event().wait())
        done = asyncio.create_task(process.wait())
        try:
            await asyncio.wait((watch, done), return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()  # raises ChildDied
            return done.result()
        finally:
            watch.cancel()
            if process.returncode is None:
                process.terminate()
                await process.wait()


def main() -> int:
    """Prepare, and show the demo. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiers_demo", description=__doc__)
    parser.add_argument("--vllm-python", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--upstream", default="", metavar="MODEL@URL", help="use this service for `large`")
    arguments = parser.parse_args()
    python, console = str(Path(arguments.vllm_python).absolute()), Console()
    try:
        require_vllm(python)
        if arguments.upstream:
            return asyncio.run(run(command(python, arguments.upstream), [], console))
        cache = models.cache_folder()
        folder = unpack(models.LARGE, cache, console)
        logs = log_folder(cache)
        logs.mkdir(parents=True, exist_ok=True)
        with reserved_ports(1) as (port,):
            beside = server(python, models.LARGE, folder, port, logs / "vllm-server.log")
            words = command(python, f"{models.LARGE}@http://{HOST}:{port}/v1")
            return asyncio.run(run(words, [beside], console))
    except (BadSpec, ChildDied, models.ModelUnavailable) as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

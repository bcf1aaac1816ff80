"""Check and measure a GPU worker on this machine, within 8 minutes; installs nothing.

    python -m benchmarks.gpu [--only PART...] [--models MODEL...] [--wheels DIR] [--out DIR]
    python -m benchmarks.gpu --rehearse
    python -m benchmarks.gpu wheels DIR

parts:
  card      the card, and how fast it copies and multiplies: the ceilings of the other parts
  tests     the tests that need a GPU
  exact     which products are the same in batches of any size, and what exact mode costs
  kernels   attention and sampling beside their ceilings and beside torch
  start     time until a worker is ready, its memory, and its logits beside transformers' in float32
  prefill   steps of 2,048 prompt tokens
  decode    steps of 1, 32 and 256 sequences of 1,024 tokens
  workload  256 requests of 100-1,024 tokens in and out at once, by the engine alone
  mesh      the same through router, batcher and worker as processes, over gRPC
  peers     the same by transformers' continuous batching and by vLLM if it is installed, and the time of
            a decode step's matrix products alone

The models have random weights. Results are written to DIR/gpu.json and DIR/gpu.md after every part.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import jobs, shapes, wheels
from benchmarks.gpu.report import Options
from benchmarks.gpu.results import Results
from benchmarks.gpu.runner import Runner

ROOT = Path(__file__).resolve().parents[2]
_MINUTES = 8.0
# A rehearsal takes a minute or two, but a busy machine must not make it fail.
_REHEARSAL_MINUTES, _REHEARSAL_PATIENCE = 30.0, 5.0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--only", nargs="+", choices=jobs.PARTS, default=jobs.PARTS, metavar="PART", help="what to measure")
    add("--models", nargs="+", choices=list(shapes.SHAPES), metavar="MODEL", help="default: all three")
    add("--rehearse", action="store_true", help="run everything with tiny models on the CPU, without a GPU")
    add("--wheels", type=Path, help="folder of wheels that this machine lacks; see `wheels DIR`")
    add("--out", type=Path, default=Path("build/gpu"), help="folder for results and logs")
    add("--minutes", type=float, help="time limit, 8 by default; what no longer fits is skipped")
    add("--device", default="cuda:0", help="device to measure")
    add("--dtype", default="bfloat16", help="data type of the models")
    add("--share", type=float, default=1.0, help="share of the workload's requests")
    add("--peer-share", type=float, default=0.25, help="the same where it is compared with others")
    return made


def main(given: Sequence[str] | None = None) -> int:
    """Run the parts. Returns 1 if one of them failed."""
    given = sys.argv[1:] if given is None else given
    if given[:1] == ["wheels"]:
        return wheels.main(given[1:])
    arguments = parser().parse_args(given)
    rehearse = arguments.rehearse
    options = Options(
        rehearse=rehearse,
        device="cpu" if rehearse else arguments.device,
        dtype="float32" if rehearse else arguments.dtype,
        share=arguments.share,
        peer_share=arguments.peer_share,
        out=arguments.out.resolve(),
    )
    results = Results(
        command=shlex.join(["python", "-m", "benchmarks.gpu", *given]), date=time.strftime("%Y-%m-%d")
    )
    # Compiled kernels: all processes use the same, and the next run on this machine, too.
    kernels = {"TRITON_CACHE_DIR": str(options.out / "triton")}
    with tempfile.TemporaryDirectory(prefix="headrace-wheels-") as unpacked:
        if arguments.wheels is not None:
            wheels.unpack(arguments.wheels, Path(unpacked))
        runner = Runner(
            results,
            options,
            seconds=60 * (arguments.minutes or (_REHEARSAL_MINUTES if rehearse else _MINUTES)),
            environment=environment(Path(unpacked), rehearse=rehearse) | kernels,
            modules=("torch", "transformers"),  # takes seconds
            echo=lambda line: print(line, flush=True),
        )
        models = arguments.models or (shapes.TINY if rehearse else shapes.REAL)
        patience = _REHEARSAL_PATIENCE if rehearse else 1.0
        runner.run(jobs.plan(arguments.only, models, patience=patience))
    print(f"written to {options.out}/gpu.md and gpu.json")
    if results.failed:
        print(f"FAILED: {', '.join(results.failed)}")
    return 1 if results.failed else 0


def environment(unpacked: Path, *, rehearse: bool) -> dict[str, str]:
    """Return the environment of the processes: this checkout and the unpacked wheels can be imported."""
    # Of a test run that runs us, or of a mesh: they are not meant for what we start.
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "COV_", "HEADRACE_"))
    }
    paths = [str(ROOT / "services"), str(ROOT), str(unpacked), inherited.get("PYTHONPATH", "")]
    made = {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    made |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    made.pop("TRITON_INTERPRET", None)
    if rehearse:
        made |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return made


if __name__ == "__main__":
    sys.exit(main())

"""Measure others on the same requests: transformers' continuous batching, vLLM if it is installed, and the
matrix products of a decode step alone, which no engine can undercut."""

from __future__ import annotations

import gc
import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu import limits
from benchmarks.gpu.report import Report
from benchmarks.gpu.requests import TEMPERATURE, Request, workload
from benchmarks.gpu.shapes import Shape, model_folder, random_network
from benchmarks.gpu.timing import seconds_of

_ROWS = (1, 32, 256)


def run(report: Report, shape: Shape | None) -> None:
    """Measure one model."""
    assert shape is not None
    _products(report, shape)
    options = report.options
    requests = workload(shape, options.peer_share, tiny=options.rehearse)
    ours = report.facts.get(f"workload {shape.name} {options.peer_share:g}")
    # vLLM first, because this process keeps memory after it has run transformers.
    for name, measure in (("vLLM", _vllm), ("transformers' continuous batching", _transformers)):
        gc.collect()
        torch.cuda.empty_cache()
        try:
            rate, note = measure(report, shape, requests)
        except Exception as error:
            report.row(name, note=f"failed: {type(error).__name__}: {str(error).strip()[:200]}")
            continue
        if rate is None:
            report.row(name, note=note)
            continue
        report.row(f"{name}, {len(requests)} requests", rate, "tokens/s", note=note)
        if ours:
            goal = limits.PEER if measure is _transformers else None
            report.row(f"engine over {name}", ours / rate, goal=goal, note=f"{ours:,.0f} tokens/s")


@torch.inference_mode()
def _products(report: Report, shape: Shape) -> None:
    """Time the products of a whole decode step: all layers with weights of their own, and the head."""
    options = report.options
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    weights = [
        torch.empty(outputs, inputs, device=device, dtype=dtype).normal_(std=0.02)
        for _ in range(shape.layers)
        for _, outputs, inputs in shape.products
    ]
    weights.append(torch.empty(shape.vocabulary, shape.hidden, device=device, dtype=dtype).normal_(std=0.02))
    for rows in _ROWS[:1] if options.rehearse else _ROWS:
        inputs = {
            depth: torch.randn(rows, depth, device=device, dtype=dtype)
            for depth in {weight.shape[1] for weight in weights}
        }

        def step(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for weight in weights:
                torch.mm(inputs[weight.shape[1]], weight.t())

        seconds = seconds_of(step, device, budget=1.0)
        decode = report.facts.get(f"decode {shape.name} {rows}")
        note = f"{1e3 * seconds:.3g} ms"
        if decode:
            note += f"; our decode steps of {rows} reach {decode / (rows / seconds):.0%} of it"
        report.row(
            f"only the matrix products of decode steps, B = {rows}", rows / seconds, "tokens/s", note=note
        )


def _transformers(report: Report, shape: Shape, requests: Sequence[Request]) -> tuple[float | None, str]:
    """Run transformers' continuous batching until all is done, or time is up. Returns tokens per second."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    options = report.options
    network = random_network(shape, options.device, options.dtype, "sdpa")
    configuration: Any = GenerationConfig
    config = configuration(
        do_sample=True, temperature=TEMPERATURE, top_k=0, max_new_tokens=1024, eos_token_id=-1, pad_token_id=0
    )
    sizes: dict[str, Any] = {"allow_block_sharing": False}
    if options.rehearse:  # it would take all of the memory
        sizes |= {
            "num_blocks": 64,
            "max_batch_tokens": 64,
            "max_requests_per_batch": 8,
            "use_cuda_graph": False,
        }

    def prepare() -> Any:
        return network.init_continuous_batching(
            generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**sizes)
        )

    try:
        manager = prepare()
    except Exception as error:  # FlashAttention that it expects, but cannot load without a network
        report.say(f"transformers falls back to its SDPA: {type(error).__name__}: {error}")
        network.set_attn_implementation("paged|sdpa")
        manager = prepare()
    if hasattr(manager, "warmup") and not options.rehearse:
        manager.warmup()
    manager.start()
    began = time.perf_counter()
    for index, request in enumerate(requests):
        manager.add_request(
            list(request.ids),
            request_id=str(index),
            max_new_tokens=request.tokens,
            streaming=True,
            eos_token_id=-1,
        )
    had, open_requests = dict.fromkeys(map(str, range(len(requests))), 0), len(requests)
    while open_requests and report.left > 5:
        output = manager.get_result(timeout=1)
        if output is None:
            if not manager.is_running():
                raise RuntimeError("its thread ended")
            continue
        if output.error:
            raise RuntimeError(output.error)
        had[output.request_id] = len(output.generated_tokens)
        open_requests -= output.is_finished()
    seconds = time.perf_counter() - began
    tokens = sum(had.values())
    note = f"{tokens} tokens in {seconds:.1f} s, attention {network.config._attn_implementation}"
    if open_requests:
        note += f"; {open_requests} requests were not complete when its time was up"
        manager.stop(block=False)
    else:
        manager.stop(block=True, timeout=5)
    return tokens / seconds, note


def _vllm(report: Report, shape: Shape, requests: Sequence[Request]) -> tuple[float | None, str]:
    """Run vLLM in a process of its own. Returns tokens per second, or None if it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        return None, "vLLM is not installed here"
    options = report.options
    if options.rehearse or report.left < 30:
        return None, "not run: it needs a GPU and 30 seconds"
    folder = model_folder(shape, options.out / "models" / shape.name)
    ask = options.out / f"vllm-{shape.name}.json"
    ask.write_text(json.dumps([[list(request.ids), request.tokens] for request in requests]))
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.processes.vllm_host",
        str(folder),
        str(ask),
        options.dtype,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        printed, _ = process.communicate(timeout=report.left - 3)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return None, "vLLM was not done in time"
    found = json.loads(printed.splitlines()[-1])
    return found["tokens"] / found[
        "seconds"
    ], f"vLLM {found['version']}, {found['tokens']} tokens in {found['seconds']:.1f} s"

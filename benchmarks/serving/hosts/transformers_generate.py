"""Run transformers: its continuous batching, or `generate` over static batches, in bfloat16.

A static batch takes the waiting requests, at most 32, and runs until its longest answer is complete. A
shorter answer is complete when it has its own tokens; requests that arrive meanwhile wait.
"""

from __future__ import annotations

import argparse
import queue
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from benchmarks.serving.hosts.pipe import Ask, Pipe

if TYPE_CHECKING:
    import torch

BATCH = 32
LINGER = 0.02  # seconds: clients that were answered in one step send again together


def static(pipe: Pipe, model: Any) -> None:
    """Serve the pipe in static batches."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    waiting: list[Ask] = []
    while True:
        asks = pipe.take(wait=not waiting, linger=LINGER)
        if asks is None:
            return
        waiting += asks
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        if not batch:
            continue
        longest = max(len(ask.prompt) for ask in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, ask in enumerate(batch):
            ids[row, longest - len(ask.prompt) :] = torch.tensor(ask.prompt)
            mask[row, longest - len(ask.prompt) :] = 1
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=mask,
                generation_config=_greedy(max_new_tokens=max(ask.tokens for ask in batch)),
                streamer=_steps(BaseStreamer, pipe, batch),
            )


def _steps(base: Any, pipe: Pipe, batch: list[Ask]) -> Any:
    """Return a streamer that sends each step's tokens to the answers that are not complete."""

    class Steps(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.step = -1  # the first value is the prompt

        def put(self, value: torch.Tensor) -> None:
            if self.step >= 0:
                ids = value.tolist()
                pipe.tokens((ask.key, [ids[row]]) for row, ask in enumerate(batch) if self.step < ask.tokens)
            self.step += 1

        def end(self) -> None:
            pass

    return Steps()


def continuous(pipe: Pipe, model: Any) -> None:
    """Serve the pipe with transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig

    manager = model.init_continuous_batching(
        generation_config=_greedy(max_new_tokens=128, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=256,
            page_size=64,
            max_batch_tokens=512,
            max_requests_per_batch=64,
            allow_block_sharing=False,
            auto_switch_to_flash=False,
        ),
    )
    manager.start()
    had: dict[str, int] = {}
    while (asks := pipe.take(wait=not had)) is not None:
        for ask in asks:
            had[str(ask.key)] = 0
            manager.add_request(
                ask.prompt,
                request_id=str(ask.key),
                max_new_tokens=ask.tokens,
                streaming=True,
                eos_token_id=-1,
            )
        try:
            outputs = [manager.get_result(timeout=0.05)]
        except queue.Empty:
            continue
        updates = []
        for output in outputs:
            if output is None or output.request_id not in had:
                continue
            if output.error:
                raise RuntimeError(output.error)
            done = had[output.request_id]
            updates.append((int(output.request_id), list(output.generated_tokens[done:])))
            had[output.request_id] = len(output.generated_tokens)
            if output.is_finished():
                del had[output.request_id]
        pipe.tokens(updates)
    manager.stop(block=True)


def _greedy(**more: int) -> Any:
    import transformers

    configuration: Any = transformers.GenerationConfig
    return configuration(do_sample=False, pad_token_id=0, **more)


def main() -> None:
    """Load the model, then serve the pipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a folder that transformers saved")
    parser.add_argument("--mode", choices=("static", "continuous"), required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    pipe = Pipe()

    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(arguments.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16, trust_remote_code=False
    )
    model.eval()
    model.generation_config.eos_token_id = None
    pipe.ready({name: version(name) for name in ("torch", "transformers")})
    (static if arguments.mode == "static" else continuous)(pipe, model)


if __name__ == "__main__":
    main()
